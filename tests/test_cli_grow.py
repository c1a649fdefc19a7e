"""`tlt grow` as typed: what it prints and writes, that a dry run foretells it, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_zoo import make_checkpoint, some_ids, stock_logits
from hub_server import serving
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tlt_cli.checkpoint import staging
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli import app
from tlt_cli.families import table
from tlt_cli.surgery import arrows
from tlt_cli.surgery import grow as surgery
from tlt_cli.surgery.widen import Widening

TEXT = "Es war einmal ein kleines Modell, das rechnete wie ein großes. " * 8
CARD = "---\nlicense: mit\nlanguage: en\nbase_model: somebody/something\ntags: [story]\n---\n# A model\n"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that may lie in one, the same as shards, as one file with its config, and bare."""
    folder = tmp_path_factory.mktemp("models")
    model = make_checkpoint(folder / "model", "llama", vocab_size=300)
    tensors = load_file(model / "model.safetensors")
    config = (model / "config.json").read_text()
    (folder / "bare").mkdir()
    save_file(tensors, folder / "bare" / "bare.st")
    save_file(tensors, folder / "single.safetensors", {"format": "pt", "config": config})
    names = sorted(tensors)
    (folder / "sharded").mkdir()
    (folder / "sharded" / "config.json").write_text(config)
    weight_map = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / "sharded" / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names[number::3], shard)
    (folder / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (model / "README.md").write_text(CARD)
    (model / "LICENSE.txt").write_text("do what you like")
    (model / "onnx").mkdir()
    (model / "onnx" / "notes.txt").write_text("of a subfolder")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has an empty current folder, and lines that no terminal breaks."""
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.delenv("TLT_DEBUG", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def tlt(*arguments: str | Path | int) -> Any:
    """Run a command in this process. An unforeseen exception is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def grown(*arguments: str | Path | int) -> dict[str, Any]:
    """What a growth that goes well says with --json."""
    result = tlt("grow", *arguments, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "" and result.stdout.count("\n") == 1
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(*arguments: str | Path | int, code: int = 1) -> str:
    """The one line of a growth that is refused with nothing written."""
    before = contents(Path())
    result = tlt("grow", *arguments)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.exit_code == code and result.stdout == "", (result.exit_code, result.stderr)
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert contents(Path()) == before
    return errors[0]


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder, or the one file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """The bytes that a file's header takes, and what it says."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length, json.loads(raw[8 : 8 + length])


# --- law 9: a dry run says what the real run writes, and the same command writes the same bytes ------------------


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("model", ["--to-dim", 64]),
        ("model", ["--to-vocab", 310, "--to-layers", 5, "--max-shard-size", "50KB", "--dtype", "bf16"]),
        ("sharded", ["--to-dim", 40, "--method", "rotate"]),
        ("single.safetensors", ["--to-ffn", 50]),
        ("bare/bare.st", ["--to-head-dim", 12, "--axis", "kv=2", "-o", "deep/down/out.st"]),
        ("bare/bare.st", ["--to-dim", 64, "--axis", "kv=2", "-o", "deep/down/out"]),
    ],
)
def test_a_dry_run_foretells_every_byte_that_is_not_a_weight(models: Path, source: str, options: list[Any]) -> None:
    told = grown(models / source, *options, "--dry-run")
    assert contents(Path()) == {} and not list(Path().iterdir())
    done = grown(models / source, *options)
    only_told = {"dry_run": told.pop("dry_run"), "free_bytes": told.pop("free_bytes")}
    assert only_told["dry_run"] is True and only_told["free_bytes"] > told["bytes"]
    assert done.pop("verification")["relative"] < done.pop("bound", 1e-4)
    assert told == done
    path = Path(told["path"])
    files = contents(path)
    assert {file["name"]: file["bytes"] for file in told["files"]} == {
        name or path.name: len(content) for name, content in files.items()
    }
    stored, config = {}, None
    for file in told["files"]:
        if "header_bytes" in file:
            size, said = header(path if path.is_file() else path / file["name"])
            assert file["header_bytes"] == size
            metadata = said.pop("__metadata__")
            assert json.loads(metadata["tlt"]) == told["lineage"]
            config = json.loads(metadata.get("config", "null"))
            stored |= said
    assert stored.keys() == {tensor["name"] for tensor in told["tensors"]}
    for tensor in told["tensors"]:
        start, stop = stored[tensor["name"]]["data_offsets"]
        assert (tensor["shape"], tensor["dtype"]) == (stored[tensor["name"]]["shape"], stored[tensor["name"]]["dtype"])
        assert tensor["bytes"] == stop - start
    if "config.json" in files:
        config = json.loads(files["config.json"])
    before = open_checkpoint(models / source).config or {}
    assert config == {**before, **told["config"]}
    assert all(key not in before or before[key] != value for key, value in told["config"].items())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--to-dim", 64, "-o", "taken"], 1),
        (["--to-dim", 64, "-o", "taken/model.safetensors/out"], 1),
        (["--to-dim", 33], 1),
        (["--to-dim", 16], 1),
        (["--to-dim", 64, "--max-shard-size", "0"], 2),
        (["--to-dim", 64, "--max-shard-size", "1GB", "-o", "out.st"], 2),
        (["--to-dim", 64, "--data", "missing.txt"], 1),
        (["--to-dim", 64, "-o", "out.bin"], 2),
        (["--to-dim", 64, "--noise", "nan"], 2),
        ([], 2),
    ],
)
def test_a_dry_run_ends_as_the_real_one_would(models: Path, options: list[Any], code: int) -> None:
    Path("taken").mkdir()
    Path("taken", "model.safetensors").write_bytes(b"")
    assert refused(models / "model", *options, code=code) == refused(models / "model", *options, "--dry-run", code=code)


def test_a_full_disk_is_foretold(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_wanted = grown(models / "model", "--to-dim", 64, "--dry-run")["bytes"]
    usage = shutil.disk_usage(".")
    for spare, code in ((-1, 1), (0, 0)):
        little = usage._replace(free=bytes_wanted + spare)
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path, little=little: little)
        for dry in ([], ["--dry-run"]):
            result = tlt("grow", models / "model", "--to-dim", 64, *dry, "--force")
            assert result.exit_code == code, result.stderr
            assert code == 0 or f"would take {bytes_wanted:,} bytes" in result.stderr


@pytest.mark.parametrize("form", ["out", "out.safetensors"])
def test_the_same_command_gives_the_same_bytes(models: Path, form: str) -> None:
    command = [models / "model", "--to-dim", 48, "--to-layers", 4]
    for place, jobs, seed in (("a", 1, 0), ("b", 3, 0), ("c", 1, 1)):
        grown(*command, "-o", f"{place}/{form}", "--jobs", jobs, "--seed", seed)
    assert contents(Path("a")) == contents(Path("b"))
    first, other = (
        load_file(Path(place, form) if form != "out" else Path(place, form, "model.safetensors")) for place in "ac"
    )
    assert not torch.equal(first[UP], other[UP]) and first[UP].shape == other[UP].shape


# --- what it says ------------------------------------------------------------------------------------------------


def test_stdout_is_the_path_and_stderr_the_table(models: Path) -> None:
    result = tlt("grow", models / "model", "--to-dim", 64)
    assert result.exit_code == 0 and result.stdout == "model-dim64\n"
    for word in ("before", "after", "parameters", "|Δlogit|", "KL"):
        assert word in result.stderr
    quiet = tlt("grow", models / "model", "--to-dim", 64, "--to-vocab", 310, "-q")
    assert (quiet.stdout, quiet.stderr) == ("model-dim64-vocab310\n", "")
    noted = tlt("grow", models / "model", "--to-dim", 36, "--to-vocab", 310, "--fill", "zero")
    for word in ("tlt: heads stays 4", "10 new tokens", "without noise"):
        assert word in noted.stderr


def test_json_is_one_object_with_everything(models: Path) -> None:
    report = grown(models / "model", "--to-dim", 64, "--to-vocab", 310, "--data", models / "text.txt")
    assert report["operation"] == "grow" and report["path"] == "model-dim64-vocab310" and report["exact"] is True
    assert report["from"] == {
        "dim": 32, "ffn": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "layers": 3, "vocab": 300,
    }  # fmt: skip
    assert report["to"] == {**report["from"], "dim": 64, "ffn": 96, "heads": 8, "kv_heads": 4, "vocab": 310}
    assert report["config"] == {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 310,
    }  # fmt: skip
    assert any("new tokens" in note for note in report["notes"])
    assert report["command"] == report["lineage"]["command"]
    checked = report["verification"]
    assert 0 < checked["relative"] < checked["bound"] and checked["max_logit"] > 0 and checked["deviation"] > 0.1
    assert 0 <= checked["kl"] <= checked["max_kl"] < 1e-6 and checked["same_top"] == 1.0
    assert report["parameters"] == sum(
        tensor.numel() for tensor in load_file("model-dim64-vocab310/model.safetensors").values()
    )


def test_a_text_is_verified_too(models: Path) -> None:
    alone = grown(models / "model", "--to-dim", 64)["verification"]
    too = grown(models / "model", "--to-dim", 64, "--data", models / "text.txt", "--force")["verification"]
    assert too["tokens"] == 2 * alone["tokens"]
    for length, tokens in ((100, 3 * 64), (64, 3 * 64), (10, 3 * 10), (2, 3 * 2)):  # windows of 64, or shorter
        Path("short.txt").write_text("x" * length)
        short = grown(models / "model", "--to-dim", 64, "--data", "short.txt", "--force")["verification"]
        assert short["tokens"] == tokens
    assert "--no-verify verifies nothing" in refused(
        models / "model", "--to-dim", 64, "--data", models / "text.txt", "--no-verify", code=2
    )


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("model", "model-dim64-layers4"),
        ("sharded", "sharded-dim64-layers4"),
        ("single.safetensors", "single-dim64-layers4.safetensors"),
        ("bare/bare.st", "bare-dim64-layers4.st"),
    ],
)
def test_the_output_is_named_after_the_source_and_lies_here(models: Path, source: str, path: str) -> None:
    axis = ["--axis", "kv=2"] if "bare" in source else []
    assert grown(models / source, "--to-dim", 64, "--to-layers", 4, *axis)["path"] == path
    assert Path(path).is_file() is source.endswith((".st", ".safetensors")) and [str(p) for p in Path().iterdir()] == [
        path
    ]


def test_the_method_names_it_where_no_size_does(models: Path) -> None:
    assert grown(models / "model", "--method", "rotate")["path"] == "model-rotate"


def test_the_input_is_never_the_output(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("model", "single.safetensors"):
        for output in (models / source, models):
            before = contents(models)
            assert "the input" in refused(models / source, "--to-dim", 64, "-o", output, "--force")
            assert contents(models) == before
    monkeypatch.chdir(models / "model")
    for output in (".", "sub", "model.safetensors"):
        assert "the input" in refused(".", "--to-dim", 64, "-o", output, "--force")
    assert "the input" in refused("model.safetensors", "--to-dim", 64, "-o", "model.safetensors", "--force")


def test_what_exists_stays_unless_forced(models: Path) -> None:
    Path("out").mkdir()
    Path("out", "notes.txt").write_text("mine")
    Path("file").write_text("mine")
    for name in ("out", "file"):
        assert "exists already; pass --force" in refused(models / "model", "--to-dim", 64, "-o", name)
    assert "no checkpoint in it" in refused(models / "model", "--to-dim", 64, "-o", "out", "--force")
    os.mkfifo("pipe")
    said = refused(models / "model", "--to-dim", 64, "-o", "pipe", "--force")
    assert "is a device, a pipe or a socket" in said and Path("pipe").is_fifo()
    Path("pipe").unlink()
    assert grown(models / "model", "--to-dim", 64, "-o", "file", "--force")["path"] == "file"
    assert Path("file", "model.safetensors").is_file()


def test_a_pipeline(models: Path) -> None:
    tool = f"{sys.executable} -m tlt_cli"
    line = f'{tool} eval "$({tool} grow {models / "model"} --to-dim 64)" --data {models / "text.txt"} --json -q'
    piped = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    before = json.loads(tlt("eval", models / "model", "--data", models / "text.txt", "--json").stdout)
    after = json.loads(piped.stdout)
    assert after["source"] == "model-dim64" and after["tokens"] == before["tokens"]
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-5)


# --- sources -----------------------------------------------------------------------------------------------------


def test_shards_stay_shards(models: Path) -> None:
    report = grown(models / "sharded", "--to-dim", 64, "--to-layers", 4)
    folder = Path(report["path"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor["bytes"] for tensor in report["tensors"])
    ids = some_ids(300)
    source, grown_logits = stock_logits(models / "sharded", ids), stock_logits(folder, ids)
    assert (grown_logits - source).abs().max() < 2e-5 * source.std()


def test_a_bare_file_needs_its_heads_and_then_carries_its_config(models: Path) -> None:
    bare = models / "bare" / "bare.st"
    assert "pass --axis kv=N" in refused(bare, "--to-dim", 64)
    report = grown(bare, "--to-dim", 64, "--axis", "kv=2")
    assert report["path"] == "bare-dim64.st" and "--axis kv=2" in report["command"]
    twice = grown("bare-dim64.st", "--to-layers", 5)["path"]
    figures = [
        json.loads(tlt("eval", path, "--data", models / "text.txt", "--json", *axis).stdout)["perplexity"]
        for path, axis in ((bare, ["--axis", "kv=2"]), ("bare-dim64.st", []), (twice, []))
    ]
    assert figures[1:] == pytest.approx([figures[0]] * 2, rel=1e-5)


def test_one_file_and_a_folder_become_each_other(models: Path) -> None:
    grown(models / "single.safetensors", "--to-dim", 64, "-o", "folder")
    grown(models / "model", "--to-dim", 64, "-o", "file.st")
    folder, file = load_file("folder/model.safetensors"), load_file("file.st")
    assert folder.keys() == file.keys() and all(torch.equal(folder[name], file[name]) for name in file)
    with safe_open("file.st", "pt") as opened:
        assert json.loads(opened.metadata()["config"]) == json.loads(Path("folder/config.json").read_text())


def test_a_repository_of_the_hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add("org/name", models / "model")
        told = grown("org/name", "--to-dim", 64, "--dry-run")
        assert not Path("name-dim64").exists() and hub.sent < (models / "model" / "model.safetensors").stat().st_size
        done = grown("org/name", "--to-dim", 64)
    assert told["tensors"] == done["tensors"] and told["lineage"] == done["lineage"]
    card = Path(done["path"], "README.md").read_text()
    assert done["path"] == "name-dim64" and "base_model: org/name" in card and "license: mit" in card
    alone = load_file(grown(models / "model", "--to-dim", 64, "-o", "local")["path"] + "/model.safetensors")
    assert all(torch.equal(tensor, alone[name]) for name, tensor in load_file("name-dim64/model.safetensors").items())


def renamed(models: Path, folder: Path) -> Path:
    """The model under an architecture and tensor names of its own; the table that describes it."""
    folder.mkdir()
    tensors = load_file(models / "model" / "model.safetensors")
    save_file(
        {name.replace("model.", "net.").replace("up_proj", "widen"): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    config = json.loads((models / "model" / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    text = (table.FOLDER / "llama.toml").read_text()
    text = text.replace('"model.', '"net.').replace("up_proj", "widen").replace("LlamaForCausalLM", "OwnForCausalLM")
    own = folder.parent / "own.toml"
    own.write_text(text)
    return own


def test_a_family_of_the_users_own(models: Path, tmp_path: Path) -> None:
    own = renamed(models, tmp_path / "own")
    assert "no family table for 'OwnForCausalLM'" in refused(tmp_path / "own", "--to-dim", 64)
    report = grown(tmp_path / "own", "--to-dim", 64, "--family", own)
    assert "--family own.toml" in report["command"] and str(tmp_path) not in report["command"]
    new = load_file(Path(report["path"], "model.safetensors"))
    assert new["net.layers.1.mlp.widen.weight"].shape == (96, 64)
    assert Path(report["path"], "tlt.toml").read_text() == own.read_text()
    assert (
        "pass --family with it" in tlt("grow", tmp_path / "own", "--to-dim", 64, "--family", own, "-o", "x.st").stderr
    )
    shutil.copy(own, tmp_path / "own" / "tlt.toml")
    grown(tmp_path / "own", "--to-dim", 64, "-o", "again")
    again = load_file("again/model.safetensors")
    assert again.keys() == new.keys() and all(torch.equal(again[name], new[name]) for name in new)
    assert Path("again", "tlt.toml").read_text() == own.read_text()
    grown(report["path"], "--to-layers", 4, "-o", "thrice")  # by the table that went along


# --- dtypes and broken weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "stored", "coarse"), [("bfloat16", "BF16", True), ("float16", "F16", True), ("float64", "F64", False)]
)
def test_dtypes_are_kept(tmp_path: Path, dtype: str, stored: str, coarse: bool) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", dtype=getattr(torch, dtype))
    report = grown(source, "--to-dim", 64)
    assert {tensor["dtype"] for tensor in report["tensors"]} == {stored}
    assert "dtype" not in report["config"]
    assert ("written" in report["verification"]) is coarse
    if coarse:
        assert 1e-4 < report["verification"]["written"]["relative"] < 1
        assert report["verification"]["relative"] < 5e-5
    assert ("as rounded" in tlt("grow", source, "--to-dim", 64, "--force").stderr) is coarse


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_another_dtype_is_said_in_the_config(models: Path, tmp_path: Path, key: str | None) -> None:
    source = tmp_path / "source"
    shutil.copytree(models / "model", source)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | ({key: "float32"} if key else {})))
    report = grown(source, "--to-ffn", 50, "--dtype", "bf16")
    assert report["config"] == {"intermediate_size": 50, key or "dtype": "bfloat16"}
    new = json.loads(Path(report["path"], "config.json").read_text())
    assert {name for name in new if "dtype" in name} == {key or "dtype"}
    assert all(t.dtype == torch.bfloat16 for t in load_file(Path(report["path"], "model.safetensors")).values())
    assert "--dtype bf16" in report["command"] and "written" in report["verification"]
    finer = grown(source, "--to-ffn", 50, "--dtype", "float64", "-o", "finer")
    assert {tensor["dtype"] for tensor in finer["tensors"]} == {"F64"} and "written" not in finer["verification"]


def with_one(models: Path, folder: Path, value: float) -> Path:
    """The model with one weight of another value."""
    shutil.copytree(models / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][3, 5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_numbers_beyond_a_dtype_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    source = with_one(models, tmp_path / "large", 1e5)
    for verify in ("--verify", "--no-verify"):
        said = refused(source, "--to-layers", 4, "--dtype", "float16", verify)
        assert re.search(r"model\.layers\.\d\.mlp\.up_proj\.weight: 100000 does not fit F16", said)
    assert grown(source, "--to-layers", 4, "--dtype", "bfloat16", "--no-verify")["parameters"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_by_name(models: Path, tmp_path: Path, value: float) -> None:
    source = with_one(models, tmp_path / "broken", value)
    for options in (["--verify"], ["--no-verify"]):
        assert f"{UP} holds 1 NaN or infinite values of" in refused(source, "--to-dim", 64, *options)
    assert f"{UP} holds" in refused(source, "--to-layers", 4)


def test_quantized_configs_are_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "model", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    assert "quantization_config" in refused(tmp_path / "source", "--to-dim", 64)


# --- verification ------------------------------------------------------------------------------------------------


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing heads without the softmax temperature that makes up for their size."""
    sides = arrows.sides
    monkeypatch.setattr(surgery, "sides", lambda *given, **options: sides(*given, **{**options, "temperature": 1.0}))


@pytest.mark.usefixtures("cold")
def test_a_wrong_map_writes_nothing(models: Path) -> None:
    said = refused(models / "model", "--to-head-dim", 16)
    assert "verification failed" in said and "nothing was written" in said
    assert "verification" not in grown(models / "model", "--to-head-dim", 16, "--no-verify")
    ids = some_ids(300)
    before, after = (stock_logits(path, ids) for path in (models / "model", Path("model-headdim16")))
    assert (after - before).abs().max() > 0.1 * before.std()


@pytest.mark.usefixtures("cold")
def test_a_wrong_map_leaves_an_old_output_alone(models: Path) -> None:
    old = grown(models / "model", "--to-dim", 64, "-o", "out")["path"]
    before = contents(Path(old))
    assert "verification failed" in refused(models / "model", "--to-head-dim", 16, "-o", "out", "--force")
    assert contents(Path(old)) == before


def test_noise_that_is_heard_is_blamed(models: Path) -> None:
    assert "verification failed" in (said := refused(models / "model", "--to-dim", 64, "--noise", 1000))
    assert said.endswith("take less --noise")
    assert "the output's logits are not finite" in refused(models / "model", "--to-dim", 64, "--noise", 1e30)


def test_a_method_that_changes_the_function_is_measured_and_written(models: Path) -> None:
    report = grown(models / "model", "--to-layers", 5, "--depth", "stack")
    assert report["exact"] is False and report["verification"]["relative"] > 0.1


# --- what goes along ---------------------------------------------------------------------------------------------


def test_what_lies_beside_goes_along(models: Path) -> None:
    report = grown(models / "model", "--to-dim", 64, "--noise", "0.5")
    files, before = contents(Path(report["path"])), contents(models / "model")
    assert files.keys() == before.keys()
    for name in ("LICENSE.txt", "onnx/notes.txt", "generation_config.json"):
        assert files[name] == before[name]
    card = files["README.md"].decode()
    for said in ("license: mit", "language: en", "- story", "- tlt", "- grow", "base_model: somebody/something"):
        assert said in card
    assert "\ntlt grow model --to-dim 64 --method duplicate --noise 0.5\n" in card and "# A model" not in card
    assert report["lineage"]["parents"][0]["sha256"] in card


def test_no_paths_and_no_times_are_written(models: Path, tmp_path: Path) -> None:
    grown(models / "model", "--to-dim", 64, "--data", models / "text.txt", "-o", tmp_path / "here" / "deep" / "out")
    for name, content in contents(Path("deep/out")).items():
        for secret in (str(tmp_path), str(models), str(Path.home()), "text.txt"):
            assert secret.encode() not in content, name
        if not name.endswith(".safetensors"):
            assert not re.search(rb"20\d\d-\d\d|\d\d:\d\d", content), name


def test_the_command_of_the_card_makes_the_same_bytes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--to-dim", 64, "--to-layers", 4, "--fill", "spectral", "--noise", 0.5, "--split", 0.7, "--seed", 3]
    first = grown(models / "model", *options, "--max-shard-size", "100KB", "--dtype", "bf16")
    here = Path().absolute()
    monkeypatch.chdir(models)
    again = tlt(*first["command"].split()[1:], "-o", here / "again")
    assert again.exit_code == 0 and contents(here / "again") == contents(here / first["path"])


def test_the_lineage_is_a_chain(models: Path) -> None:
    once = grown(models / "model", "--to-dim", 64)
    twice = grown("model-dim64", "--to-layers", 4, "-o", "twice")
    assert twice["lineage"]["history"][0]["command"] == once["command"]
    printed = tlt("inspect", "twice").stderr
    made = [line.partition(" (tlt")[0] for line in printed.splitlines() if line.startswith("made by: ")]
    assert made == [f"made by: {report['command']}" for report in (twice, once)]
    parents = [report["lineage"]["parents"][0]["sha256"] for report in (twice, once)]
    assert re.findall(r"sha256 (\w+)", printed) == parents
    assert parents[0] == open_checkpoint("model-dim64").digest()


# --- extremes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("small", "large"), [(32, 512), (128, 2048)])
def test_sixteen_times_the_width_keeps_the_function(tmp_path: Path, small: int, large: int) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", hidden_size=small, head_dim=small // 4)
    report = grown(source, "--to-dim", large, "--to-ffn", 96, "--to-heads", 4, "--to-kv-heads", 2)
    assert report["verification"]["relative"] < report["verification"]["bound"]
    before, after = (stock_logits(path, some_ids()) for path in (source, Path(report["path"])))
    assert (after - before).abs().max() < 5e-5 * before.std()


def test_noise_that_ignores_the_number_of_inputs_would_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Widening, "noise_size", property(lambda work: work.noise))
    source = make_checkpoint(tmp_path / "source", "llama")
    report = grown(source, "--to-dim", 512, "--to-ffn", 96, "--to-heads", 4, "--to-kv-heads", 2, "--no-verify")
    before, after = (stock_logits(path, some_ids()) for path in (source, Path(report["path"])))
    assert (after - before).abs().max() > 2e-4 * before.std()


HUGE: dict[str, tuple[str, list[Any]]] = {
    "width": ("llama", ["--to-dim", 10**9]),
    "rotated width": ("llama", ["--to-dim", 10**9, "--method", "rotate"]),
    "width beyond 64 bits": ("gpt2", ["--to-dim", 10**12]),
    "ffn": ("llama", ["--to-ffn", 10**12]),
    "head size": ("llama", ["--to-head-dim", 10**12]),
    "layers": ("llama", ["--to-layers", 10**12]),
    "layers of a pattern": ("gemma3", ["--to-layers", 10**12]),
    "vocabulary": ("llama", ["--to-vocab", 10**13]),
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
def test_what_no_disk_holds_is_refused_before_any_work(
    tmp_path: Path, name: str, dry: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = HUGE[name]
    source = make_checkpoint(tmp_path / "source", family)
    monkeypatch.setattr(surgery, "axis_maps", too_late)
    monkeypatch.setattr(surgery, "layers", too_late)
    assert re.search(r"would take [\d,]+ bytes, but", refused(source, *options, *dry))


def too_late(*given: Any, **options: Any) -> Any:
    raise AssertionError("maps were made before the disk was asked")


# --- odd combinations --------------------------------------------------------------------------------------------

ODD: dict[str, tuple[str, list[Any], int, str]] = {
    "noise nan": ("llama", ["--to-dim", 64, "--noise", "nan"], 2, "--noise nan is not"),
    "noise inf": ("llama", ["--to-dim", 64, "--noise", "inf"], 2, "--noise inf is not"),
    "noise text": ("llama", ["--to-dim", 64, "--noise", "loud"], 2, "Invalid value for '--noise'"),
    "seed negative": ("llama", ["--to-dim", 64, "--seed", -1], 2, "--seed -1 is not"),
    "seed beyond 63 bits": ("llama", ["--to-dim", 64, "--seed", 2**63], 2, "is not a whole number from 0"),
    "split of nothing": ("llama", ["--to-dim", 64, "--split", 0], 2, "--split 0.0 is not a share"),
    "split nan": ("llama", ["--to-dim", 64, "--split", "nan"], 2, "--split nan is not a share"),
    "method unknown": ("llama", ["--to-dim", 64, "--method", "tile"], 2, "--method tile is not known"),
    "dtype unknown": ("llama", ["--to-dim", 64, "--dtype", "int8"], 2, "--dtype int8: not a dtype"),
    "jobs zero": ("llama", ["--to-dim", 64, "--jobs", 0], 2, "Invalid value for '--jobs'"),
    "size zero": ("llama", ["--to-dim", 0], 2, "Invalid value for '--to-dim'"),
    "size negative": ("llama", ["--to-dim", -64], 2, "Invalid value for '--to-dim'"),
    "size broken": ("llama", ["--to-dim", "64.5"], 2, "Invalid value for '--to-dim'"),
    "no size": ("llama", [], 2, "nothing to grow: say at least one of"),
    "the same size": ("llama", ["--to-dim", 32], 1, "already has the sizes"),
    "smaller": ("llama", ["--to-dim", 64, "--to-ffn", 5], 1, "--to-ffn 5 is smaller than the model's 48"),
    "shards of one file": ("llama", ["--to-dim", 64, "-o", "x.st", "--max-shard-size", "1GB"], 2, "cannot be sharded"),
    "shard size of nothing": ("llama", ["--to-dim", 64, "--max-shard-size", "0"], 2, "--max-shard-size '0' is not"),
    "shard size of words": ("llama", ["--to-dim", 64, "--max-shard-size", "big"], 2, "--max-shard-size 'big' is not"),
    "pickle output": ("llama", ["--to-dim", 64, "-o", "x.pt"], 2, "no .pt files"),
    "uneven groups": ("llama", ["--to-heads", 6, "--to-kv-heads", 4], 1, "do not split among"),
    "a prime width": ("llama", ["--to-dim", 37, "--split", 0.7], 1, "nearest that work: --to-dim 36 or 40"),
    "an axis twice": ("llama", ["--to-dim", 64, "--axis", "kv=2", "--axis", "kv=4"], 2, "given twice"),
    "an axis that disagrees": ("llama", ["--to-dim", 64, "--axis", "kv=3"], 1, "kv"),
    "rotated norms behind blocks": ("gemma3", ["--to-dim", 64, "--method", "rotate"], 1, "--method rotate: gemma3"),
    "rotation without a spare": ("gpt2", ["--to-vocab", 100, "--method", "rotate"], 1, "one spare direction"),
    "optimizer state nowhere": ("llama", ["--to-dim", 64, "--optimizer-state", "none"], 1, "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_combinations_are_one_plain_line(tmp_path: Path, name: str) -> None:
    family, options, code, message = ODD[name]
    source = make_checkpoint(tmp_path / "source", family)
    assert message in refused(source, *options, code=code)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ["--to-vocab", 120, "--method", "rotate"]),
        ("llama", ["--to-dim", 44, "--split", 0.7]),
        ("smollm3", ["--to-layers", 7]),
        ("gemma3", ["--to-layers", 6]),
        ("gemma2", ["--to-layers", 5]),
        ("gpt2", ["--to-dim", 40, "--to-layers", 4]),
    ],
)
def test_odd_combinations_that_work(tmp_path: Path, family: str, options: list[Any]) -> None:
    source = make_checkpoint(tmp_path / "source", family)
    report = grown(source, *options)
    before, after = (stock_logits(path, some_ids()) for path in (source, Path(report["path"])))
    assert (after[..., :97] - before).abs().max() < 2e-5 * before.std()
