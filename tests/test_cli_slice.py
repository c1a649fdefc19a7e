"""`tlt slice` as typed: what it prints and writes, what it refuses, and parts run in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_zoo import make_checkpoint, some_ids, stock_logits
from safetensors.torch import load_file, save_file
from test_cli_grow import contents, header, tlt

import tlt_cli
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.surgery import verify_slice

TEXT = "Es war einmal ein kleines Modell, das rechnete wie ein großes. " * 8
FRACTAL = {"norm": "sliced", "levels": 3, "split": 2}
REAL = Path(__file__).parents[2] / "shared" / "data" / "tinystories-656k"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, the same in one file, one that holds levels of blocks, and a text."""
    folder = tmp_path_factory.mktemp("models")
    plain = make_checkpoint(folder / "plain", "llama", vocab_size=300)
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    save_file(tensors, folder / "single.safetensors", {"format": "pt", "config": json.dumps(config)})
    fractal = make_checkpoint(folder / "fractal", "llama", vocab_size=300)
    (fractal / "config.json").write_text(json.dumps({**config, "fractal": FRACTAL}))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.delenv("TLT_DEBUG", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def said(*arguments: str | Path | int) -> dict[str, Any]:
    """What a command that goes well says with --json."""
    result = tlt(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "" and result.stdout.count("\n") == 1
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(*arguments: str | Path | int, code: int = 1) -> str:
    """The one line of a slice that is refused with nothing written."""
    result = tlt("slice", *arguments)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.exit_code == code and result.stdout == "", (result.exit_code, result.stderr)
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert contents(Path()) == {}
    return errors[0]


def weights(path: Path) -> list[bytes]:
    """The bytes of all weight files."""
    return [file.read_bytes() for file in sorted(path.rglob("*.safetensors"))] if path.is_dir() else [path.read_bytes()]


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("plain", ["--dim", 16]),
        ("single.safetensors", ["--ffn", 20, "--layers", 2, "--dtype", "bf16"]),
        ("plain", ["--size", "1/3", "--norm", "masked", "--max-shard-size", "20KB"]),
        ("fractal", ["--level", 2, "--block", "3/4"]),
    ],
)
def test_a_dry_run_foretells_the_real_one(models: Path, source: str, options: list[Any]) -> None:
    told = said("slice", models / source, *options, "--dry-run")
    assert list(Path().iterdir()) == []
    done = said("slice", models / source, *options)
    assert told.pop("dry_run") is True and told.pop("free_bytes") > told["bytes"]
    assert done.pop("verification")["relative"] < 1e-4
    assert told == done and told["operation"] == "slice" and told["exact"] is False
    path = Path(told["path"])
    files = contents(path)
    assert {file["name"]: file["bytes"] for file in told["files"]} == {
        name or path.name: len(content) for name, content in files.items()
    }
    for file in told["files"]:
        if "header_bytes" in file:
            size, stored = header(path if path.is_file() else path / file["name"])
            assert file["header_bytes"] == size
            assert json.loads(stored["__metadata__"]["tlt"]) == told["lineage"]
    again = said("slice", models / source, *options, "-o", f"again{path.suffix}")
    assert weights(Path(again["path"])) == weights(path)


def test_what_it_says(models: Path) -> None:
    result = tlt("slice", models / "plain", "--dim", 12, "--data", models / "text.txt")
    assert result.exit_code == 0 and result.stdout == "plain-dim12\n"
    words = " ".join(result.stderr.split())
    assert "heads stays 4: its share of the new width, 1.5, would not be whole" in words
    assert "norms see the entries that are kept (--norm masked is the other convention)" in words
    assert "KL from the whole model on the text" in words and "KL, nats per token" in words
    report = said("slice", models / "plain", "--dim", 16, "--norm", "masked", "--data", models / "text.txt")
    assert report["from"]["dim"] == 32 and report["to"] == {
        "dim": 16, "ffn": 24, "heads": 2, "kv_heads": 1, "head_dim": 8, "layers": 3, "vocab": 300
    }  # fmt: skip
    assert (report["norm"], report["rules"], report["order"], report["level"]) == ("masked", "parent", "prefix", None)
    assert report["config"]["rms_norm_eps"] == 2e-6
    assert report["verification"]["lost"]["kl"] > 1e-3 > report["verification"]["kl"]
    assert report["command"] == "tlt slice plain --dim 16 --norm masked"
    seeded = said("slice", models / "plain", "--dim", 16, "--seed", 3, "-o", "seeded")  # other tokens to verify on
    assert seeded["command"] == "tlt slice plain --dim 16"
    block = said("slice", models / "plain", "--block", "2/2")
    assert (block["block"], block["level"], block["rules"]) == ("2/2", None, "parent")
    assert "plain, after `tlt slice`" in Path("plain-dim16/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ([], "nothing to slice: say at least one of --dim", 2),
        (["--dim", 15], "nearest that work: --dim 12 or 16", 1),
        (["--heads", 3], "GQA", 1),
        (["--level", 1], "names no levels", 1),
        (["--block", "2"], "such as 2/4", 2),
        (["--block", "5/4"], "counted from 1 to 4", 2),
        (["--block", "1/2", "--dim", 16], "take them, or sizes", 2),
        (["--size", "1/4", "--dim", 16], "take one of the two", 2),
        (["--size", "much"], "a share such as 1/4", 2),
        (["--dim", 16, "--norm", "half"], "take one of sliced, masked", 2),
        (["--dim", 16, "--order", "best"], "take one of prefix, importance, pca", 2),
        (["--dim", 16, "--calibration", "t.txt"], "add --order importance", 2),
        (["--block", "1/2", "--refit"], "go with sizes", 2),
        (["--dim", 16, "--data", "t.txt", "--no-verify"], "drop one of the two", 2),
        (["--dim", 16, "--data", "missing.txt", "--dry-run"], "missing.txt", 1),
    ],
)
def test_what_is_refused(models: Path, options: list[Any], message: str, code: int) -> None:
    assert message in refused(models / "plain", *options, code=code)


def test_a_part_that_computes_something_else_is_not_written(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_slice.Masked, "normalize", lambda self, x, *_: x)
    assert "verification failed" in refused(models / "plain", "--dim", 16)
    assert tlt("slice", models / "plain", "--dim", 16, "--no-verify").exit_code == 0


def test_parts_are_run_in_their_place(models: Path) -> None:
    """Perplexity and text of a block inside the model are those of its own file, the cache included."""
    listed = said("eval", models / "fractal", "--levels", "--data", models / "text.txt", "--context", 32)["models"]
    assert [model["part"] for model in listed] == ["0", "1:1/2", "1:2/2", "2:1/4", "2:2/4", "2:3/4", "2:4/4"]
    table = tlt("eval", models / "fractal", "--levels", "--data", models / "text.txt", "--context", 32, "-q").stdout
    assert table.splitlines()[0].split("\t")[:4] == ["source", "part", "parameters", "perplexity"]
    assert len(table.splitlines()) == 8
    for number, options in ((2, ["--level", 1, "--block", "2/2"]), (5, ["--block", "3/4"])):
        path = said("slice", models / "fractal", *options, "--no-verify", "-o", f"part{number}")["path"]
        own = said("eval", path, "--data", models / "text.txt", "--context", 32)
        assert own["perplexity"] == pytest.approx(listed[number]["perplexity"], rel=1e-5)
        assert listed[number]["parameters"] == sum(
            t.numel() for t in load_file(Path(path, "model.safetensors")).values()
        )
        inner = said("eval", models / "fractal", *options, "--data", models / "text.txt", "--context", 32)
        assert inner["perplexity"] == listed[number]["perplexity"] and inner["part"] == listed[number]["part"]
        written = [
            said("generate", *where, "--prompt", "Es war", "--temperature", 0, "--max-tokens", 12)
            for where in ([path], [models / "fractal", *options], [models / "fractal", *options, "--stream"])
        ]
        assert written[0]["text"] == written[1]["text"] == written[2]["text"]
        assert written[1]["part"] == inner["part"] and "part" not in written[0]
    whole = said("generate", models / "fractal", "--prompt", "Es war", "--temperature", 0, "--max-tokens", 12)
    assert whole["text"] != written[0]["text"]


def test_in_place_where_there_is_none(models: Path) -> None:
    for command in (["eval", "--levels"], ["eval", "--level", 1], ["generate", "--level", 1, "--prompt", "x"]):
        result = tlt(command[0], models / "plain", *command[1:])
        assert result.exit_code == 1 and "names no levels" in result.stderr
    result = tlt("eval", models / "fractal", "--levels", "--level", 1)
    assert result.exit_code == 2 and "--levels are all" in result.stderr


def test_functions_for_notebooks(models: Path, tmp_path: Path) -> None:
    report = tlt_cli.slice(models / "fractal", tmp_path / "part", level=1, block="2/2", quiet=True)
    assert report["block"] == "2/2" and report["verification"]["relative"] < 1e-4
    placed = tlt_cli.load(models / "fractal", device="cpu", level=1, block="2/2")
    with torch.no_grad():
        logits = placed(some_ids(300))
    assert torch.allclose(logits, stock_logits(tmp_path / "part", some_ids(300)), atol=1e-4)


def test_growing_and_slicing_as_typed(models: Path) -> None:
    """Back by the growth's own maps; the record says so, and only the sizes it grew from do it."""
    small = models / "plain"
    grown = said("grow", small, "--to-dim", 64, "--method", "identity", "--noise", 0)["path"]
    back = said("slice", grown, "--dim", 32, "-o", "back")
    assert (
        back["undoes"] == "grow"
        and back["exact"] is True
        and back["to"] == back["lineage"]["history"][0]["details"]["from"]
    )
    old, new = load_file(small / "model.safetensors"), load_file("back/model.safetensors")
    assert all(torch.allclose(old[name], new[name], rtol=1e-6) for name in old)
    assert json.loads(Path("back/config.json").read_text()) == json.loads((small / "config.json").read_text())
    assert open_checkpoint("back").lineage == back["lineage"]
    cut = said("slice", grown, "--dim", 24, "-o", "cut")
    assert "undoes" not in cut and cut["rules"] == "parent"
    deeper = said("grow", small, "--to-dim", 64, "--to-layers", 4, "-o", "deeper")["path"]
    result = tlt("slice", deeper, "--dim", 32, "-o", "half")
    assert "to undo the growth name all that it changed: --dim 32" in result.stderr
    assert said("slice", deeper, "--dim", 32, "--layers", 3, "-o", "all back")["undoes"] == "grow"


def test_a_stack_is_undone_as_typed(models: Path) -> None:
    """A growth that was no other model's function has nothing to be compared with but its plan, and the text."""
    small = models / "plain"
    deep = said("grow", small, "--to-layers", 6, "--depth", "stack", "-o", "deep")["path"]
    back = said("slice", deep, "--layers", 3, "--data", models / "text.txt", "-o", "back")
    assert back["undoes"] == "grow" and back["exact"] is False and back["trained"] is False
    assert back["verification"]["relative"] < 1e-6 and back["verification"]["lost"]["kl"] > 1e-3
    old, new = load_file(small / "model.safetensors"), load_file("back/model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_one_of_merged_models(models: Path) -> None:
    said("grow", models / "plain", "--to-dim", 64, "-o", "wide")
    said("slice", "wide", "--dim", 32, "--heads", 4, "--kv-heads", 2, "--ffn", 48, "--norm", "sliced", "-o", "other")
    merged = tlt("merge", models / "plain", "other", "-o", "merged", "-q")
    assert merged.exit_code == 0, merged.stderr
    taken = said("slice", "merged", "--block", "1/2", "-o", "one")
    old, new = load_file(models / "plain" / "model.safetensors"), load_file("one/model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert taken["block"] == "1/2" and "of" not in taken and not Path("one/modeling_tlt.py").exists()
    result = tlt("slice", "merged", "--block", "1/3", "-o", "no")
    assert result.exit_code == 1 and "take one out with --block 1/2" in result.stderr


def test_an_order_by_a_text(models: Path) -> None:
    options = ["--ffn", 24, "--order", "importance", "--calibration", models / "text.txt", "--context", 30]
    report = said("slice", models / "plain", *options, "--data", models / "text.txt")
    assert report["order"] == "importance" and report["calibration"]["source"] == "text.txt"
    assert 0 < report["calibration"]["tokens"] < len(TEXT.encode()) and report["calibration"]["tokens"] % 30 == 0
    assert report["verification"]["relative"] < 1e-4 and report["path"] == "plain-ffn24-importance"
    refit = said("slice", models / "plain", *options, "--refit", "--data", models / "text.txt")
    assert refit["verification"]["lost"]["kl"] < report["verification"]["lost"]["kl"]


@pytest.mark.skipif(not REAL.exists(), reason="the real checkpoint is not here")
def test_a_real_checkpoint(tmp_path: Path) -> None:
    report = said("slice", REAL, "--ffn", 192, "-o", tmp_path / "part")
    assert report["verification"]["relative"] < 5e-5 and report["parameters"] == 508_544
    assert stock_logits(tmp_path / "part", some_ids(2048)).isfinite().all()
