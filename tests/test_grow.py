"""Growing keeps the function, can be undone, and leaves no new coordinate dead: for every family, axis and method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import Source, grow_to, opened, planned, stock_distance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import fit
from tlt_cli.model.compare import compare
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery import noise as noise_module
from tlt_cli.surgery import widen
from tlt_cli.surgery.arrows import METHODS
from tlt_cli.surgery.grow import Recipe, grown_places, widening
from tlt_cli.surgery.targets import Sizes, current, resolve
from tlt_cli.surgery.verify import planned_decoder, sample_tokens, verify

BOUND = 2e-5
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

# Sizes as factors of the source's: whole and not, one axis at a time and all together.
GROUPED: dict[str, dict[str, float]] = {
    "dim": {"dim": 1.25},
    "dim doubled": {"dim": 2},
    "ffn": {"ffn": 1.2},
    "heads": {"heads": 2},
    "kv heads": {"kv_heads": 2},
    "heads and kv heads": {"heads": 2, "kv_heads": 2},
    "heads uneven": {"dim": 1.5, "heads": 1.5, "kv_heads": 1.5},
    "head dim": {"head_dim": 1.5},
    "head dim doubled": {"head_dim": 2},
    "layers": {"layers": 2},
    "vocab": {"vocab": 1.1},
    "all": {"dim": 1.5, "ffn": 1.45, "heads": 1.5, "kv_heads": 1.5, "head_dim": 1.5, "layers": 1.5, "vocab": 1.05},
}
UNGROUPED: dict[str, dict[str, float]] = {  # every query head has a key/value head, and heads times head_dim is dim
    "dim": {"dim": 1.25},
    "dim doubled": {"dim": 2},
    "ffn": {"ffn": 1.2},
    "heads": {"dim": 1.5, "heads": 1.5},
    "head dim": {"dim": 1.5, "head_dim": 1.5},
    "head dim doubled": {"dim": 2, "head_dim": 2},
    "layers": {"layers": 2},
    "vocab": {"vocab": 1.1},
    "all": {"dim": 2.25, "ffn": 1.45, "heads": 1.5, "head_dim": 1.5, "layers": 1.5, "vocab": 1.05},
}
CASES = [(family, case) for family in ZOO for case in (UNGROUPED if family == "gpt2" else GROUPED)]


def sizes_of(source: Source, case: str) -> dict[str, int]:
    factors = (GROUPED if "group" in source.fitted.sizes else UNGROUPED)[case]
    old = current(source.fitted)
    return {name: int(old[name] * factor) for name, factor in factors.items()}


def refuses(source: Source, recipe: Recipe, **sizes: int) -> bool:
    """Rotations exist only where no norm stands behind a block, and for LayerNorm only with a spare direction."""
    if recipe.method != "rotate":
        return False
    if any(role.endswith("post_norm") for role in source.fitted.family.roles):
        return True
    return source.fitted.family.rules["norm"] == "layer" and "dim" not in sizes


@both_ways
@pytest.mark.parametrize(("family", "case"), CASES)
def test_every_axis_keeps_the_function(tmp_path: Path, family: str, tied: bool, case: str) -> None:
    source = opened(make_checkpoint(tmp_path / "source", family, tied))
    logits, sizes = stock_logits(source.folder, some_ids()), sizes_of(source, case)
    for method in METHODS if case in ("dim", "all") else METHODS[:2]:
        recipe = Recipe(method=method)
        if refuses(source, recipe, **sizes):
            with pytest.raises(TltError, match="--method rotate"):
                planned(source, recipe, **sizes)
            continue
        out = grow_to(tmp_path / method, source, recipe, **sizes)
        assert stock_distance(out, logits) <= BOUND, method
        config = json.loads((out / "config.json").read_text())
        assert config.get("tie_word_embeddings", tied) is (tied and method != "rotate")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_sizes_a_family_can_have(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(list(ZOO)))
    folder = tmp_path_factory.mktemp("any")
    source = opened(make_checkpoint(folder / "source", family, data.draw(st.booleans())))
    old = current(source.fitted)
    ceiling = {"dim": 100, "ffn": 130, "heads": 12, "kv_heads": 12, "head_dim": 40, "layers": 7, "vocab": 130}
    names = data.draw(st.lists(st.sampled_from(sorted(old)), min_size=1, unique=True))
    sizes = {name: data.draw(st.integers(old[name], ceiling[name]), label=name) for name in names}
    recipe = Recipe(
        method=data.draw(st.sampled_from(METHODS)), noise=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        split=data.draw(st.sampled_from([0.5, 0.7])), fill=data.draw(st.sampled_from([None, "spectral"])),
    )  # fmt: skip
    try:
        out = grow_to(folder / "grown", source, recipe, **sizes)
    except TltError as refused:
        assert "\n" not in str(refused)
        return
    assert stock_distance(out, stock_logits(source.folder, some_ids())) <= 2 * BOUND


@everywhere
@both_ways
def test_float64_is_exact_to_its_own_rounding(tmp_path: Path, family: str, tied: bool) -> None:
    """Judged by our decoder, for transformers' RMSNorm computes in float32 whatever the weights are."""
    source = opened(make_checkpoint(tmp_path, family, tied, dtype=torch.float64))
    plan = planned(source, **sizes_of(source, "all"))[1]
    new = planned_decoder(plan, fit(plan.shapes, plan.config), source.checkpoint, dtype=torch.float64)
    old = load_checkpoint(source.checkpoint, source.fitted, dtype=torch.float64)
    ids = sample_tokens(source.fitted)
    assert compare(old, new, ids).relative < 1e-12
    assert verify(source.fitted, plan, source.checkpoint, ids).holds


# --- law 2: what was grown can be taken back ---------------------------------------------------------------------


def taken_back(source: Source, recipe: Recipe, out: Path, **sizes: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per old tensor: what the inverse map makes of the grown one, and what it was."""
    growth, _ = planned(source, recipe, **sizes)
    new, found = load_file(grow_to(out, source, recipe, **sizes) / "model.safetensors"), {}
    for name, place, layer in grown_places(growth):
        if layer is None or not growth.layers.silent[layer]:
            back = widen.narrow(widening(growth, name, place, layer), new[name])
            found[name] = back, source.checkpoint.read(place.name)
    return found


@everywhere
@both_ways
@pytest.mark.parametrize("method", METHODS[:3])
def test_the_inverse_map_gives_the_weights_back(tmp_path: Path, family: str, tied: bool, method: str) -> None:
    source = opened(make_checkpoint(tmp_path / "source", family, tied))
    for name, (back, old) in taken_back(
        source, Recipe(method=method), tmp_path / "out", **sizes_of(source, "all")
    ).items():
        assert back.shape == old.shape
        assert (back - old).abs().max() <= 1e-5 * old.abs().max(), name


@everywhere
@both_ways
@pytest.mark.parametrize(("method", "noise"), [("identity", 1.0), ("duplicate", 0.0)])
def test_bit_for_bit_where_scales_are_powers_of_two(
    tmp_path: Path, family: str, tied: bool, method: str, noise: float
) -> None:
    source = opened(make_checkpoint(tmp_path / "source", family, tied))
    dim = 4 * current(source.fitted)["dim"]  # identity scales by sqrt(4) = 2
    back = taken_back(source, Recipe(method=method, noise=noise), tmp_path / "out", dim=dim)
    offset = "gain_offset" in source.fitted.family.rules
    for name, (new, old) in back.items():
        if name == "model.norm.weight" and tied and offset:  # 1 + w is halved, and w alone is stored: it loses a bit
            assert torch.allclose(new, old, atol=1e-6)
        else:
            assert torch.equal(new, old), name


def test_a_wrong_map_does_not_give_them_back(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path / "source", "llama"))
    dim = 2 * current(source.fitted)["dim"]
    growth, _ = planned(source, Recipe(split=0.7), dim=dim)
    other, _ = planned(source, Recipe(method="identity"), dim=dim)
    new = load_file(grow_to(tmp_path / "out", source, Recipe(split=0.7), dim=dim) / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    place, old = growth.fit.places[name], source.checkpoint.read(name)
    assert torch.allclose(widen.narrow(widening(growth, name, place, 1), new[name]), old, atol=1e-5)
    assert (widen.narrow(widening(other, name, place, 1), new[name]) - old).abs().max() > 0.1


# --- law 3: no new coordinate is dead ----------------------------------------------------------------------------


def dead(folder: Path) -> list[str]:
    """Rows and columns of matrices, and entries of vectors, whose gradient is zero at both of two steps.

    Zero is what rounding leaves of it: 1e-10 of the tensor's largest. Two kinds are left out because no model learns
    them: rows of tokens that no sequence holds, and biases of keys, which add the same to every score of a softmax.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    vocab = model.config.vocab_size
    ids = torch.stack([torch.randperm(vocab, generator=torch.Generator().manual_seed(s))[:60] for s in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    seen: dict[str, torch.Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            seen[name] = seen.get(name, 0) + parameter.grad.abs()
        optimizer.step()
    found = []
    for name, size in seen.items():
        sides = [1] if "embed" in name or "wte" in name or "wpe" in name else range(size.dim())
        fused = name.endswith("c_attn.bias")
        kept = torch.cat([size.chunk(3)[0], size.chunk(3)[2]]) if fused else size
        for side in sides if not name.endswith("k_proj.bias") else []:
            largest = kept.movedim(side, 0).reshape(kept.shape[side], -1).amax(1)
            found += [f"{name} dim {side}"] if largest.min() < 1e-10 * kept.max() else []
    return found


@everywhere
@pytest.mark.parametrize("method", METHODS)
def test_no_new_coordinate_is_dead(tmp_path: Path, family: str, method: str) -> None:
    source = opened(make_checkpoint(tmp_path / "source", family))
    for case in ("dim", "all"):
        sizes = sizes_of(source, case)
        if not refuses(source, Recipe(method=method), **sizes):
            assert not dead(grow_to(tmp_path / "grown", source, Recipe(method=method), **sizes)), case


@everywhere
def test_without_noise_they_are(tmp_path: Path, family: str) -> None:
    source = opened(make_checkpoint(tmp_path / "source", family))
    assert len(dead(grow_to(tmp_path / "grown", source, Recipe(method="identity", fill="zero"), dim=64))) > 5


@pytest.mark.parametrize("fill", ["random", "spectral", "zero"])
def test_copies_part_where_there_is_noise(tmp_path: Path, fill: str) -> None:
    """Even doubling without noise stays two equal halves for ever; a spectral fill must not keep that symmetry."""
    source = opened(make_checkpoint(tmp_path / "source", "llama"))
    folder = grow_to(tmp_path / "grown", source, Recipe(fill=fill), dim=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        ids = some_ids(seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    first, second = model.model.embed_tokens.weight.detach().split(32, dim=1)
    apart = float((first - second).abs().max())
    assert apart < 1e-9 if fill == "zero" else apart > 1e-3


def test_noise_spares_the_entries_that_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained models have a few huge entries behind small weights; noise of one size for all would be heard."""
    folder = make_checkpoint(tmp_path / "source", "llama")
    tensors = load_file(folder / "model.safetensors")
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(3):
        for norm, names in readers.items():
            tensors[f"model.layers.{layer}.{norm}.weight"][3] *= 256
            for name in names:
                tensors[f"model.layers.{layer}.{name}.weight"][:, 3] /= 256
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source, logits = opened(folder), stock_logits(folder, some_ids())
    assert stock_distance(grow_to(tmp_path / "grown", source, dim=64), logits) <= BOUND
    monkeypatch.setattr(widen, "spread_of", lambda rows: noise_module.Spread(float(rows.std())))
    assert stock_distance(grow_to(tmp_path / "wrong", source, dim=64), logits) > 100 * BOUND


# --- depth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "order"), [("stack", [0, 1, 2, 0, 1]), ("interpose", [0, 0, 1, 1, 2])])
def test_other_depths_are_what_they_say_and_say_that_they_change(tmp_path: Path, depth: str, order: list[int]) -> None:
    source = opened(make_checkpoint(tmp_path / "source", "llama"))
    _, plan = planned(source, Recipe(depth=depth), layers=5)
    assert plan.details["layers"] == order and not plan.exact
    assert any("does not keep the function" in note for note in plan.notes)
    new = load_file(grow_to(tmp_path / "grown", source, Recipe(depth=depth), layers=5) / "model.safetensors")
    for layer, old in enumerate(order):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(new[name.format(layer)], source.checkpoint.read(name.format(old)))
    assert stock_distance(tmp_path / "grown", stock_logits(source.folder, some_ids())) > 0.1


def test_a_block_pattern_that_no_list_can_say_is_refused(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path / "source", "llama"))
    config = {**source.fitted.config, "layer_scales": [1.0, 2.0, 3.0]}
    fitted = replace(source.fitted, config=config)
    with pytest.raises(TltError, match="lists layer_scales layer by layer"):
        planned(Source(source.folder, source.checkpoint, fitted), layers=5)


def test_dynamic_rotation_is_refused_by_name(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    source = opened(make_checkpoint(tmp_path / "source", "llama", rope_parameters=rope))
    with pytest.raises(TltError, match="dynamically"):
        planned(source, head_dim=12)
    planned(source, dim=64)


# --- sizes -------------------------------------------------------------------------------------------------------


def targets(source: Source, **sizes: int) -> dict[str, int]:
    return current(replace(source.fitted, sizes=resolve(source.fitted, Sizes(**sizes)).sizes))


def test_a_new_width_takes_what_it_can_along(tmp_path: Path) -> None:
    source = opened(make_checkpoint(tmp_path, "llama"))  # dim 32, ffn 48, 4 heads of 8 over 2
    old = current(source.fitted)
    assert targets(source, dim=64) == {**old, "dim": 64, "ffn": 96, "heads": 8, "kv_heads": 4}
    assert targets(source, dim=40) == {**old, "dim": 40, "ffn": 60, "heads": 4}
    assert targets(source, dim=64, heads=4) == {**old, "dim": 64, "ffn": 96}
    assert targets(source, dim=64, ffn=50) == {**old, "dim": 64, "ffn": 50, "heads": 8, "kv_heads": 4}
    notes = resolve(source.fitted, Sizes(dim=36)).notes
    assert any("heads stays 4" in note for note in notes) and any("kv_heads stays 2" in note for note in notes)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("llama", {"dim": 16}, "smaller than the model's 32"),
        ("llama", {"dim": 33}, "nearest that work: --to-dim 36"),
        ("llama", {"heads": 6, "kv_heads": 4}, "6 query heads do not split among 4 key/value heads"),
        ("llama", {"heads": 6}, "must be a multiple of it"),
        ("llama", {"head_dim": 9}, "odd"),
        ("llama", {"dim": 32}, "already has the sizes"),
        ("gpt2", {"dim": 33}, "nearest that work: --to-dim 36"),
        ("gpt2", {"heads": 8}, "say --to-dim 64 too"),
        ("gpt2", {"head_dim": 16}, "say --to-dim 64 too"),
        ("gpt2", {"kv_heads": 8}, "say --to-heads alone"),
    ],
)
def test_sizes_a_family_cannot_have(tmp_path: Path, family: str, sizes: dict[str, int], message: str) -> None:
    source = opened(make_checkpoint(tmp_path, family))
    with pytest.raises(TltError, match=message):
        planned(source, **sizes)


def test_bad_recipes() -> None:
    for wrong in (
        {"method": "tile"},
        {"fill": "ones"},
        {"noise": -1.0},
        {"split": 1.0},
        {"depth": "dus"},
        {"seed": -1},
    ):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
            Recipe(**wrong)  # type: ignore[arg-type]


def test_levels_stay_behind(tmp_path: Path) -> None:
    """What grows is no longer the model that its levels were trained in; its record keeps them for the way back."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    levels = {"norm": "sliced", "levels": [{"dim": 16, "ffn": 24, "heads": 2, "kv_heads": 1}]}
    assert "nested" not in planned(opened(folder), dim=64)[1].details["was"]
    (folder / "config.json").write_text(json.dumps({**config, "nested": levels}))
    plan = planned(opened(folder), dim=64)[1]
    assert "nested" not in plan.config and plan.details["was"]["nested"] == levels
    assert any("nested" in note for note in plan.notes)
