"""The functions for notebooks do what the commands do: the same bytes, the same numbers, the same refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from family_zoo import make_checkpoint, some_ids, stock_logits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tlt_cli
from tlt_cli.cli import app
from tlt_cli.cli import grow as command
from tlt_cli.errors import TltError, UsageError

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "small", "llama")


def test_load_is_the_model(small: Path, tmp_path: Path) -> None:
    wanted = stock_logits(small, some_ids())
    decoder = tlt_cli.load(small, device="cpu")
    with torch.no_grad():
        logits = decoder(some_ids())
        streamed = tlt_cli.load(str(small), device="cpu", stream=True)(some_ids())
        double = tlt_cli.load(small, device="cpu", dtype="float64")(some_ids())
    bound = 2e-5 * float(wanted.std())
    assert (logits - wanted).abs().max() <= bound and (streamed - wanted).abs().max() <= bound
    assert double.dtype == torch.float64
    assert all(p.requires_grad for p in decoder.parameters())


def test_load_asks_for_what_shapes_cannot_tell(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(load_file(small / "model.safetensors"), tmp_path / "bare.st")
    with pytest.raises(TltError, match="--axis kv=N"):
        tlt_cli.load(tmp_path / "bare.st")
    assert tlt_cli.load(tmp_path / "bare.st", axes={"kv": 2}).description["kv_heads"] == 2
    assert "no config.json: read as llama" in capsys.readouterr().err
    tlt_cli.load(tmp_path / "bare.st", axes={"kv": 2}, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "options",
    [
        {"to_dim": 48},
        {"to_layers": 5, "to_vocab": 110, "method": "identity", "noise": 0.3, "seed": 4},
        {"to_ffn": 60, "to_heads": 8, "to_kv_heads": 4, "fill": "spectral", "split": 0.7},
        {"to_head_dim": 16, "dtype": "bfloat16", "method": "rotate"},
    ],
    ids="-".join,
)
def test_grow_is_the_command(
    small: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = tlt_cli.grow(small, tmp_path / "by function", **options)
    assert capsys.readouterr().out == ""  # nothing is printed but notes
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    typed = CliRunner().invoke(app, ["grow", str(small), *words, "-o", str(tmp_path / "typed"), "--json"])
    assert typed.exit_code == 0, typed.stderr
    said = json.loads(typed.stdout)
    assert json.loads(json.dumps(report)) | {"path": ""} == said | {"path": ""}
    assert report["path"] == str(tmp_path / "by function")
    assert report["verification"]["relative"] <= report["verification"]["bound"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "typed").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "by function").iterdir()}


def test_factor_and_train_are_the_commands(tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path / "bytes", "llama", vocab_size=256)
    (tmp_path / "t.txt").write_text("to be or not to be, that is the question\n" * 40)
    options: dict[str, dict[str, Any]] = {
        "factor": {"keep": 0.5, "seed": 1},
        "train": {"steps": 2, "batch_size": 2, "context": 8},
    }
    tlt_cli.factor(small, tmp_path / "factor by function", **options["factor"], quiet=True)
    report = tlt_cli.train(
        small, tmp_path / "train by function", data=[tmp_path / "t.txt"], **options["train"], quiet=True
    )
    assert report["evaluation"]["loss"] > 0
    for name, given in options.items():
        words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        words += ["--data", str(tmp_path / "t.txt")] if name == "train" else []
        typed = CliRunner().invoke(app, [name, str(small), *words, "-o", str(tmp_path / f"{name} typed"), "-q"])
        assert typed.exit_code == 0, typed.stderr
        files = {path.name: path.read_bytes() for path in (tmp_path / f"{name} typed").iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / f"{name} by function").iterdir()}
    with pytest.raises(UsageError, match="one of --steps, --epochs and --tokens"):
        tlt_cli.train(small, tmp_path / "never", data=[tmp_path / "t.txt"])


def test_another_seed_is_another_model(small: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        tlt_cli.grow(small, tmp_path / f"{seed}.st", to_dim=64, seed=seed, quiet=True)
    assert (tmp_path / "0.st").read_bytes() != (tmp_path / "1.st").read_bytes()


def test_a_dry_run_writes_nothing(small: Path, tmp_path: Path) -> None:
    report = tlt_cli.grow(small, tmp_path / "large", to_dim=64, dry_run=True)
    assert report["dry_run"] is True and report["to"]["dim"] == 64 and not (tmp_path / "large").exists()
    assert {tensor["name"] for tensor in report["tensors"]} == set(load_file(small / "model.safetensors"))


def test_what_is_refused_is_an_exception(small: Path, tmp_path: Path) -> None:
    with pytest.raises(TltError, match="smaller than the model's 32"):
        tlt_cli.grow(small, tmp_path / "large", to_dim=16)
    with pytest.raises(UsageError, match="magic"):
        tlt_cli.grow(small, tmp_path / "large", to_dim=64, method="magic")
    with pytest.raises(UsageError, match="nothing to grow"):
        tlt_cli.grow(small, tmp_path / "large")
    with pytest.raises(TltError, match="no such file"):
        tlt_cli.load(tmp_path / "missing.st")
    assert not (tmp_path / "large").exists()


def test_the_function_has_the_options_of_the_command() -> None:
    """With the same defaults; what is about printing stays with the command."""
    typed, called = signature(command.grow).parameters, signature(tlt_cli.grow).parameters
    spelled = {"axis": "axes"}
    printing = {"json", "quiet", "verbose"}
    assert {spelled.get(name, name) for name in typed} - printing == set(called) - {"quiet"}
    differing = {n for n, p in typed.items() if n not in printing | {"axis"} and p.default != called[n].default}
    assert differing == {"output"}  # a notebook says where


def test_what_the_readme_shows(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    config = (small / "config.json").read_text()
    save_file(load_file(small / "model.safetensors"), tmp_path / "small.safetensors", {"config": config})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    wanted = stock_logits(small, some_ids())
    with torch.no_grad():
        assert (names["decoder"](some_ids()) - wanted).abs().max() <= 5e-5 * wanted.std()
    parameters, distance = capsys.readouterr().out.split()
    assert int(parameters) == sum(p.numel() for p in names["decoder"].parameters()) and float(distance) < 1e-3


def test_importing_is_cheap() -> None:
    heavy = "sorted({'torch', 'numpy', 'typer', 'rich', 'safetensors'} & set(sys.modules))"
    light = subprocess.run(
        [sys.executable, "-c", f"import sys, tlt_cli; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert light.stdout == "[]\n"
    used = f"import sys, tlt_cli.cli.growing; print({heavy})"
    assert "torch" in subprocess.run([sys.executable, "-c", used], capture_output=True, text=True, check=True).stdout
