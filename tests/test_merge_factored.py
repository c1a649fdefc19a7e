"""Models that store matrices as factors lie side by side as any others: their mean, each back as it was, and folded."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factored import MIX, WAYS, Case, How, apart, case, case_of, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import Source, opened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import Merged, merged, same_bits, taken_out, weights_of
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tlt_cli.checkpoint.together import together
from tlt_cli.checkpoint.writer import write
from tlt_cli.cli import app
from tlt_cli.errors import TltError
from tlt_cli.families import fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.modeling import DESCRIPTION, MODELING, modeling_source
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery import merge as surgery
from tlt_cli.surgery.fold import fold
from tlt_cli.surgery.fold_glue import fold_glue
from tlt_cli.surgery.fold_parts import fold_parts
from tlt_cli.surgery.glue import glued
from tlt_cli.surgery.lowrank import factored_plan
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.stock_layout import stock_layout
from tlt_cli.surgery.unmerge import alone

BOUND = 1e-5  # of the logits' deviation, float32
WRONG = 1e-1  # what a wrong variant must miss by
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
pytestmark = pytest.mark.usefixtures("modules_cache")

SOME = {0: How(0.3), 1: How(0.6, roles=frozenset({"key", "down"})), 2: How(0.4, neurons=40), 3: How(0.5)}
# Models of one family that differ in their sizes, the first two of them factored.
UNLIKE: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12},
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 5, "intermediate_size": 56},
    ],
    "gemma3": [{}, {"hidden_size": 48, "head_dim": 8, "query_pre_attn_scalar": 7}, {}],
    "gpt2": [{"n_embd": 48, "n_head": 6}, {"n_layer": 2, "n_head": 8}, {}],
}


def run(folder: Path, **options: Any) -> Decoder:
    source = opened(folder)
    return load_checkpoint(source.checkpoint, source.fitted, **options)


def written(plan: Plan, source: Source, folder: Path) -> Path:
    files = {MODELING: modeling_source()} if "auto_map" in plan.config else {}
    write(
        folder, plan.tensors, source.checkpoint, config=plan.config, metadata={"format": "pt"}, files=files, jobs=1
    )  # fmt: skip
    return folder


def cases(
    folder: Path, family: str, tied: bool = False, ways: Sequence[Mapping[int, How]] = (MIX, SOME), **options: Any
) -> list[Case]:
    """Factored models, each with weights of its own."""
    return [
        case(folder / f"whole{at}", family, way, tied=tied, seed=at, **options) for at, way in enumerate(ways)
    ]  # fmt: skip


def factored(folder: Path, made: Sequence[Case]) -> list[Source]:
    return [opened(one.write(folder / f"factored{at}")) for at, one in enumerate(made)]


def sources_of(parts: Sequence[Source]) -> list[surgery.Source]:
    return [surgery.Source(part.fitted, part.dtypes, part.folder.name, "0" * 64) for part in parts]


def mean(folders: Sequence[Path], weights: Sequence[float]) -> Tensor:
    """The weighted mean of what stock transformers says of plain models."""
    each = [weight * stock_logits(folder, some_ids()) for weight, folder in zip(weights, folders, strict=True)]
    return sum(each, start=torch.zeros(()))


def trio(folder: Path, family: str, tied: bool, **options: Any) -> tuple[Merged, Tensor]:
    """Two factored models and a plain one, merged; and their mean by the products multiplied out elsewhere."""
    made, shares = cases(folder, family, tied, **options), [0.5, 0.3, 0.2]
    plain = make_checkpoint(folder / "plain", family, tied, seed=2)
    one = merged(folder / "merged", [*factored(folder, made), opened(plain)], shares)
    dense = [one.dense(folder / f"dense{at}") for at, one in enumerate(made)]
    return one, mean([*dense, plain], shares)


@pytest.fixture(scope="module", params=[(family, tied) for family in ZOO for tied in (True, False)], ids=str)
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Merged, Tensor, Path]:
    """Merged models of every family, their mean, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("three")
    return *trio(folder, *request.param), folder


Three = tuple[Merged, Tensor, Path]


@torch.no_grad()
def test_it_computes_the_mean(three: Three) -> None:
    """Ranks, shared right factors, rows kept as they are and neurons are each model's own; others are plain."""
    one, wanted, folder = three
    decoder, ids = run(one.folder), some_ids()
    assert apart(decoder(ids), wanted) <= BOUND
    assert apart(run(one.folder, stream=True)(ids), wanted) <= BOUND
    assert apart(remote(one.folder)(ids).logits, wanted) <= BOUND
    whole = [folder / "whole0", folder / "whole1", folder / "plain"]
    assert apart(decoder(ids), mean(whole, one.weights)) >= WRONG, "that models are factored must show"
    double = {"dtype": torch.float64}
    each = [weight * run(part.folder, **double)(ids) for weight, part in zip(one.weights, one.parts, strict=True)]
    assert apart(run(one.folder, **double)(ids), sum(each, start=torch.zeros(()))) <= 1e-12


def test_each_comes_back_bit_for_bit(three: Three, tmp_path: Path) -> None:
    one, source = three[0], opened(three[0].folder)
    for number, part in enumerate(one.parts):
        back = taken_out(source, number, tmp_path / f"back{number}")
        assert same_bits(back.folder, part.folder)
        assert back.checkpoint.config == part.checkpoint.config
    assert not same_bits(tmp_path / "back0", one.parts[1].folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_every_way_of_storing(tmp_path: Path, family: str, way: str) -> None:
    """Where all store alike the merged file holds the numbers of its models and no other."""
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    made = cases(tmp_path, family, ways=[WAYS[way]] * 2, **biases)
    one = merged(tmp_path / "merged", factored(tmp_path, made))
    wanted = mean([each.dense(tmp_path / f"dense{at}") for at, each in enumerate(made)], one.weights)
    assert apart(run(one.folder, stream=True)(some_ids()), wanted) <= BOUND
    assert apart(remote(one.folder)(some_ids()).logits, wanted) <= BOUND
    sizes = [sum(tensor.numel() for tensor in weights_of(part.folder).values()) for part in one.parts]
    if way != "shared and pivoted":  # which rows are kept of which matrix is each model's own
        assert one.plan.parameters == sum(sizes)
    assert sum(sizes) <= one.plan.parameters <= 1.2 * sum(sizes)
    for number, part in enumerate(one.parts):
        assert same_bits(taken_out(opened(one.folder), number, tmp_path / f"back{number}").folder, part.folder)


@pytest.mark.parametrize("family", UNLIKE)
@both_ways
@torch.no_grad()
def test_unlike_models(tmp_path: Path, family: str, tied: bool) -> None:
    sizes = UNLIKE[family]
    made = [
        case(tmp_path / f"whole{at}", family, {**SOME, 2: How(0.4)}, tied=tied, seed=at, **own)
        for at, own in enumerate(sizes[:2])
    ]
    plain = make_checkpoint(tmp_path / "plain", family, tied, seed=2, **sizes[2])
    one = merged(tmp_path / "merged", [*factored(tmp_path, made), opened(plain)])
    wanted = mean([*(each.dense(tmp_path / f"dense{at}") for at, each in enumerate(made)), plain], one.weights)
    assert apart(run(one.folder)(some_ids()), wanted) <= BOUND
    assert apart(run(one.folder, stream=True)(some_ids()), wanted) <= BOUND
    assert apart(remote(one.folder)(some_ids()).logits, wanted) <= BOUND
    for number, part in enumerate(one.parts):
        assert same_bits(taken_out(opened(one.folder), number, tmp_path / f"back{number}").folder, part.folder)
    source = opened(one.folder)
    folded = written(fold_parts(source.fitted, source.dtypes), source, tmp_path / "folded")
    assert apart(run(folded)(some_ids()), wanted) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@both_ways
@torch.no_grad()
def test_embeddings_and_heads(tmp_path: Path, family: str, tied: bool) -> None:
    only = ["*.wte" if family == "gpt2" else "*.embed_tokens", *([] if tied else ["lm_head"])]
    one, wanted = trio(tmp_path, family, tied, ways=[WAYS["plain"], dict.fromkeys(range(4), How(0.7))], only=only)
    assert apart(run(one.folder)(some_ids()), wanted) <= BOUND
    assert apart(run(one.folder, stream=True)(some_ids()), wanted) <= BOUND
    assert apart(remote(one.folder)(some_ids()).logits, wanted) <= BOUND
    headless = transformers.AutoModel.from_pretrained(one.folder, trust_remote_code=True)
    stream = remote(one.folder)(some_ids(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(headless(some_ids()).last_hidden_state, stream)
    source = opened(one.folder)
    for number, part in enumerate(one.parts):
        assert same_bits(taken_out(source, number, tmp_path / f"back{number}").folder, part.folder)
        for streams in (True, False):
            place = source.checkpoint, source.fitted, number, torch.float32, torch.device("cpu")
            assert torch.equal(alone(*place, stream=streams)(some_ids()), run(part.folder, stream=streams)(some_ids()))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@torch.no_grad()
def test_any_ranks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    family, tied = data.draw(st.sampled_from(["llama", "qwen2", "gpt2"])), data.draw(st.booleans())
    roles = st.sampled_from([None, frozenset({"query", "up"}), frozenset({"value", "down"}), frozenset[str]()])
    hows = st.builds(
        How, share=st.floats(0.05, 1.0), shared=st.booleans(), pivoted=st.booleans(), neurons=st.integers(8, 48),
        roles=roles,
    )  # fmt: skip
    ways = [
        data.draw(st.fixed_dictionaries(dict.fromkeys(range(3), hows))) for _ in range(data.draw(st.integers(2, 3)))
    ]
    one = merged(folder / "merged", factored(folder, cases(folder, family, tied, ways)))
    source, double = opened(one.folder), {"dtype": torch.float64}
    each = [
        weight * run(part.folder, **double)(some_ids()) for weight, part in zip(one.weights, one.parts, strict=True)
    ]
    assert apart(run(one.folder, **double)(some_ids()), sum(each, start=torch.zeros(()))) <= 1e-12
    for number, part in enumerate(one.parts):
        assert same_bits(taken_out(source, number, folder / f"back{number}").folder, part.folder)


def coded(folder: Path, made: Case) -> Source:
    """The case with its factors as codes."""
    source, factors = made.source, made.factors.__getitem__
    plan = factored_plan(source.fitted, source.dtypes, made.factored, factors, ffn=made.kept, bits=8)
    return opened(replace(made, plan=plan).write(folder))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_codes(tmp_path: Path, family: str) -> None:
    made = cases(tmp_path, family, ways=[MIX, WAYS["plain"]])
    plain = opened(make_checkpoint(tmp_path / "plain", family, seed=2))
    one = merged(tmp_path / "merged", [*(coded(tmp_path / f"coded{at}", each) for at, each in enumerate(made)), plain])
    each = [weight * run(part.folder)(some_ids()) for weight, part in zip(one.weights, one.parts, strict=True)]
    wanted = sum(each, start=torch.zeros(()))
    assert apart(run(one.folder)(some_ids()), wanted) <= BOUND
    assert apart(run(one.folder, stream=True)(some_ids()), wanted) <= BOUND
    assert apart(remote(one.folder)(some_ids()).logits, wanted) <= BOUND
    for number, part in enumerate(one.parts):
        assert same_bits(taken_out(opened(one.folder), number, tmp_path / f"back{number}").folder, part.folder)
    source = opened(one.folder)
    folded = written(fold_parts(source.fitted, source.dtypes), source, tmp_path / "folded")
    assert apart(run(folded)(some_ids()), wanted) <= BOUND
    assert {tensor.dtype for tensor in weights_of(folded).values()} == {torch.float32}


# --- what is done with them ------------------------------------------------------------------------------------


@torch.no_grad()
def test_folded_is_the_merge_of_what_is_folded(three: Three, tmp_path: Path) -> None:
    one, wanted, _ = three
    source = opened(one.folder)
    folded = written(fold_parts(source.fitted, source.dtypes), source, tmp_path / "folded")
    each = [
        part if part.fitted.lowrank is None
        else opened(written(fold(part.fitted, part.dtypes), part, tmp_path / f"folded{at}"))
        for at, part in enumerate(one.parts)
    ]  # fmt: skip
    again = merged(tmp_path / "again", each, one.weights)
    assert same_bits(folded, again.folder)
    assert apart(run(folded)(some_ids()), wanted) <= BOUND
    assert not any("lowrank" in part for part in json.loads((folded / "config.json").read_text())["groups"]["parts"])
    with pytest.raises(TltError, match="nothing to fold"):
        fold_glue(opened(folded).fitted, opened(folded).dtypes)


@pytest.mark.parametrize("kind", ["lowrank", "full", "blocks"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_glue_between_them(tmp_path: Path, family: str, kind: str) -> None:
    """It mixes what factors read, shared ones too; folded are the factors first, and then the glue."""
    ways = {layer: replace(way, neurons=48) for layer, way in MIX.items()}
    parts = factored(tmp_path, cases(tmp_path, family, ways=[ways, ways]))
    plan = glued(surgery.merge(sources_of(parts)), kind, rank=3 if kind == "lowrank" else None)
    folder = tmp_path / "glued"
    write(
        folder, plan.tensors, together([part.checkpoint for part in parts]), config=plan.config,
        metadata={"format": "pt"}, files={MODELING: modeling_source()}, jobs=1,
    )  # fmt: skip
    idle, generator = run(folder)(some_ids()), torch.Generator().manual_seed(3)
    loud = {
        name: 0.5 * torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        if ".glue" in name
        else tensor
        for name, tensor in weights_of(folder).items()
    }
    save_file(loud, folder / "model.safetensors", {"format": "pt"})
    wanted, source = run(folder)(some_ids()), opened(folder)
    assert apart(idle, wanted) >= WRONG
    assert apart(remote(folder)(some_ids()).logits, wanted) <= BOUND
    with pytest.raises(TltError, match="tlt fold"):
        fold_glue(source.fitted, source.dtypes)
    plain = opened(written(fold_parts(source.fitted, source.dtypes), source, tmp_path / "plain"))
    assert plain.fitted.groups is not None and plain.fitted.groups.glue == source.fitted.groups.glue  # type: ignore[union-attr]
    assert apart(run(plain.folder)(some_ids()), wanted) <= BOUND
    dense = written(fold_glue(plain.fitted, plain.dtypes), plain, tmp_path / "dense")
    assert apart(run(dense)(some_ids()), wanted) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_merged_of_merged(tmp_path: Path, family: str) -> None:
    parts = factored(tmp_path, cases(tmp_path, family, ways=[MIX, SOME, WAYS["shared"]]))
    parts.append(opened(make_checkpoint(tmp_path / "plain", family, seed=7)))
    inner = [merged(tmp_path / f"inner{at}", parts[at : at + 2], [0.25, 0.75]) for at in (0, 2)]
    outer = merged(tmp_path / "outer", [opened(one.folder) for one in inner], [0.5, 0.5])
    flat = merged(tmp_path / "flat", parts, [0.125, 0.375, 0.125, 0.375])
    assert same_bits(outer.folder, flat.folder)
    assert torch.equal(run(outer.folder)(some_ids()), run(flat.folder)(some_ids()))
    for number, part in enumerate(parts):
        assert same_bits(taken_out(opened(outer.folder), number, tmp_path / f"back{number}").folder, part.folder)


@torch.no_grad()
def test_names_with_a_prefix_and_without(tmp_path: Path) -> None:
    """The factored model is the checkpoint of a bare decoder, and the plain one is not."""
    plain = opened(make_checkpoint(tmp_path / "plain", "llama", True, seed=1))
    case(tmp_path / "whole", "llama", MIX, tied=True)
    file = tmp_path / "whole" / "model.safetensors"
    bare = {name.removeprefix("model."): value for name, value in weights_of(tmp_path / "whole").items()}
    save_file(bare, file, {"format": "pt"})
    made = case_of(opened(tmp_path / "whole"), MIX)
    one = merged(tmp_path / "merged", [plain, opened(made.write(tmp_path / "factored"))])
    each = [0.5 * run(part.folder)(some_ids()) for part in one.parts]
    assert apart(run(one.folder)(some_ids()), sum(each, start=torch.zeros(()))) <= BOUND
    back = taken_out(opened(one.folder), 1, tmp_path / "back")
    stored = {name.removeprefix("model."): value for name, value in weights_of(back.folder).items()}
    assert stored.keys() == weights_of(one.parts[1].folder).keys()
    assert all(torch.equal(stored[name], value) for name, value in weights_of(one.parts[1].folder).items())


def test_training_leaves_what_fills_up_at_zero(three: Three) -> None:
    """And moves every number that a model has."""
    one, _, _ = three
    decoder = run(one.folder)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        ids = some_ids(seed=step)
        loss = torch.nn.functional.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in decoder.named_parameters():
        own = before[name] != 0
        assert not bool(parameter[~own].any()), name
        assert not own.any() or (parameter[own] != before[name][own]).float().mean() > 0.5, name
    assert {name for name in decoder.stored if decoder.stored[name].dim() == 2} == decoder.vectors


@torch.no_grad()
def test_an_adapter_beside_it(tmp_path: Path) -> None:
    one, _ = trio(tmp_path, "llama", False)
    decoder, ids = run(one.folder), some_ids()
    plain = decoder(ids)
    lora = Lora(decoder, updates(decoder, rank=2))
    decoder.adapter = lora
    assert torch.equal(decoder(ids), plain)
    for left in lora.b.values():
        left.normal_()
    assert apart(decoder(ids), plain) >= WRONG


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@torch.no_grad()
def test_transformers_generates_saves_and_copies(tmp_path: Path, family: str) -> None:
    one, wanted = trio(tmp_path, family, True)
    model, ids = remote(one.folder), some_ids()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(one.folder, trust_remote_code=False)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))
    model.save_pretrained(tmp_path / "saved")
    assert same_bits(tmp_path / "saved", one.folder)
    assert apart(run(tmp_path / "saved")(ids), wanted) <= BOUND
    bare = transformers.AutoModel.from_pretrained(one.folder, trust_remote_code=True)
    assert bare(ids).last_hidden_state.shape == (*ids.shape, 3 * 32)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other(ids).logits, remote(one.folder)(ids).logits), "a copy has weights of its own"


def test_the_description_is_its_own(tmp_path: Path) -> None:
    one_of, _ = trio(tmp_path, "gpt2", False)
    source, config = opened(one_of.folder), json.loads((one_of.folder / "config.json").read_text())
    description = describe(source.fitted)
    assert json.loads(json.dumps(description)) == description
    told, own = config[DESCRIPTION]["groups"]["parts"], config["groups"]["parts"]
    said = [
        part | {key: one["lowrank"] for key in one if key == "lowrank"} for part, one in zip(told, own, strict=True)
    ]
    assert said == description["groups"]["parts"] and "lowrank" not in said[2]
    assert {name: info.shape for name, info in source.checkpoint.tensors.items()} == one_of.plan.shapes
    assert {name: tuple(tensor.shape) for name, tensor in run(one_of.folder).stored.items()} == one_of.plan.shapes


@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_words_of_another_vocabulary(tmp_path: Path, bits: int | None) -> None:
    """A word that a model lacks is the mean of its words, which factors say as well; codes do not."""
    made = cases(tmp_path, "llama", ways=[WAYS["plain"]] * 2, only=["*.embed_tokens", "lm_head"])
    parts = factored(tmp_path, made) if bits is None else [coded(tmp_path / f"coded{n}", c) for n, c in enumerate(made)]
    order = [*range(96, -1, -1), -1]
    tokens = [[*range(97), -1], order]
    sources = [
        surgery.Source(part.fitted, part.dtypes, part.folder.name, "0" * 64, own)
        for part, own in zip(parts, tokens, strict=True)
    ]
    if bits is not None:
        with pytest.raises(TltError, match="tlt fold"):
            surgery.merge(sources)
        return
    plan = surgery.merge(sources)
    values = together([part.checkpoint for part in parts])
    write(tmp_path / "merged", plan.tensors, values, config=plan.config, metadata={"format": "pt"}, jobs=1)
    ids = some_ids()
    each = [run(parts[0].folder)(ids), run(parts[1].folder)(96 - ids)[..., order[:-1]]]
    assert apart(run(tmp_path / "merged")(ids)[..., :97], (each[0] + each[1]) / 2) <= BOUND


def test_what_fills_up_is_told(tmp_path: Path) -> None:
    one, _ = trio(tmp_path, "llama", False)
    sizes = [sum(tensor.numel() for tensor in weights_of(part.folder).values()) for part in one.parts]
    more = one.plan.parameters - sum(sizes)
    assert more > 0 and any(f"{more:,} of {one.plan.parameters:,} numbers" in note for note in one.plan.notes)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    factored(tmp_path, cases(tmp_path, "llama", vocab_size=300))
    make_checkpoint(tmp_path / "plain", "llama", seed=2, vocab_size=300)
    Path("t.txt").write_text("Once upon a time there was a small model. " * 20)

    def tlt(*words: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*words, "--json"])
        assert result.exit_code == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    made = tlt("merge", "factored0", "factored1", "plain", "--weights", "1/2,1/4,1/4", "-o", "merged")
    assert made["verification"]["relative"] <= BOUND
    seen = tlt("inspect", "merged")
    assert seen["parameters"] == sum(tensor.numel() for tensor in weights_of(tmp_path / "merged").values())
    assert ["lowrank" in part for part in seen["groups"]["parts"]] == [True, True, False]
    axes = {tensor["name"]: tensor["axes"] for tensor in seen["tensors"]}
    assert axes["model.layers.0.self_attn.k_proj.lowrank_a.weight"] == "rank <- hidden"
    assert tlt("slice", "merged", "--block", "2/3", "-o", "back")["verification"]["relative"] <= BOUND
    assert same_bits(tmp_path / "back", tmp_path / "factored1") and (tmp_path / "back" / MODELING).exists()
    tlt("slice", "merged", "--block", "3/3", "-o", "whole")
    assert same_bits(tmp_path / "whole", tmp_path / "plain") and not (tmp_path / "whole" / MODELING).exists()
    folded = tlt("fold", "merged", "-o", "folded")
    assert folded["verification"]["relative"] <= BOUND and (tmp_path / "folded" / MODELING).exists()
    scores = tlt("eval", "merged", "folded", "--data", "t.txt", "--context", "32")["models"]
    assert scores[0]["perplexity"] == pytest.approx(scores[1]["perplexity"], rel=1e-5)
    words = "--data", "t.txt", "--steps", "2", "--context", "16", "--batch-size", "2"
    tlt("train", "merged", *words, "--only", "*lowrank_a*", "-o", "trained")
    before, after = weights_of(tmp_path / "merged"), weights_of(tmp_path / "trained")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("lowrank_a.weight")}
    refused = CliRunner().invoke(app, ["merge", "factored0", "plain", "--layout", "stock", "-o", "stock"])
    assert refused.exit_code == 1 and "tlt fold" in refused.stderr and len(refused.stderr.splitlines()) == 1


# --- what is refused -------------------------------------------------------------------------------------------


def test_what_cannot_lie_side_by_side(tmp_path: Path) -> None:
    made = cases(tmp_path, "llama", ways=[WAYS["pivoted"], WAYS["plain"]])
    wide = opened(make_checkpoint(tmp_path / "wide", "llama", head_dim=16))
    pivoted, plain = factored(tmp_path, made)
    for parts, match in (
        ([pivoted, wide], "rotary=4 and rotary=8.*tlt fold"),
        ([plain, coded(tmp_path / "coded", made[1])], "8-bit codes.*tlt fold"),
        ([plain, coded(tmp_path / "of that name" / plain.folder.name, made[1])], "8-bit codes.*tlt fold"),
    ):
        with pytest.raises(TltError, match=match) as error:
            merged(tmp_path / "merged", parts)
        assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()
    with pytest.raises(TltError, match="--layout stock, of factored1, needs plain matrices: `tlt fold SRC` first"):
        stock_layout(sources_of([plain, plain]))
    narrow = opened(case(tmp_path / "narrow", "llama", WAYS["narrow"]).write(tmp_path / "fewer"))
    with pytest.raises(TltError, match=r"layers of fewer lack neurons.*`tlt fold` fewer first"):
        glued(surgery.merge(sources_of([plain, narrow])), "full")


SLOT = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (3, r"groups.parts\[1\].lowrank must be an object"),
        ({"version": 2}, r"groups.parts\[1\].lowrank has the version 2"),
        ({"ranks": {SLOT: 0}}, rf"groups.parts\[1\].lowrank.ranks.{SLOT} must be a whole number"),
        ({"ranks": {SLOT: 99}}, f"part 2 of groups.*lowrank gives {SLOT} the rank 99"),
        ({"ranks": {SLOT: 4}}, r"lowrank_a.weight is \[2, 16, 48\], but .* in 1 groups"),
        ({"ranks": {"model.layers.9.self_attn.q_proj": 4}}, r"layers.9.self_attn.q_proj.\w+.weight is missing"),
        ({"ranks": {"model.norm": 4}}, "model.norm"),
        ({"shared": {SLOT: SLOT}}, rf"groups.parts\[1\].lowrank.shared.{SLOT}"),
        ({"pivoted": {SLOT: [0, 99]}}, rf"groups.parts\[1\].lowrank.pivoted.{SLOT}"),
        ({"ffn": {"7": 40}}, "part 2 of groups.*40 for layer 7"),
        ({"bits": 8}, "scale is missing"),
    ],
)
def test_broken_configs(tmp_path: Path, change: Any, match: str) -> None:
    one = merged(tmp_path / "merged", factored(tmp_path, cases(tmp_path, "llama", ways=[WAYS["plain"]] * 2)))
    path = one.folder / "config.json"
    config = json.loads(path.read_text())
    own = config["groups"]["parts"][1]["lowrank"]
    config["groups"]["parts"][1]["lowrank"] = {**own, **change} if isinstance(change, dict) else change
    path.write_text(json.dumps(config))
    with pytest.raises(TltError, match=match) as error:
        opened(one.folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gone", "other", "dense"])
def test_broken_stacks(tmp_path: Path, kind: str) -> None:
    one, _ = trio(tmp_path, "llama", False, ways=[WAYS["plain"]] * 2)
    tensors = weights_of(one.folder)
    name = f"{SLOT}.lowrank_a.weight"
    if kind == "gone":
        del tensors[name]
    elif kind == "other":
        tensors[name] = tensors[name][:1].contiguous()
    else:
        name = f"{SLOT}.weight"
        assert tensors[name].shape == (1, 32, 32)
        tensors[name] = tensors[name].repeat(3, 1, 1)
    save_file(tensors, one.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TltError, match=name):
        opened(one.folder)
    with pytest.raises((ValueError, RuntimeError)):
        remote(one.folder)


@pytest.mark.parametrize("stream", [True, False])
@torch.no_grad()
def test_row_numbers_that_are_none(tmp_path: Path, stream: bool) -> None:
    one, _ = trio(tmp_path, "llama", False, ways=[WAYS["pivoted"]] * 2)
    tensors = weights_of(one.folder)
    name = f"{SLOT}.lowrank_rows"
    tensors[name][1, :2] = torch.tensor([3, 1])
    save_file(tensors, one.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TltError, match="lowrank_rows must number rows"):
        run(one.folder, stream=stream)(some_ids())
    with pytest.raises(ValueError, match="lowrank_rows must number rows"):
        remote(one.folder)


def test_sizes_without_values(tmp_path: Path) -> None:
    """Shapes and config.json are enough to know every tensor's arrow."""
    one, _ = trio(tmp_path, "gpt2", False)
    fitted = fit(one.plan.shapes, one.plan.config)
    for name, place in fitted.places.items():
        assert one.plan.shapes[name][0] == len(fitted.holders[name])
        assert prod(one.plan.shapes[name][1:]) == prod(
            prod(size if isinstance(size, int) else fitted.sizes_of(place)[size] for size in dim)
            for dim in place.arrow.dims
        )
