"""`tlt factor --keep X --calibration TEXT` whole: for every family, into a file that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tlt_cli.cli import app

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = DATA / "tinystories-656k"
TEXT = "".join(f"{n} little words, {n * n % 97} of them said twice; " for n in range(400))
everywhere = pytest.mark.parametrize("family", ZOO)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A few steps are enough to see that every path is taken; the text is beside the checkpoint."""
    monkeypatch.setattr("tlt_cli.cli.compressing.STEPS", 3)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def factor(folder: Path, *options: str) -> dict[str, Any]:
    words = [
        "factor",
        str(folder / "model"),
        "--calibration",
        str(folder / "text.txt"),
        "--context",
        "48",
        "--json",
        "-q",
    ]
    result = CliRunner().invoke(app, [*words, *options])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def trusted_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


@everywhere
def test_the_default_loads_in_stock_transformers(quick: Path, family: str) -> None:
    make_checkpoint(quick / "model", family, vocab_size=256)
    report = factor(quick, "--keep", "0.6", "-o", str(quick / "out"))
    assert report["method"] == "kfac" and report["allocate"] == "global" and report["refine"] == "block"
    assert 0.55 <= report["keep"] <= 0.6
    assert report["verification"]["relative"] <= 1e-4
    ids = some_ids(vocab=256)
    folded = CliRunner().invoke(app, ["fold", str(quick / "out"), "-o", str(quick / "plain"), "-q"])
    assert folded.exit_code == 0, folded.output
    logits, plain = trusted_logits(quick / "out", ids), stock_logits(quick / "plain", ids)
    assert (logits - plain).abs().max() / plain.std() <= 1e-4
    original = stock_logits(quick / "model", ids)
    assert (logits - original).abs().max() / original.std() > 1e-2  # it is another model


@pytest.mark.parametrize("refinement", ["none", "drift"])
@pytest.mark.parametrize("options", [["--keep", "0.6"], ["--rank", "8", "--method", "whiten"]], ids=["global", "rank"])
def test_every_way_there(quick: Path, refinement: str, options: list[str]) -> None:
    make_checkpoint(quick / "model", "llama", vocab_size=256)
    report = factor(quick, *options, "--refine", refinement, "-o", str(quick / "out"))
    assert report.get("refine", "none") == refinement
    assert any(name.endswith("lowrank_a.weight") for name in load_file(quick / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        ["--keep", "0.6", "--refine", "none"], ["--keep", "0.6", "--refine", "drift"], ["--keep", "0.6"],
        *(["--rank", "8", "--method", method] for method in ("whiten", "kfac", "fisher", "weighted", "activation")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_two_tokens_are_a_text(quick: Path, options: list[str]) -> None:
    """All moments are singular, and nothing reaches the first block's query and key, which look at one token alone."""
    make_checkpoint(quick / "model", "llama", vocab_size=256)
    (quick / "text.txt").write_text("ab")
    report = factor(quick, *options, "-o", str(quick / "out"))
    assert report["calibration"]["tokens"] == 2
    assert torch.isfinite(trusted_logits(quick / "out", some_ids(vocab=256))).all()


@pytest.mark.parametrize("refinement", ["none", "drift", "block"])
@pytest.mark.parametrize("dead", ["mlp.up_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_matrices_that_read_nothing_but_zeros(quick: Path, dead: str, refinement: str) -> None:
    file = make_checkpoint(quick / "model", "llama", vocab_size=256) / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.{dead}.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    report = factor(quick, "--keep", "0.5", "--refine", refinement, "-o", str(quick / "out"))
    assert report["keep"] <= 0.5
    assert torch.isfinite(trusted_logits(quick / "out", some_ids(vocab=256))).all()


def test_a_bound_that_is_missed_writes_nothing(quick: Path) -> None:
    make_checkpoint(quick / "model", "llama", vocab_size=256)
    words = [
        "factor",
        str(quick / "model"),
        "--calibration",
        str(quick / "text.txt"),
        "--context",
        "48",
        "--keep",
        "0.5",
    ]
    words += ["--eval", str(quick / "text.txt"), "-q", "--json"]
    result = CliRunner().invoke(app, [*words, "-o", str(quick / "bad"), "--max-perplexity", "2"])
    assert result.exit_code == 1 and "--max-perplexity allows 2" in result.stderr and not (quick / "bad").exists()
    result = CliRunner().invoke(app, [*words, "-o", str(quick / "good"), "--max-perplexity", "1e9"])
    assert result.exit_code == 0 and json.loads(result.stdout)["verification"]["perplexity"] > 2


def test_only_what_is_named_changes(quick: Path) -> None:
    make_checkpoint(quick / "model", "llama", vocab_size=256)
    report = factor(quick, "--keep", "0.5", "--only", "*.1.mlp.*", "--format", "dense", "-o", str(quick / "out"))
    assert set(report["ranks"]) == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    old, new = load_file(quick / "model" / "model.safetensors"), load_file(quick / "out" / "model.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


def test_dense_is_the_same_model_multiplied_out(quick: Path) -> None:
    make_checkpoint(quick / "model", "qwen3", vocab_size=256)
    factor(quick, "--keep", "0.5", "-o", str(quick / "out"))
    factor(quick, "--keep", "0.5", "--format", "dense", "-o", str(quick / "dense"))
    ids = some_ids(vocab=256)
    logits, dense = trusted_logits(quick / "out", ids), stock_logits(quick / "dense", ids)
    assert (logits - dense).abs().max() / dense.std() <= 1e-4


def test_the_same_seed_gives_the_same_bytes(quick: Path) -> None:
    make_checkpoint(quick / "model", "llama", vocab_size=256)
    for name, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        factor(quick, "--keep", "0.6", "--seed", seed, "-o", str(quick / name))
    first, again, other = ((quick / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert first == again != other


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here: the real checkpoint is not tried")
def test_the_real_checkpoint_beats_plain_and_whitened_truncation(quick: Path) -> None:
    """A fraction of the text and of the steps: the whole is tests/benchmarks/factor_table.py."""
    text = (DATA / "tinystories-samples.txt").read_text()
    (quick / "text.txt").write_text(text[: len(text) // 32])
    (quick / "rest.txt").write_text(text[-len(text) // 16 :])
    (quick / "model").symlink_to(REAL)
    found = {}
    for name, options in {
        "default": [], "allocated": ["--refine", "none"],
        "whitened": ["--method", "whiten", "--allocate", "uniform", "--refine", "none"],
    }.items():  # fmt: skip
        factor(quick, "--keep", "0.6", "--context", "128", *options, "-o", str(quick / name))
        words = ["eval", str(quick / name), "--data", str(quick / "rest.txt"), "--context", "256", "--json", "-q"]
        found[name] = json.loads(CliRunner().invoke(app, words).stdout)["perplexity"]
    assert found["default"] < found["allocated"] < 0.7 * found["whitened"]
