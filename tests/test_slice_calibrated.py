"""What a text chooses is what matters, a turned stream computes the same, and a refit never loses what a cut had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import Source, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from slicing import spoiled

from tlt_cli.calibration import importance, principal, slice_refit, slicing
from tlt_cli.calibration.blocks import Blocks, calibration_windows, tapped
from tlt_cli.calibration.importance import RANKINGS
from tlt_cli.calibration.moments import moments
from tlt_cli.calibration.neurons import refit_kept, removal_order
from tlt_cli.calibration.removal import largest, removed
from tlt_cli.calibration.slicing import Calibrated, calibrated
from tlt_cli.calibration.survey import look
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import write
from tlt_cli.errors import TltError
from tlt_cli.model.part import child
from tlt_cli.surgery.slice import Chosen, planned_cut, sliced
from tlt_cli.surgery.verify_slice import Proof, check_slice, verify_written

everywhere = pytest.mark.parametrize("family", ZOO)
POST_NORMS = ("gemma2", "gemma3")
EXACT = 5e-5
TEXT = some_ids(batch=40, length=24, seed=5).flatten()


def joint(family: str) -> dict[str, int]:
    """Smaller along every axis at once."""
    if family == "gpt2":
        return {"dim": 24, "ffn": 30, "heads": 3, "kv_heads": 3, "layers": 2}
    head_dim = {"head_dim": 8} if family in (*POST_NORMS, "qwen3") else {}
    return {"dim": 24, "ffn": 30, "heads": 2, "kv_heads": 1, "layers": 3 if family in POST_NORMS else 2, **head_dim}


def made(source: Source, sizes: dict[str, int] | None = None, **options: Any) -> Calibrated:
    given: dict[str, Any] = {"order": "importance", "refit": False, "norm": None, **options}
    windows = calibration_windows(given.pop("text", TEXT), 24)
    return calibrated(source.fitted, source.checkpoint, windows, sizes or {}, **given)


def written(found: Calibrated, source: Source, out: Path) -> Path:
    """The checkpoint that comes of it, in the folder `out`."""
    tensors = found.plan_tensors
    if tensors is None:
        cuts = child(source.fitted, found.part).cuts
        tensors = tuple(planned_cut(name, cut, source.dtypes[cut.source]) for name, cut in cuts.items())
    write(out, tensors, source.checkpoint, config=found.config, metadata={"format": "pt"}, jobs=1, force=True)
    return out


def off(found: Calibrated, source: Source, out: Path, ids: torch.Tensor | None = None) -> float:
    """How far stock transformers' logits on what is written are from the source's: root mean square, in deviations."""
    ids = some_ids() if ids is None else ids
    logits, new = stock_logits(source.folder, ids), stock_logits(written(found, source, out), ids)
    return float((new - logits).square().mean().sqrt() / logits.std())


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Source:
    """The checkpoint with every tensor changed."""
    path = folder / "model.safetensors"
    save_file({n: change(n, t).contiguous() for n, t in load_file(path).items()}, path, {"format": "pt"})
    return opened(folder)


# --- which groups of inputs go -----------------------------------------------------------------------------------


def moment(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def refit_loss(gram: torch.Tensor, inputs: torch.Tensor, kept: list[int]) -> float:
    """E||W x - W' x||^2 / E||W x||^2 of the best W' on these inputs."""
    inside = torch.tensor(kept)
    taken = torch.linalg.solve(inputs[inside][:, inside], inputs[inside])
    rest = inputs - inputs[:, inside] @ taken
    return float((gram * rest).sum() / (gram * inputs).sum())


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_groups_that_go_lose_what_is_said(count: int, width: int, seed: int) -> None:
    size = count * width
    weight = torch.randn(5, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram, inputs, groups = weight.T @ weight, moment(size, seed), np.arange(size).reshape(count, width)
    for keep in range(1, count):
        found = removed(gram, inputs, groups, keep)
        assert found.loss == pytest.approx(refit_loss(gram, inputs, groups[found.kept].ravel().tolist()), rel=1e-3)
    first = removed(gram, inputs, groups, count - 1).kept
    losses = [refit_loss(gram, inputs, np.delete(groups, at, 0).ravel().tolist()) for at in range(count)]
    assert set(range(count)) - set(first.tolist()) == {int(np.argmin(losses))}


def test_groups_of_one_go_as_neurons_do() -> None:
    weight, inputs = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), moment(20, 1)
    order = removal_order(weight, inputs, None, most=15).order.tolist()
    for keep in (17, 10, 5):
        found = removed(weight.double().T @ weight.double(), inputs, np.arange(20)[:, None], keep)
        assert set(found.kept.tolist()) == set(range(20)) - set(order[: 20 - keep])


def test_owners_keep_as_many_each() -> None:
    gram, inputs = moment(12, 3), moment(12, 4)
    groups, owners = np.arange(12).reshape(6, 2), [2, 2, 2, 0, 0, 0]
    found = removed(gram, inputs, groups, 4, owners=owners, each=2).kept
    assert [owners[at] for at in found] == [2, 2, 0, 0]
    assert largest(torch.tensor([1.0, 3, 2, 9, 9, 8]), 4, owners=owners, each=2).tolist() == [1, 2, 3, 4]


# --- orders ------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_whole_model_in_another_order_is_the_model(tmp_path: Path, family: str, tied: bool) -> None:
    source = opened(make_checkpoint(tmp_path / "model", family, tied=tied))
    found = made(source)
    assert found.config == source.checkpoint.config
    assert not np.array_equal(found.part.hidden, np.arange(32)) and not np.array_equal(found.part.ffn[0], np.arange(48))
    assert off(found, source, tmp_path / "out") <= EXACT
    other = replace(found.part, ffn=tuple(reversed(found.part.ffn)))  # any order of neurons is the model
    assert off(replace(found, part=other), source, tmp_path / "out") <= EXACT


@pytest.mark.parametrize("order", ["importance", "pca"])
def test_config_says_nothing_of_what_is_gone(tmp_path: Path, order: str) -> None:
    """Prefixes of another stream, and how the parent was sliced, are no news of the part."""
    source = opened(make_checkpoint(tmp_path / "model", "llama"))
    config = {**source.fitted.config, "prefixes": [8, 16], "sliced": {"norm": "masked", "rules": "own"}}
    source = replace(source, fitted=replace(source.fitted, config=config))
    found = made(source, {"dim": 16}, order=order)
    plan = sliced(
        source.fitted, source.dtypes, Chosen(found.part), tensors=found.plan_tensors, config=found.config
    )[1]  # fmt: skip
    assert "prefixes" not in plan.config and plan.config["sliced"] == {"norm": "sliced", "rules": "parent"}
    assert plan.config["tie_word_embeddings"] is False and plan.config["hidden_size"] == 16


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"ffn": 24}, {}), ({"ffn": 24}, {"refit": True}), ({"dim": 24}, {}), ({"dim": 24}, {"norm": "sliced"}),
        ({"dim": 24}, {"order": "prefix"}), ({"layers": 2}, {"order": "pca", "refit": True}),
    ],
)  # fmt: skip
def test_progress_ends_when_all_is_done(tmp_path: Path, sizes: dict[str, int], options: dict[str, Any]) -> None:
    steps: list[tuple[int, int]] = []
    source = opened(make_checkpoint(tmp_path / "model", "llama"))
    made(source, sizes, progress=lambda done, total: steps.append((done, total)), **options)
    assert steps == [(at + 1, len(steps)) for at in range(len(steps))] and steps


def test_only_what_chooses_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(make_checkpoint(tmp_path / "model", "llama"))
    blocks = Blocks(source.checkpoint, source.fitted)
    for seen in look(blocks, TEXT.reshape(-1, 24)[:2], stream=False):
        assert set(seen.moments.reads) == {(seen.layer, "output"), (seen.layer, "down")}

    def unwanted(*_: Any) -> torch.Tensor:
        raise AssertionError("entries of heads are not chosen here")

    monkeypatch.setattr(importance, "_written", unwanted)
    made(source, {"ffn": 24})
    with pytest.raises(AssertionError, match="not chosen here"):
        made(source, {"head_dim": 4})


@dataclass
class Reading:
    """Tensors of a checkpoint, and how many rows of them were read."""

    source: Source
    rows: int = 0

    def read(self, name: str) -> torch.Tensor:
        found = self.source.checkpoint.read(name)
        self.rows += len(found) if found.dim() > 1 else 0
        return found

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.rows += stop - start
        return self.source.checkpoint.read_rows(name, start, stop)


@pytest.mark.parametrize("order", ["importance", "pca"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_some_rows_of_a_cut_model_take_some_of_its_parent(tmp_path: Path, family: str, order: str) -> None:
    """Rows [start, stop) of every tensor are those of the whole, and no row is read that is not needed."""
    if order == "pca" and family in POST_NORMS:
        pytest.skip("cannot be turned")
    source = opened(make_checkpoint(tmp_path / "model", family, tied=True))
    reading = Reading(source)
    found = made(source, joint(family))
    parent, stored = principal.untied(source.fitted) if order == "pca" else (source.fitted, {})
    cut = child(parent, replace(found.part, hidden=np.arange(24)) if order == "pca" else found.part)
    pieces: Any = cut.cuts
    if order == "pca":
        rotation = principal.directions(moment(32, 1), 24, layer_norm=family == "gpt2")
        pieces = principal.turned_cuts(parent, cut.fit, cut.cuts, rotation, stored)
    view = slicing.View(reading, pieces)
    for name, piece in pieces.items():
        whole, size = view.read(name), piece.shape[0]
        for start, stop in ((0, size), (size // 3, size // 2), (size - 1, size)):
            reading.rows = 0
            some = view.read_rows(name, start, stop)
            assert torch.allclose(some, whole[start:stop], rtol=1e-6, atol=1e-7) and len(some) == stop - start
            if "embed" in name or "wte" in name or "lm_head" in name:
                assert reading.rows == stop - start
    assert not torch.allclose(view.read(name)[1:], view.read(name)[:-1])


def test_neurons_out_of_step_are_not_the_model(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path / "model", "llama"))
    found = made(source)
    cuts = child(source.fitted, found.part).cuts
    tensors = tuple(
        PlannedTensor(n, c.shape, "F32", c.source, None if "down_proj" in n or c.plain else c) for n, c in cuts.items()
    )
    assert off(replace(found, plan_tensors=tensors), source, tmp_path / "out") > 0.1


def test_a_prefix_of_the_ordered_model_is_the_cut_by_importance(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path / "model", "qwen2"))
    ordered = opened(written(made(source), source, tmp_path / "ordered"))
    cut = made(source, {"ffn": 20}, norm="sliced")
    prefix = made(ordered, {"ffn": 20}, order="prefix", norm="sliced")
    ids = some_ids()
    one, other = (stock_logits(written(*pair), ids) for pair in (
        (cut, source, tmp_path / "one"), (prefix, ordered, tmp_path / "two")
    ))  # fmt: skip
    assert float((one - other).abs().max() / one.std()) <= EXACT


PLANTED: dict[str, tuple[dict[str, int], Callable[[str, torch.Tensor], torch.Tensor]]] = {}


def _quiet(index: slice, dim: int, names: tuple[str, ...]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Entries of a dim of these tensors made next to nothing."""

    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if any(part in name for part in names):
            value = value.clone()
            value.movedim(dim, 0)[index] *= 1e-4
        return value

    return change


PLANTED["neurons"] = {"ffn": 24}, _quiet(slice(0, 24), 1, ("down_proj",))
PLANTED["key/value heads"] = {"heads": 2, "kv_heads": 1}, _quiet(slice(0, 16), 1, ("o_proj",))
PLANTED["layers"] = {"layers": 2}, _quiet(slice(None), 0, ("layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"))


def _quiet_channels(name: str, value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    if "embed_tokens" in name:
        value[:, :16] *= 1e-4
    elif "o_proj" in name or "down_proj" in name:
        value[:16] *= 1e-4
    return value


def _quiet_queries(name: str, value: torch.Tensor) -> torch.Tensor:
    """Of four heads in two groups the first of each."""
    value = value.clone()
    if "o_proj" in name:
        value[:, 0:8] *= 1e-4
        value[:, 16:24] *= 1e-4
    return value


PLANTED["channels"] = {"dim": 16}, _quiet_channels
PLANTED["query heads"] = {"heads": 2}, _quiet_queries


# what is read from a neuron or a head is no part of its activation
FOUND = [(axis, by) for axis in PLANTED for by in RANKINGS if by != "activation" or axis in ("channels", "layers")]


@pytest.mark.parametrize(("axis", "by"), FOUND)
def test_what_matters_is_found(tmp_path: Path, axis: str, by: str) -> None:
    """Everything that matters lies at the end: the first entries alone are another model."""
    sizes, change = PLANTED[axis]
    make_checkpoint(tmp_path / "model", "llama")
    source = changed(tmp_path / "model", change)
    found = made(source, sizes, by=by)
    assert off(found, source, tmp_path / "out") < 0.02
    assert off(made(source, sizes, order="prefix"), source, tmp_path / "out") > 0.3


def test_rotary_pairs_that_matter_are_found(tmp_path: Path) -> None:
    """The second half of the pairs carries all: neighbours from the middle on, turned as they were."""
    make_checkpoint(tmp_path / "model", "llama", head_dim=16)

    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            heads = value.clone().reshape(-1, 2, 8, value.shape[1])
            heads[:, :, :4] *= 1e-3
            return heads.reshape(value.shape)
        return value

    source = changed(tmp_path / "model", change)
    found = made(source, {"head_dim": 8})
    assert found.part.entries.tolist() == [4, 5, 6, 7]
    assert off(found, source, tmp_path / "out") < 0.02
    assert off(made(source, {"head_dim": 8}, order="prefix"), source, tmp_path / "out") > 0.3


@pytest.mark.parametrize(
    "family", [family for family in ZOO if family != "gpt2"]
)  # fewer channels are fewer heads there
def test_gains_make_up_for_fewer_entries(tmp_path: Path, family: str) -> None:
    """Channels that are next to nothing leave a stream whose norms see less: calibrated gains put that right."""
    folder = make_checkpoint(tmp_path / "model", family)

    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if "embed_tokens" in name:
            value[:, 24:] *= 1e-3
        elif any(part in name for part in ("o_proj.weight", "down_proj.weight")):
            value[24:] *= 1e-3
        elif "post" in name and family in POST_NORMS and "pre_feed" not in name:
            value[24:] = -1 + 1e-3
        return value

    source = changed(folder, change)
    assert off(made(source, {"dim": 24}), source, tmp_path / "out") < 0.05
    assert off(made(source, {"dim": 24}, norm="sliced"), source, tmp_path / "out") > 0.05


# --- principal directions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in ZOO if family not in POST_NORMS])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_turned_model_is_the_model(tmp_path: Path, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(make_checkpoint(tmp_path / "model", family, tied=tied))
    found = made(source, order="pca")
    assert found.config["tie_word_embeddings"] is False
    assert bool(found.notes) == tied
    assert off(found, source, tmp_path / "out") <= EXACT
    plain = principal.Turned.__call__

    def without(field: str) -> Callable[..., Any]:
        return lambda self, tensors: plain(replace(self, **{field: None}), tensors)

    for field in ("gain", "shift") if family == "gpt2" else ("gain",):
        monkeypatch.setattr(principal.Turned, "__call__", without(field))
        assert off(found, source, tmp_path / "out") > 0.1, f"{field} is not folded"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_stream_of_few_directions_needs_no_more(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that writes lies in 15 directions, none of them a channel: 16 turned entries hold them, any others do not."""
    make_checkpoint(tmp_path / "model", family)
    basis = torch.linalg.qr(torch.randn(32, 15, generator=torch.Generator().manual_seed(3)))[0]
    project = basis @ basis.T

    def change(name: str, value: torch.Tensor) -> torch.Tensor:
        if any(part in name for part in ("embed_tokens", "wte", "wpe", "c_proj.weight")):
            return value @ project
        return project @ value if any(p in name for p in ("o_proj", "down_proj", "c_proj.bias")) else value

    source = changed(tmp_path / "model", change)
    sizes = {"dim": 16, **({"heads": 2, "kv_heads": 2} if family == "gpt2" else {})}
    if family == "gpt2":  # fewer channels are fewer heads: two of them write nothing
        source = changed(tmp_path / "model", _quiet(slice(16, 32), 0, ("attn.c_proj.weight",)))
    found = made(source, sizes, order="pca")
    assert off(found, source, tmp_path / "out") < 2e-2
    assert off(made(source, sizes), source, tmp_path / "out") > 0.2
    plain = principal.directions

    def random(normed: torch.Tensor, keep: int, *, layer_norm: bool) -> torch.Tensor:
        return plain(moment(len(normed), 7), keep, layer_norm=layer_norm)

    monkeypatch.setattr(slicing, "directions", random)
    assert off(made(source, sizes, order="pca"), source, tmp_path / "out") > 0.2


def test_rows_of_a_layer_norms_rotation_have_no_mean() -> None:
    rotation = principal.directions(moment(12, 0) - moment(12, 0).mean(0), 8, layer_norm=True)
    assert torch.allclose(rotation.sum(0), torch.zeros(12, dtype=torch.float64), atol=1e-12)
    basis = principal.mean_free(8)
    assert (
        torch.allclose(basis.T @ basis, torch.eye(7, dtype=torch.float64)) and float(basis.sum(0).abs().max()) < 1e-12
    )


def test_a_head_that_stands_for_the_embedding_is_turned(tmp_path: Path) -> None:
    """A tied file may keep the one matrix under the head's name."""
    make_checkpoint(tmp_path / "model", "llama", tied=True)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, {"format": "pt"})
    source = opened(tmp_path / "model")
    assert off(made(source, order="pca"), source, tmp_path / "out") <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
def test_a_file_is_held_against_its_plan(tmp_path: Path, dtype: torch.dtype) -> None:
    """What was rounded is what the plan rounds to, and nothing else; how far that moved it is told too."""
    source = opened(make_checkpoint(tmp_path / "model", "llama", dtype=dtype))
    found = made(source, {"dim": 24}, order="pca")
    small, plan = sliced(
        source.fitted, source.dtypes, Chosen(found.part), tensors=found.plan_tensors, config=found.config
    )  # fmt: skip
    write(tmp_path / "out", plan.tensors, source.checkpoint, config=plan.config, metadata={"format": "pt"}, jobs=1)

    def proof() -> Proof:
        return verify_written(plan, source.checkpoint, open_checkpoint(tmp_path / "out"), small.fit)

    right = proof()
    check_slice(plan, right)
    assert right.found.computed.relative <= 1e-6
    coarse = right.found.written
    assert coarse is None if dtype == torch.float32 else coarse is not None and 1e-4 < coarse.relative < 0.3
    spoiled(tmp_path / "out", tensors=lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(0.98))
    assert not proof().found.holds
    with pytest.raises(TltError, match="verification failed"):
        check_slice(plan, proof())


@pytest.mark.parametrize("family", POST_NORMS)
def test_norms_behind_blocks_cannot_be_turned(tmp_path: Path, family: str) -> None:
    source = opened(make_checkpoint(tmp_path / "model", family))
    with pytest.raises(TltError, match=r"--order pca: .* norms what its blocks write"):
        made(source, {"dim": 24}, order="pca")


# --- refits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "order"), [(f, o) for f in ZOO for o in ("importance", "pca") if o != "pca" or f not in POST_NORMS]
)
def test_a_refit_comes_closer_on_its_text(tmp_path: Path, family: str, order: str) -> None:
    source = opened(make_checkpoint(tmp_path / "model", family, tied=family in ("qwen2", "gemma3")))
    sizes = joint(family)
    cut, refit = (made(source, sizes, order=order, refit=refit, by="energy") for refit in (False, True))
    errors = refit.details["errors"]
    assert all(each["refit"] <= each["cut"] * (1 + 1e-9) for each in errors.values())
    assert sum(each["refit"] < 0.97 * each["cut"] for each in errors.values()) > len(errors) / 2
    ids = TEXT.reshape(-1, 24)[:16]
    assert off(refit, source, tmp_path / "refit", ids) < 0.9 * off(cut, source, tmp_path / "cut", ids)


@everywhere
def test_nothing_moves_where_nothing_is_missing(tmp_path: Path, family: str) -> None:
    source = opened(make_checkpoint(tmp_path / "model", family))
    found = made(source, refit=True, order="prefix")
    assert found.plan_tensors is not None and all(tensor.compute is None for tensor in found.plan_tensors)


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain least squares."""
    monkeypatch.setattr(slice_refit, "_RIDGES", (1e-9,))


def lost(weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """E||W x||^2."""
    return float((weight @ inputs * weight).sum())


def feed_forward_cut(tmp_path: Path, family: str) -> tuple[Source, Calibrated, torch.Tensor, torch.Tensor]:
    """A cut of neurons alone, refit; the first block's down matrix [out, ffn] and what it read."""
    source = opened(make_checkpoint(tmp_path / "model", family))
    found = made(source, {"ffn": 24}, refit=True)
    seen = moments(Blocks(source.checkpoint, source.fitted), TEXT.reshape(-1, 24), gradients=False)
    name = "transformer.h.0.mlp.c_proj.weight" if family == "gpt2" else "model.layers.0.mlp.down_proj.weight"
    down = source.checkpoint.read(name)
    return source, found, down.T if family == "gpt2" else down, seen.inputs(0, "down")


@pytest.mark.usefixtures("undamped")
def test_a_feed_forward_is_refit_in_closed_form(tmp_path: Path) -> None:
    source, found, down, inputs = feed_forward_cut(tmp_path, "llama")
    assert found.plan_tensors is not None
    planned = {tensor.name: tensor for tensor in found.plan_tensors}
    first = planned["model.layers.0.mlp.down_proj.weight"]
    assert first.compute is not None
    new = torch.cat(list(first.compute(source.checkpoint)))
    kept = torch.from_numpy(found.part.ffn[0])
    wanted = refit_kept(down, inputs, kept)
    assert float((new - wanted).norm() / wanted.norm()) < 1e-3
    assert float((down[:, kept] - wanted).norm() / wanted.norm()) > 0.05
    told = found.details["errors"]["model.layers.0.mlp.down_proj"]
    for value, error in ((down[:, kept], told["cut"]), (new, told["refit"])):
        missing = down.double()
        missing[:, kept] -= value.double()
        assert error == pytest.approx(lost(missing, inputs) / lost(down.double(), inputs), rel=1e-3)
    for name, tensor in planned.items():  # in front of it nothing is missing, so nothing else moves
        if "layers.0." in name and "mlp" not in name:
            assert tensor.compute is None, name


@pytest.mark.usefixtures("undamped")
def test_a_bias_is_refit_too(tmp_path: Path) -> None:
    """With the bias free the matrix is refit to what remains without the mean, and the bias makes up for the mean."""
    source, found, down, _ = feed_forward_cut(tmp_path, "gpt2")
    assert found.plan_tensors is not None
    planned = {tensor.name: tensor for tensor in found.plan_tensors}
    name = "transformer.h.0.mlp.c_proj"
    new, bias = (torch.cat(list(planned[f"{name}.{kind}"].compute(source.checkpoint))) for kind in ("weight", "bias"))  # type: ignore[misc]
    read: list[torch.Tensor] = []
    blocks = Blocks(source.checkpoint, source.fitted)
    with tapped(blocks.decoder, lambda role, layer, x, y: read.append(x) if role == "down" else None):
        blocks.run(0, blocks.embed(TEXT.reshape(-1, 24)))
    h = read[0].flatten(0, -2).double()
    kept, mean = torch.from_numpy(found.part.ffn[0]), h.mean(0)
    wanted = refit_kept(down, (h - mean).T @ (h - mean) / len(h), kept)
    assert float((new.T - wanted).norm() / wanted.norm()) < 1e-3
    assert float((new.T - refit_kept(down, h.T @ h / len(h), kept)).norm() / wanted.norm()) > 1e-2
    shift = source.checkpoint.read(f"{name}.bias").double() + down.double() @ mean - wanted @ mean[kept]
    assert float((bias - shift).norm() / shift.norm()) < 1e-3


def test_a_refit_behind_layers_that_went_makes_up_for_them(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path / "model", "smollm3"))
    cut, refit = (made(source, {"layers": 2}, refit=refit) for refit in (False, True))
    ids = TEXT.reshape(-1, 24)[:16]
    assert off(refit, source, tmp_path / "refit", ids) < 0.9 * off(cut, source, tmp_path / "cut", ids)


def values(compute: Any, source: Source) -> torch.Tensor:
    """A whole planned tensor."""
    return torch.cat(list(compute(source.checkpoint)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_makes_logits_is_refit(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of its own moves; one that is the embedding stays, and the gain in front of it moves instead."""
    source = opened(make_checkpoint(tmp_path / "model", "llama", tied=tied))
    found = made(source, {"dim": 24}, refit=True)
    assert found.plan_tensors is not None
    planned = {tensor.name: tensor for tensor in found.plan_tensors}
    told = found.details["errors"]["model.embed_tokens" if tied else "lm_head"]
    assert told["refit"] < 0.99 * told["cut"]
    names = ["model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])]
    cut = child(source.fitted, found.part).cuts
    moves = {name: not torch.equal(values(planned[name].compute, source), values(cut[name], source)) for name in names}
    wanted = {"model.embed_tokens.weight": False, "model.norm.weight": tied, "lm_head.weight": True}
    assert moves == {name: wanted[name] for name in moves}
    ids = TEXT.reshape(-1, 24)[:16]
    with_head = off(found, source, tmp_path / "out", ids)
    monkeypatch.setattr(slicing, "refit_head", lambda *_, **__: None)
    assert with_head < off(made(source, {"dim": 24}, refit=True), source, tmp_path / "out", ids)


@pytest.mark.parametrize(
    ("family", "sizes", "options", "message"),
    [
        ("gpt2", {"dim": 24, "heads": 3, "kv_heads": 3}, {"norm": "masked"}, "take off the mean"),
        ("gpt2", {"dim": 24, "heads": 3, "kv_heads": 3}, {"norm": "masked", "order": "pca"}, "take off the mean"),
        ("llama", {"ffn": 40}, {"refit": True, "text": TEXT[:24]}, "24 tokens of calibration"),
    ],
)
def test_refusals_come_before_any_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, sizes: dict[str, int], options: Any, message: str
) -> None:
    def passed(*_: Any, **__: Any) -> None:
        raise AssertionError("the text was run")

    source = opened(make_checkpoint(tmp_path / "model", family))
    monkeypatch.setattr(slicing, "look", passed)
    with pytest.raises(TltError, match=message):
        made(source, sizes, **options)
    with pytest.raises(AssertionError, match="the text was run"):
        made(source, sizes)


def test_short_texts_are_refused(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path / "model", "llama"))
    with pytest.raises(TltError, match="24 tokens of calibration cannot tell the 40 inputs"):
        made(source, {"ffn": 40}, refit=True, text=TEXT[:24])
    made(source, {"ffn": 40}, text=TEXT[:24])


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path / "model", "qwen3"))
    for name, text in (("one", TEXT), ("two", TEXT), ("three", TEXT.flip(0))):
        written(made(source, joint("qwen3"), refit=True, text=text), source, tmp_path / name)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
