"""A factored checkpoint computes b @ a, in stock transformers without tlt and in tlt, however they are stored."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factored import FULL, MIX, WAYS, Case, How, apart, case, case_of, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, some_ids, stock_logits
from growing import opened
from safetensors.torch import load_file, save_file
from warm import quick

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.errors import TltError
from tlt_cli.families import fit
from tlt_cli.families.factors import parameters_of
from tlt_cli.model.decoder import unpivot
from tlt_cli.model.describe import describe
from tlt_cli.model.modeling import DESCRIPTION, modeling_source
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.lowrank import Factored, factored_plan
from tlt_cli.surgery.pivots import pivot

BOUND = 2e-5
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
pytestmark = pytest.mark.usefixtures("modules_cache")


def loaded(folder: Path, **options: Any) -> Any:
    """The decoder of tlt, on the factored checkpoint."""
    source = opened(folder)
    return load_checkpoint(source.checkpoint, source.fitted, **options)


# what is computed


@everywhere
@both_ways
@torch.no_grad()
def test_full_rank_is_the_model(tmp_path: Path, family: str, tied: bool) -> None:
    made = case(tmp_path / "source", family, FULL, tied=tied)
    ids, stock = some_ids(), stock_logits(tmp_path / "source", some_ids())
    full = made.write(tmp_path / "full")
    assert apart(remote(full)(ids).logits, stock) <= BOUND
    assert apart(loaded(full)(ids), stock) <= BOUND
    less = case_of(made.source, {**FULL, 1: How(0.97)}).write(tmp_path / "less")
    assert apart(remote(less)(ids).logits, stock) > 100 * BOUND, "one singular value less in one layer must show"


@everywhere
@both_ways
@torch.no_grad()
def test_truncated_is_the_product(tmp_path: Path, family: str, tied: bool) -> None:
    made = case(tmp_path / "source", family, MIX, tied=tied)
    ids, stock = some_ids(), stock_logits(made.dense(tmp_path / "dense"), some_ids())
    assert apart(stock_logits(tmp_path / "source", ids), stock) > 0.1, "truncated too little to tell anything"
    folder = made.write(tmp_path / "factored")
    decoder = loaded(folder)
    whole = decoder(ids)
    assert apart(remote(folder)(ids).logits, stock) <= BOUND
    assert apart(whole, stock) <= BOUND
    assert torch.equal(loaded(folder, stream=True)(ids), whole)
    cache = decoder.new_cache()
    pieces = [decoder(ids[:, :11], cache), *(decoder(ids[:, t : t + 1], cache) for t in range(11, ids.shape[1]))]
    assert apart(torch.cat(pieces, dim=1), stock) <= BOUND


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_every_way_of_storing(tmp_path: Path, family: str, way: str) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    made = case(tmp_path / "source", family, WAYS[way], **biases)
    ids, stock = some_ids(), stock_logits(made.dense(tmp_path / "dense"), some_ids())
    folder = made.write(tmp_path / "factored")
    assert apart(remote(folder)(ids).logits, stock) <= BOUND
    assert apart(loaded(folder, stream=True)(ids), stock) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@both_ways
@torch.no_grad()
def test_embeddings_and_heads(tmp_path: Path, family: str, tied: bool) -> None:
    only = ["*.wte" if family == "gpt2" else "*.embed_tokens", *([] if tied else ["lm_head"])]
    made = case(tmp_path / "source", family, WAYS["plain"], tied=tied, only=only)
    assert len(made.products) == (1 if tied else 2)
    ids, stock = some_ids(), stock_logits(made.dense(tmp_path / "dense"), some_ids())
    folder = made.write(tmp_path / "factored")
    assert apart(stock_logits(tmp_path / "source", ids), stock) > 0.1
    assert apart(remote(folder)(ids).logits, stock) <= BOUND
    assert apart(loaded(folder)(ids), stock) <= BOUND
    assert apart(loaded(folder, stream=True)(ids), stock) <= BOUND


@torch.no_grad()
def test_names_without_the_prefix(tmp_path: Path) -> None:
    """The checkpoint of a bare decoder lacks "model."; its factors do too."""
    made = case(tmp_path / "source", "llama", MIX, tied=True)
    ids, stock = some_ids(), stock_logits(made.dense(tmp_path / "dense"), some_ids())
    file = tmp_path / "source" / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    folder = case_of(opened(tmp_path / "source"), MIX).write(tmp_path / "factored")
    assert "layers.0.self_attn.q_proj.lowrank_a.weight" in load_file(folder / "model.safetensors")
    assert apart(remote(folder)(ids).logits, stock) <= BOUND
    assert apart(loaded(folder)(ids), stock) <= BOUND


@everywhere
def test_every_factor_learns(tmp_path: Path, family: str) -> None:
    folder = case(tmp_path / "source", family, MIX).write(tmp_path / "factored")
    decoder = loaded(folder)
    decoder(some_ids()).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and (not parameter.numel() or parameter.grad.abs().sum() > 0), name


# transformers


ALONE = """
import importlib.util, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tlt_cli":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids[:1], max_new_tokens=8, do_sample=False)), sys.argv[2])
try:
    import tlt_cli
except ModuleNotFoundError:
    print("ALONE")
"""


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@torch.no_grad()
def test_it_loads_where_tlt_is_not_installed(tmp_path: Path, family: str, modules_cache: Path) -> None:  # noqa: F811
    made = case(tmp_path / "source", family, MIX)
    folder, ids = made.write(tmp_path / "factored"), some_ids()
    dense = transformers.AutoModelForCausalLM.from_pretrained(made.dense(tmp_path / "dense"))
    torch.save(ids, tmp_path / "tensors.pt")
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "tensors.pt")]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert "ALONE" in run.stdout, run.stderr
    logits, written = torch.load(tmp_path / "tensors.pt", weights_only=True)
    assert apart(logits, dense(ids).logits) <= BOUND
    assert torch.equal(written, dense.generate(ids[:1], max_new_tokens=8, do_sample=False))


@everywhere
@torch.no_grad()
def test_it_writes_what_the_dense_model_writes(tmp_path: Path, family: str) -> None:
    made = case(tmp_path / "source", family, MIX)
    model = remote(made.write(tmp_path / "factored"))
    dense = transformers.AutoModelForCausalLM.from_pretrained(made.dense(tmp_path / "dense")).eval()
    ids = some_ids(batch=3, length=12)
    greedy = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = dense.generate(ids, **greedy)
    assert len({tuple(row[-16:].tolist()) for row in expected}) == 3
    assert torch.equal(model.generate(ids, **greedy), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **greedy), expected)
    beams = {**greedy, "num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(model.generate(ids, **beams), dense.generate(ids, **beams))


@everywhere
@torch.no_grad()
def test_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    model = remote(case(tmp_path / "source", family, MIX).write(tmp_path / "factored"))
    short, long = some_ids(batch=1, length=13, seed=2), some_ids(batch=1, length=20, seed=3)
    padded = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), short], dim=1), long])
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    logits, alone = model(padded, attention_mask=mask).logits, model(short).logits
    assert apart(logits[:1, 7:], alone) <= BOUND and apart(logits[1:], model(long).logits) <= BOUND
    assert apart(model(padded).logits[:1, 7:], alone) > 100 * BOUND, "what is padded must matter where nothing says so"
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(padded, attention_mask=mask, **greedy)
    assert torch.equal(written[0, 20:], model.generate(short, **greedy)[0, 13:])
    assert torch.equal(written[1, 20:], model.generate(long, **greedy)[0, 20:])


@everywhere
@both_ways
@torch.no_grad()
def test_the_model_without_its_head(tmp_path: Path, family: str, tied: bool) -> None:
    made = case(tmp_path / "source", family, MIX, tied=tied)
    folder, ids = made.write(tmp_path / "factored"), some_ids()
    dense = transformers.AutoModel.from_pretrained(made.dense(tmp_path / "dense"), attn_implementation="eager")
    stock = dense(ids, output_hidden_states=True)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    found = model(ids, output_hidden_states=True)
    assert apart(found.last_hidden_state, stock.last_hidden_state) <= BOUND
    assert len(found.hidden_states) == len(stock.hidden_states)
    for ours, theirs in zip(found.hidden_states, stock.hidden_states, strict=True):
        assert apart(ours, theirs) <= BOUND
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_it_trains_and_is_saved_in_transformers(tmp_path: Path) -> None:
    made = case(tmp_path / "source", "llama", MIX)
    dense = transformers.AutoModelForCausalLM.from_pretrained(made.dense(tmp_path / "dense"))
    model, ids = remote(made.write(tmp_path / "factored")), some_ids()
    loss = model(ids, labels=ids).loss
    assert loss.item() == pytest.approx(dense(ids, labels=ids).loss.item(), rel=1e-5)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.01 * parameter.grad)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(ids).logits
        assert apart(expected, dense(ids).logits) > 100 * BOUND
        assert torch.equal(remote(tmp_path / "saved")(ids).logits, expected)
        assert apart(loaded(tmp_path / "saved")(ids), expected) <= BOUND


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    model = remote(case(tmp_path / "source", "llama", MIX).write(tmp_path / "factored"))
    for message, options in {
        "inputs_embeds are not supported": {"inputs_embeds": torch.zeros(1, 2, 32)},
        "attention weights": {"input_ids": some_ids(), "output_attentions": True},
        "attention_mask must be": {"input_ids": some_ids(), "attention_mask": torch.ones(2, 5)},
    }.items():
        with pytest.raises(ValueError, match=message):
            model(**options)


def test_the_shipped_file_stands_alone() -> None:
    source = modeling_source().decode()
    assert source == modeling_source().decode() and "tlt_cli" not in source
    for line in source.splitlines():
        if line.startswith(("import ", "from ")):
            package = line.split()[1].partition(".")[0]
            assert package in sys.stdlib_module_names | {"torch", "transformers"}, line


# what is stored


def test_what_is_stored(tmp_path: Path) -> None:
    made = case(tmp_path / "source", "gpt2", {0: How(0.5, roles=frozenset({"key", "up"})), 1: MIX[2], 2: MIX[1]})
    shapes = {tensor.name: tensor.shape for tensor in made.plan.tensors}
    first = {n.removeprefix("transformer.h.0."): s for n, s in shapes.items() if n.startswith("transformer.h.0.")}
    assert "attn.c_attn.weight" not in first and "mlp.c_fc.weight" not in first
    assert {name: shape for name, shape in first.items() if "c_attn" in name} == {
        "attn.c_attn.0.weight": (32, 32),
        "attn.c_attn.1.lowrank_a.weight": (16, 32),
        "attn.c_attn.1.lowrank_b.weight": (32, 16),
        "attn.c_attn.2.weight": (32, 32),
        "attn.c_attn.bias": (96,),
    }
    assert (first["mlp.c_fc.lowrank_a.weight"], first["mlp.c_fc.lowrank_b.weight"]) == ((16, 32), (48, 16))
    assert first["attn.c_proj.weight"] == (32, 32)
    said = made.plan.config["lowrank"]
    assert said["ffn"] == {"2": 31} and said["architectures"] == ["GPT2LMHeadModel"]
    assert said["shared"]["transformer.h.1.attn.c_attn.2"] == "transformer.h.1.attn.c_attn.0"
    assert shapes["transformer.h.2.mlp.c_proj.lowrank_a.weight"][1] == 31 == shapes["transformer.h.2.mlp.c_fc.bias"][0]
    together = [f"transformer.h.1.attn.c_attn.{part}" for part in range(3)]
    stored = sum(prod(s) for n, s in shapes.items() if n.rpartition(".lowrank_")[0] in together and "rows" not in n)
    assert stored == 16 * (96 + 32) - 16**2 == parameters_of(96, 32, 16, kept=16)
    spans = [said["pivoted"][slot] for slot in together if slot in said["pivoted"]]
    assert spans[0][0] == 0 and spans[-1][1] == 16 and all(b[0] == a[1] for a, b in pairwise(spans))


@everywhere
@both_ways
def test_the_plan_is_the_file_and_the_description_its_own(tmp_path: Path, family: str, tied: bool) -> None:
    made = case(tmp_path / "source", family, MIX, tied=tied)
    folder = made.write(tmp_path / "factored")
    written = opened(folder)
    assert {name: info.shape for name, info in written.checkpoint.tensors.items()} == made.plan.shapes
    description = describe(written.fitted)
    assert json.loads(json.dumps(description)) == description
    config = json.loads((folder / "config.json").read_text())
    assert {**config[DESCRIPTION], "lowrank": config["lowrank"]} == description
    assert (
        config["model_type"] == "tlt" and config["lowrank"]["dense_model_type"] == made.source.fitted.family.model_type
    )
    again = made.write(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def test_changed_tensors_and_bfloat16(tmp_path: Path) -> None:
    source = case(tmp_path / "source", "gpt2", FULL, dtype=torch.bfloat16).source
    matrix = next(m for m in case_of(source, FULL).products if m.name == "transformer.h.1.attn.c_attn.1")
    new = {
        "transformer.h.1.attn.c_attn.2.weight": torch.full((32, 32), 0.5),
        "transformer.h.0.ln_1.weight": torch.full((32,), 2.0),
        "transformer.h.2.mlp.c_proj.weight": torch.full((20, 32), 3.0),
    }
    plan = factored_plan(
        source.fitted, source.dtypes, [Factored(matrix, 4)], lambda slot: (torch.ones(4, 32), torch.ones(32, 4)),
        ffn={2: torch.arange(10, 30)}, changed={name: lambda value=value: value for name, value in new.items()},
    )  # fmt: skip
    folder = Case(source, plan, {}, {}).write(tmp_path / "out")
    stored, before = load_file(folder / "model.safetensors"), load_file(source.folder / "model.safetensors")
    assert all(torch.equal(stored[name].float(), value) for name, value in new.items())
    assert stored["transformer.h.1.attn.c_attn.1.lowrank_b.weight"].dtype == torch.bfloat16
    name = "transformer.h.1.attn.c_attn.0.weight"
    assert torch.equal(stored[name], before["transformer.h.1.attn.c_attn.weight"][:, :32].T)
    name = "transformer.h.2.mlp.c_fc.weight"
    assert torch.equal(stored[name], before[name][:, 10:30])
    with pytest.raises(AssertionError, match=r"h\.9"):
        factored_plan(
            source.fitted, source.dtypes, [Factored(matrix, 4)], lambda slot: (torch.ones(4, 32), torch.ones(32, 4)),
            changed={"transformer.h.9.ln_1.weight": lambda: torch.ones(32)},
        )  # fmt: skip


# pivots


def test_pivots_survive_bad_factors() -> None:
    """Left factors whose columns are nearly parallel, and of every size: the product comes back all the same."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    lefts = [base[:35], base[35:] @ torch.diag(10.0 ** -torch.arange(12.0).double())]
    mixing = torch.eye(12).double() + 1e3 * torch.ones(12, 12).double()
    lefts = [left @ mixing for left in lefts]
    right = torch.linalg.solve(mixing, torch.randn(12, 20, generator=generator, dtype=torch.float64))
    made = pivot(right, lefts, [0, 1])
    for index, left in enumerate(lefts):
        wide = torch.zeros(len(left), 12, dtype=torch.float64)
        others = torch.ones(len(left), dtype=torch.bool).index_fill(0, made.rows[index], False)
        wide[others] = made.lefts[index]
        start = sum(len(made.rows[before]) for before in range(index))
        wide[made.rows[index], start + torch.arange(len(made.rows[index]))] = 1.0
        assert (wide @ made.right - left @ right).abs().max() < 1e-9
        assert not len(made.lefts[index]) or made.lefts[index].abs().max() <= 2.0
    first = torch.linalg.solve(base[:12], base[12:], left=False)
    assert first.abs().max() > 2.0, "the first rows that come must do worse"


def test_pivots_of_a_left_factor_that_lacks_rank() -> None:
    left = torch.randn(20, 3).double() @ torch.randn(3, 6).double()
    right = torch.randn(6, 9).double()
    made = pivot(right, [left], [0])
    others = torch.ones(20, dtype=torch.bool).index_fill(0, made.rows[0], False)
    assert (made.lefts[0] @ made.right - (left @ right)[others]).abs().max() < 1e-12
    assert (made.right - (left @ right)[made.rows[0]]).abs().max() < 1e-12


def test_where_rows_stand() -> None:
    rows = torch.tensor([1, 4, 5])
    order = torch.tensor([1, 4, 5, 0, 2, 3, 6])
    assert torch.equal(order[unpivot(rows, 7)], torch.arange(7))


# what is refused


def broken(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """The folder with tensors replaced, added, or (None) removed."""
    before = load_file(folder / "model.safetensors")
    assert all(name in before for name, value in tensors.items() if value is None)
    stored: dict[str, Any] = {**before, **tensors}
    kept = {name: value.contiguous() for name, value in stored.items() if value is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


SLOT = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "model.layers.2.self_attn.k_proj.lowrank_a.weight": None,
        f"{SLOT}.lowrank_b.weight": torch.zeros(5, 5),
        f"{SLOT}.lowrank_rows": None,
        "model.layers.1.self_attn.q_proj.lowrank_a.weight": torch.zeros(24, 32),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32),
        "model.layers.0.input_layernorm.lowrank_a.weight": torch.zeros(3, 3),
        "model.layers.1.mlp.down_proj.lowrank_a.weight": torch.zeros(23, 48),
    }.items(),
)
def test_factors_that_do_not_fit_are_named(tmp_path: Path, name: str, value: torch.Tensor | None) -> None:
    folder = case(tmp_path / "source", "llama", MIX).write(tmp_path / "factored")
    loaded(folder)
    broken(folder, **{name: value})
    with pytest.raises(TltError) as ours:
        loaded(folder)
    assert name in str(ours.value)
    with pytest.raises((ValueError, RuntimeError)):
        remote(folder)


@pytest.mark.parametrize("rows", [[3, 1], [0, 0], [-1, 2], [5, 99]])
@pytest.mark.parametrize("stream", [True, False])
def test_row_numbers_that_are_none(tmp_path: Path, rows: list[int], stream: bool) -> None:
    folder = case(tmp_path / "source", "llama", WAYS["pivoted"]).write(tmp_path / "factored")
    name = f"{SLOT}.lowrank_rows"
    numbers = load_file(folder / "model.safetensors")[name]
    numbers[:2], numbers[-1] = torch.tensor(rows), max(rows[1], int(numbers[-1]))
    broken(folder, **{name: numbers})
    with pytest.raises(TltError, match="lowrank_rows must number rows"):
        loaded(folder, stream=stream)(some_ids())


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("version", {"version": 2}),
        ("lowrank", "yes"),
        ("ranks", {"ranks": [3]}),
        (SLOT, {"ranks": {SLOT: 0}}),
        (SLOT, {"ranks": {SLOT: 99}}),
        ("model.layers.9.self_attn.q_proj", {"ranks": {"model.layers.9.self_attn.q_proj": 3}}),
        ("model.layers.0.mlp.nothing", {"ranks": {"model.layers.0.mlp.nothing": 3}}),
        ("model.norm", {"ranks": {"model.norm": 3}}),
        (f"{SLOT}.0", {"ranks": {f"{SLOT}.0": 3}}),
        ("shared", {"ranks": {SLOT: 3}, "shared": {SLOT: SLOT}}),
        ("shared", {"shared": {"x": SLOT}}),
        ("shared", {"ranks": {SLOT: 3}, "shared": {SLOT: []}}),
        ("bits", {"ranks": {SLOT: 3}, "bits": 8.0}),
        ("pivoted", {"ranks": {SLOT: 3}, "pivoted": {SLOT: [0, 4]}}),
        ("pivoted", {"ranks": {SLOT: 3}, "pivoted": {SLOT: True}}),
        ("lm_head", {"ranks": {"lm_head": 3}, "pivoted": {"lm_head": [0, 3]}}),
        ("ffn", {"ffn": {"0": 49}}),
        ("ffn", {"ffn": {"7": 40}}),
        ("ffn", {"ffn": {"one": 40}}),
        ("architectures", {"architectures": 7}),
        ("dense_model_type", {"dense_model_type": ["llama"]}),
        ("rope_scaling", {"rope_scaling": 8}),
    ],
)
def test_wrong_configs_are_refused(tmp_path: Path, key: str, change: Any) -> None:
    made = case(tmp_path / "source", "llama", WAYS["plain"])
    said = change if isinstance(change, str) else {"version": 1, "ranks": {}, **change}
    slots = said.get("ranks", {}) if isinstance(said, dict) else {}
    shapes = dict(made.source.fitted.places and made.plan.shapes)
    for slot in slots if isinstance(slots, dict) else ():
        shapes |= {f"{slot}.lowrank_a.weight": (3, 32), f"{slot}.lowrank_b.weight": (32, 3)}
    keep = {n: s for n, s in shapes.items() if "lowrank" not in n or n.rpartition(".lowrank")[0] in slots}
    stock = {n: i.shape for n, i in made.source.checkpoint.tensors.items() if n.removesuffix(".weight") not in slots}
    with pytest.raises(TltError, match=key.replace(".", r"\.")):
        fit({**stock, **keep}, {**(made.source.checkpoint.config or {}), "lowrank": said})


def test_a_factored_checkpoint_is_not_factored_again(tmp_path: Path) -> None:
    made = case(tmp_path / "source", "llama", WAYS["plain"])
    written = opened(made.write(tmp_path / "factored"))
    with pytest.raises(TltError, match="tlt fold"):
        factored_plan(written.fitted, written.dtypes, [], lambda slot: (torch.ones(1), torch.ones(1)))


# the commands


def tlt(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [quick() / "tlt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands_read_it(tmp_path: Path) -> None:
    made = case(tmp_path / "source", "llama", MIX, vocab_size=300)
    folder, dense = made.write(tmp_path / "factored"), made.dense(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small model. " * 20)
    run = tlt("eval", folder, dense, "--data", text, "--context", "32", "--json")
    ours, stock = (one["perplexity"] for one in json.loads(run.stdout)["models"])
    assert ours == pytest.approx(stock, rel=1e-5)
    written = [
        tlt("generate", one, "--prompt", "Once", "--temperature", "0", "--max-tokens", "12", "--json")
        for one in (folder, dense)
    ]
    assert json.loads(written[0].stdout)["text"] == json.loads(written[1].stdout)["text"]
    seen = json.loads(tlt("inspect", folder, "--json").stdout)
    axes = {tensor["name"]: tensor["axes"] for tensor in seen["tensors"]}
    assert axes["model.layers.0.self_attn.k_proj.lowrank_a.weight"] == "rank <- hidden"
    assert axes["model.layers.0.self_attn.k_proj.lowrank_b.weight"] == "(kv 2 rotary) <- rank"
    assert seen["family"] == "llama" and seen["parameters"] == made.plan.parameters
    assert tlt("inspect", folder, "--toml").returncode == 0
    refused = tlt("grow", folder, "--to-dim", "64", "-o", tmp_path / "grown")
    assert refused.returncode == 1 and "tlt fold" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "grown").exists()


def test_a_single_file_knows_itself(tmp_path: Path) -> None:
    from tlt_cli.checkpoint.writer import write

    made = case(tmp_path / "source", "gpt2", MIX)
    file = tmp_path / "factored.st"
    write(file, made.plan.tensors, made.source.checkpoint, config=made.plan.config, metadata={"format": "pt"}, jobs=1)
    checkpoint = open_checkpoint(file)
    fitted = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    with torch.no_grad():
        logits = load_checkpoint(checkpoint, fitted)(some_ids())
        assert apart(logits, stock_logits(made.dense(tmp_path / "dense"), some_ids())) <= BOUND
