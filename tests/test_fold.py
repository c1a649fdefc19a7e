"""Folding gives the plain model that the factored one computes, in the family's own storage and with its own config."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import FULL, MIX, WAYS, Case, How, apart, case, case_of, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import opened
from safetensors.torch import load_file, save_file
from torch import Tensor
from warm import quick

import tlt_cli.surgery.fold as folding
from tlt_cli.checkpoint.writer import write
from tlt_cli.errors import TltError
from tlt_cli.model.modeling import MODELING
from tlt_cli.surgery.fold import fold
from tlt_cli.surgery.lowrank import dense_plan
from tlt_cli.surgery.plan import Plan

BOUND = 2e-5
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
pytestmark = pytest.mark.usefixtures("modules_cache")


def folded(folder: Path, source: Path) -> Path:
    """The factored checkpoint `source`, folded."""
    made = opened(source)
    plan = fold(made.fitted, made.dtypes)
    return written(folder, plan, made.checkpoint)


def written(folder: Path, plan: Plan, values: Any) -> Path:
    write(folder, plan.tensors, values, config=plan.config, metadata={"format": "pt"}, jobs=1)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


@everywhere
@both_ways
@torch.no_grad()
def test_folded_is_what_was_folded(tmp_path: Path, family: str, tied: bool) -> None:
    """Law 6: stock transformers on the folded file, against the factored one's own code and against the products."""
    made = case(tmp_path / "source", family, MIX, tied=tied)
    factored, ids = made.write(tmp_path / "factored"), some_ids()
    plain = folded(tmp_path / "plain", factored)
    logits = stock_logits(plain, ids)
    assert apart(logits, remote(factored)(ids).logits) <= BOUND
    assert apart(logits, stock_logits(made.dense(tmp_path / "dense"), ids)) <= BOUND
    assert apart(logits, stock_logits(tmp_path / "source", ids)) > 0.1, "truncated too little to tell anything"
    before = tensors(tmp_path / "source")
    assert {name: tensor.shape for name, tensor in tensors(plain).items()} == {n: t.shape for n, t in before.items()}
    assert config(plain) == config(tmp_path / "source")


@everywhere
@both_ways
@pytest.mark.parametrize("pivoted", [False, True])
def test_a_full_rank_factoring_folds_back_to_the_weights(
    tmp_path: Path, family: str, tied: bool, pivoted: bool
) -> None:
    ways = dict.fromkeys(range(4), How(1.0, pivoted=True)) if pivoted else FULL
    made = case(tmp_path / "source", family, ways, tied=tied)
    plain = folded(tmp_path / "plain", made.write(tmp_path / "factored"))
    before, after = tensors(tmp_path / "source"), tensors(plain)
    assert before.keys() == after.keys() and config(plain) == config(tmp_path / "source")
    changed = {matrix.tensor for matrix in made.products}
    for name, tensor in before.items():
        if name in changed:
            assert (after[name] - tensor).abs().max() <= 2e-6 * tensor.abs().max(), name
        else:
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_every_way_of_storing(tmp_path: Path, family: str, way: str) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    made = case(tmp_path / "source", family, WAYS[way], **biases)
    plain = folded(tmp_path / "plain", made.write(tmp_path / "factored"))
    ids, stock = some_ids(), stock_logits(made.dense(tmp_path / "dense"), some_ids())
    assert apart(stock_logits(plain, ids), stock) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@both_ways
@torch.no_grad()
def test_embeddings_and_heads(tmp_path: Path, family: str, tied: bool) -> None:
    only = ["*.wte" if family == "gpt2" else "*.embed_tokens", *([] if tied else ["lm_head"])]
    made = case(tmp_path / "source", family, WAYS["plain"], tied=tied, only=only)
    plain = folded(tmp_path / "plain", made.write(tmp_path / "factored"))
    ids, stock = some_ids(), stock_logits(made.dense(tmp_path / "dense"), some_ids())
    assert apart(stock_logits(plain, ids), stock) <= BOUND


Wrong = Callable[[Any, Tensor | None, Tensor, slice, slice], Tensor]
_block = folding._block


def _transposed(part: Any, a: Tensor | None, b: Tensor, outputs: slice, inputs: slice) -> Tensor:
    whole = _block(part, a, b, slice(0, part.wanted[0]), slice(0, part.wanted[1]))
    return whole.T[outputs, inputs] if whole.shape[0] == whole.shape[1] else whole[outputs, inputs]


def _shifted(part: Any, a: Tensor | None, b: Tensor, outputs: slice, inputs: slice) -> Tensor:
    return _block(part, a, b.roll(1, 0), outputs, inputs)


def _scaled(part: Any, a: Tensor | None, b: Tensor, outputs: slice, inputs: slice) -> Tensor:
    return _block(part, a, b, outputs, inputs) * 1.001


@pytest.mark.parametrize("wrong", [_transposed, _shifted, _scaled])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_known_mistakes_show(tmp_path: Path, family: str, wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the law, and in the command: which then writes nothing."""
    made = case(tmp_path / "source", family, MIX)
    factored, ids = made.write(tmp_path / "factored"), some_ids()
    monkeypatch.setattr(folding, "_block", wrong)
    plain = folded(tmp_path / "plain", factored)
    assert apart(stock_logits(plain, ids), remote(factored)(ids).logits) > 10 * BOUND
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.fold import fold_checkpoint

    with pytest.raises(TltError, match="verification failed"):
        fold_checkpoint(str(factored), tmp_path / "out", out=Output(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_narrower_layers(tmp_path: Path, family: str) -> None:
    """All of one size: the model is narrower. Of several sizes: the widest, and zeros in the others."""
    key = "n_inner" if family == "gpt2" else "intermediate_size"
    even = case(tmp_path / "source", family, WAYS["narrow"])
    plain = folded(tmp_path / "even", even.write(tmp_path / "factored"))
    assert config(plain)[key] == 20
    uneven = case_of(even.source, {0: How(0.5, neurons=17), 1: How(0.5, neurons=25), 2: How(0.5, neurons=9)})
    ids = some_ids()
    stock = stock_logits(uneven.dense(tmp_path / "dense"), ids)
    plain = folded(tmp_path / "uneven", uneven.write(tmp_path / "uneven factored"))
    assert config(plain)[key] == 25
    assert apart(stock_logits(plain, ids), stock) <= BOUND


@everywhere
@torch.no_grad()
def test_the_dense_plan_is_the_fold(tmp_path: Path, family: str) -> None:
    made = case(tmp_path / "source", family, MIX)
    source = made.source
    plan = dense_plan(source.fitted, source.dtypes, made.factored, made.factors.__getitem__, ffn=made.kept)
    direct = written(tmp_path / "direct", plan, source.checkpoint)
    plain = folded(tmp_path / "plain", made.write(tmp_path / "factored"))
    assert config(direct) == config(plain)
    for name, tensor in tensors(plain).items():
        assert (tensors(direct)[name] - tensor).abs().max() <= 2e-6 * tensor.abs().max(), name
    ids = some_ids()
    assert apart(stock_logits(direct, ids), stock_logits(made.dense(tmp_path / "dense"), ids)) <= BOUND


def test_one_matrix_written_back(tmp_path: Path) -> None:
    """All else is copied, byte for byte."""
    source = opened(make_checkpoint(tmp_path / "source", "gpt2", dtype=torch.bfloat16))
    made = case_of(source, {0: How(0.3, roles=frozenset({"up"})), **dict.fromkeys((1, 2), How(roles=frozenset()))})
    plan = dense_plan(source.fitted, source.dtypes, made.factored, made.factors.__getitem__)
    direct = tensors(written(tmp_path / "direct", plan, source.checkpoint))
    name = "transformer.h.0.mlp.c_fc.weight"
    (product,) = made.products.values()
    for other, tensor in tensors(tmp_path / "source").items():
        assert torch.equal(direct[other], tensor) == (other != name)
    assert torch.equal(direct[name], product.T.float().bfloat16())


# the command


def tlt(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [quick() / "tlt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def made(tmp_path: Path) -> Case:
    """A factored llama beside its source, in the folder `factored`."""
    made = case(tmp_path / "source", "llama", MIX, tied=True)
    made.write(tmp_path / "factored", **{"tokenizer_config.json": b"{}"})
    return made


def test_the_command(tmp_path: Path, made: Case) -> None:
    run = tlt("fold", "factored", "--json", cwd=tmp_path)
    report = json.loads(run.stdout)
    assert run.returncode == 0 and report["path"] == "factored-folded", run.stderr
    assert report["verification"]["max_logit"] >= 0 and report["verification"]["relative"] <= BOUND
    assert 0 <= report["verification"]["kl"] < 1e-9
    plain = tmp_path / "factored-folded"
    assert {path.name for path in plain.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer_config.json",
    }  # fmt: skip
    assert MODELING in {path.name for path in (tmp_path / "factored").iterdir()}
    assert config(plain) == config(tmp_path / "source")
    assert report["lineage"]["operation"] == "fold" and report["command"] == "tlt fold factored"
    again = tlt("fold", "factored", cwd=tmp_path)
    assert again.returncode == 1 and "--force" in again.stderr
    both = [tlt("fold", "factored", "-o", name, "-q", cwd=tmp_path).stdout for name in ("a", "b")]
    assert both == ["a\n", "b\n"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_other_forms(tmp_path: Path, made: Case) -> None:
    run = tlt("fold", "factored", "-o", "one.st", "--dtype", "bf16", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["verification"]["written"]["relative"] > BOUND
    assert {tensor.dtype for tensor in load_file(tmp_path / "one.st").values()} == {torch.bfloat16}
    grown = tlt("grow", "one.st", "--to-ffn", "64", "-o", "grown", cwd=tmp_path)
    assert grown.returncode == 0, grown.stderr
    dry = json.loads(tlt("fold", "factored", "-o", "dry", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert dry["dry_run"] and not (tmp_path / "dry").exists()
    tlt("fold", "factored", "-o", "real", cwd=tmp_path)
    assert dry["bytes"] == sum(path.stat().st_size for path in (tmp_path / "real").iterdir())


def test_in_a_notebook(tmp_path: Path, made: Case) -> None:
    import tlt_cli

    report = tlt_cli.fold(tmp_path / "factored", tmp_path / "folded", quiet=True)
    tlt("fold", "factored", "-o", "typed", cwd=tmp_path)
    assert report["verification"]["relative"] <= BOUND
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("folded", "typed")]
    assert both[0] == both[1]


def test_the_text_of_the_proof(tmp_path: Path) -> None:
    """It is read before any work and not at all where nothing is proved; what there is to say of it is said."""
    case(tmp_path / "source", "llama", MIX, vocab_size=300).write(tmp_path / "low")
    (tmp_path / "t.txt").write_text("a" * 300)
    run = tlt("fold", "low", "--data", "missing.txt", "-o", "out", cwd=tmp_path)
    assert run.returncode == 1 and "missing.txt: no such file" in run.stderr and not (tmp_path / "out").exists()
    assert tlt("fold", "low", "--data", "missing.txt", "--no-verify", "-o", "out", cwd=tmp_path).returncode == 0
    save_file({"layer.weight": torch.randn(8, 8)}, tmp_path / "one.safetensors")
    assert tlt("factor", "one.safetensors", "--rank", "2", "-o", "low.safetensors", cwd=tmp_path).returncode == 0
    run = tlt("fold", "low.safetensors", "--data", "t.txt", "-o", "plain.safetensors", cwd=tmp_path)
    assert run.returncode == 2 and "no family fits low.safetensors" in run.stderr
    assert tlt("fold", "low.safetensors", "-o", "plain.safetensors", cwd=tmp_path).returncode == 0


def test_nothing_to_fold(tmp_path: Path, made: Case) -> None:
    run = tlt("fold", "source", "-o", "out", cwd=tmp_path)
    assert run.returncode == 1 and "nothing to fold" in run.stderr and len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
