"""The well-known wrong ways to grow, each made from the right one by a single fault, must fail by a wide margin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from family_zoo import make_checkpoint, some_ids, stock_logits
from growing import grow_to, opened, stock_distance

from tlt_cli.surgery import arrows, depth, grow, maps, rotary
from tlt_cli.surgery.grow import Recipe
from tlt_cli.surgery.maps import MEAN, ZERO, AxisMap
from tlt_cli.surgery.widen import Side

Patch = pytest.MonkeyPatch
FAR = 1e-2  # of the logits' deviation; what is right stays under 2e-5


def unscaled(patch: Patch) -> None:
    """The old scale for more entries: the norm sees another mean square (3.19 logits in the reference for zeros, 0.89
    for Net2Net's uneven copies)."""
    patch.setattr(maps, "isometric", lambda mapped: mapped)


def tiled_query_heads(patch: Patch) -> None:
    """New query heads behind all old ones, so that they read other heads' keys (5.5)."""
    right = maps.head_slots

    def tiled(kv: int, group: int, new_kv: int, new_group: int, *, copy: bool) -> object:
        slots = right(kv, group, new_kv, new_group, copy=copy)
        assert slots is not None
        return slots[0], np.arange(new_kv * new_group) % (kv * group)

    patch.setattr(maps, "head_slots", tiled)


def concatenated_head_dim(patch: Patch) -> None:
    """Fresh entries behind the old head: half of its pairs then turn at other frequencies (5.1)."""
    patch.setattr(arrows, "pair_sources", lambda old, new: np.where(np.arange(new) < old, np.arange(new), -1))


def theta_kept(patch: Patch) -> None:
    patch.setattr(rotary, "with_power", lambda fit, config, power: config)


def temperature_kept(patch: Patch) -> None:
    """Scores divided by the root of the larger head_dim (1.56)."""
    right = grow.prepare
    patch.setattr(
        grow, "prepare", lambda *a, **k: replace(g := right(*a, **k), temperatures=(1.0,) * len(g.layers.source))
    )


def tied_gain_kept(patch: Patch) -> None:
    """The final norm's gain copied although the tied head reads with the embedding's own scale."""
    right = arrows._norm
    patch.setattr(
        arrows,
        "_norm",
        lambda fit, axes, place, role, *rest: right(fit, axes, place, role.replace("final", "ffn"), *rest),
    )


def layer_norm_zero_filled(patch: Patch) -> None:
    """Zeros where LayerNorm's mean should be (9.6)."""
    right = arrows._stream

    def zeroed(*arguments: object) -> AxisMap:
        mapped = right(*arguments)  # type: ignore[arg-type]
        assert isinstance(mapped, AxisMap)
        return replace(mapped, kind=np.where(mapped.kind == MEAN, ZERO, mapped.kind).astype(np.int8))

    patch.setattr(arrows, "_stream", zeroed)


def embedding_scale_forgotten(patch: Patch) -> None:
    right = grow.prepare
    patch.setattr(grow, "prepare", lambda *arguments, **more: replace(right(*arguments, **more), embedding=1.0))


def copies_read_in_full(patch: Patch) -> None:
    """Doubled feed-forward rows whose readers do not share: the block writes twice what it should."""
    right = maps.repeat
    patch.setattr(maps, "repeat", lambda *a, **k: replace(m := right(*a, **k), read=np.where(m.read > 0, 1.0, 0.0)))


def loud_new_blocks(patch: Patch) -> None:
    right = depth.layers
    patch.setattr(grow, "layers", lambda *arguments: replace(p := right(*arguments), silent=(False,) * len(p.source)))


def key_gains_not_zeroed(patch: Patch) -> None:
    """Fresh entries behind a query and key norm must not reach the scores."""
    right = arrows._entries

    def loud(*arguments: object) -> dict[str, AxisMap]:
        found = right(*arguments)  # type: ignore[arg-type]
        return {**found, "key_norm": found["query_norm"]}

    patch.setattr(arrows, "_entries", loud)


def noise_not_in_the_null_space(patch: Patch) -> None:
    right = arrows.sides

    def wrong(*arguments: object, **more: object) -> tuple[Side, ...]:
        found = right(*arguments, **more)  # type: ignore[arg-type]
        return tuple(
            Side(replace(s.map, read=s.map.read * 0.9), True) if s.reads and isinstance(s.map, AxisMap) else s
            for s in found
        )

    patch.setattr(grow, "sides", wrong)


WRONG: dict[str, tuple[Callable[[Patch], None], str, str, dict[str, int]]] = {
    "padding unscaled": (unscaled, "llama", "identity", {"dim": 48}),
    "uneven copies unscaled": (unscaled, "llama", "duplicate", {"dim": 48}),
    "query heads tiled": (tiled_query_heads, "llama", "duplicate", {"heads": 8}),
    "head_dim concatenated": (concatenated_head_dim, "llama", "duplicate", {"head_dim": 16}),
    "theta kept": (theta_kept, "llama", "duplicate", {"head_dim": 12}),
    "temperature kept": (temperature_kept, "llama", "duplicate", {"head_dim": 16}),
    "tied gain kept": (tied_gain_kept, "llama", "duplicate", {"dim": 64}),
    "LayerNorm zero-filled": (layer_norm_zero_filled, "gpt2", "identity", {"dim": 40}),
    "embedding scale forgotten": (embedding_scale_forgotten, "gemma2", "duplicate", {"dim": 64}),
    "copies read in full": (copies_read_in_full, "llama", "duplicate", {"ffn": 96}),
    "new blocks loud": (loud_new_blocks, "llama", "duplicate", {"layers": 4}),
    "key gains loud": (key_gains_not_zeroed, "qwen3", "duplicate", {"head_dim": 24}),
    "readers off": (noise_not_in_the_null_space, "llama", "duplicate", {"dim": 64}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_known_mistakes_show(tmp_path: Path, monkeypatch: Patch, fault: str) -> None:
    apply, family, method, sizes = WRONG[fault]
    source = opened(make_checkpoint(tmp_path / "source", family, tied=True))
    logits = stock_logits(source.folder, some_ids())
    assert stock_distance(grow_to(tmp_path / "right", source, Recipe(method=method), **sizes), logits) <= 2e-5
    apply(monkeypatch)
    assert stock_distance(grow_to(tmp_path / "wrong", source, Recipe(method=method), **sizes), logits) > FAR


def test_epsilon_stays(tmp_path: Path) -> None:
    """The other convention scales epsilon by d/D; doing so to this one is an error that a large epsilon shows."""
    source = opened(make_checkpoint(tmp_path / "source", "llama", rms_norm_eps=1e-2))
    logits = stock_logits(source.folder, some_ids())
    out = grow_to(tmp_path / "grown", source, dim=64)
    assert stock_distance(out, logits) <= 2e-5
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 5e-3}))
    assert stock_distance(out, logits) > 1e-3
