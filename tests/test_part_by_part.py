"""Commands on merged models: what is done to all of them side by side is done to each, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import apart, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from merging import same_bits
from safetensors.torch import load_file
from test_cli_grow import contents, header, tlt
from test_cli_merge import TEXT, elsewhere  # noqa: F401
from test_ranks import run_ranks
from torch import Tensor

import tlt_cli
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli import growing, slicing
from tlt_cli.errors import TltError
from tlt_cli.model.compare import distance
from tlt_cli.surgery import merge as surgery

BOUND = 1e-5  # of the logits' deviation, float32
WRONG = 1e-2  # what a wrong variant must miss by
WEIGHTS = (0.25, 0.75)
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
pytestmark = pytest.mark.usefixtures("modules_cache", "elsewhere")

LAYERS = {"gpt2": "n_layer"}
DEEPER = {family: {LAYERS.get(family, "num_hidden_layers"): 5} for family in ZOO} | {
    "gemma3": {"intermediate_size": 40}  # whose config.json lists its layers' kinds
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models, two of them merged, all of them merged in two steps, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for number, own in enumerate(({}, {"num_hidden_layers": 2}, {"hidden_size": 48})):
        make_checkpoint(folder / f"part{number}", "llama", seed=number, vocab_size=300, **own)
    merge([folder / "part0", folder / "part1"], folder / "merged")
    merge([folder / "merged", folder / "part2"], folder / "deep", (0.5, 0.5))
    (folder / "text.txt").write_text(TEXT)
    return folder


def merge(sources: Sequence[Path], output: Path, weights: Sequence[float] = WEIGHTS, **options: Any) -> Path:
    tlt_cli.merge(sources, output, weights=weights, quiet=True, **options)
    return output


Made = Callable[[str, bool], tuple[list[Path], Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two models of a family that differ in a size, and both merged: made once."""

    @cache
    def make(family: str, tied: bool) -> tuple[list[Path], Path]:
        folder = tmp_path_factory.mktemp("made")
        own = [make_checkpoint(folder / f"{n}", family, tied, seed=n, **k) for n, k in enumerate(({}, DEEPER[family]))]
        return own, merge(own, folder / "merged", verify=False)

    return make


def both(command: str, folder: Path, own: Sequence[Path], merged: Path, **options: Any) -> tuple[Path, list[Path]]:
    """The command on the merged model, and on each of its models. What both ways make of the weights is the same."""
    run = getattr(tlt_cli, command)
    report = run(merged, folder / "whole", quiet=True, **options)
    each = [folder / f"{command}{number}" for number in range(len(own))]
    for source, output in zip(own, each, strict=True):
        run(source, output, quiet=True, verify=False, **options)
    again = merge(each, folder / "again", [part["weight"] for part in report["parts"]], verify=False)
    assert same_bits(folder / "whole", again)
    return folder / "whole", each


@torch.no_grad()
def mean(folders: Sequence[Path], weights: Sequence[float] = WEIGHTS, vocab: int = 97) -> Tensor:
    """The weighted mean of what stock transformers says of each."""
    logits = [weight * stock_logits(one, some_ids(vocab)) for weight, one in zip(weights, folders, strict=True)]
    return torch.stack(logits).sum(0)


@torch.no_grad()
def said(folder: Path, vocab: int = 97) -> Tensor:
    return remote(folder)(some_ids(vocab)).logits


def report(*arguments: str | Path | int) -> dict[str, Any]:
    """What a command that goes well says with --json."""
    result = tlt(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: str | Path | int, code: int = 1) -> str:
    """The one line of a command that is refused, with nothing left behind."""
    before = contents(Path())
    result = tlt(*arguments)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.exit_code == code and result.stdout == "", (result.exit_code, result.stderr)
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert contents(Path()) == before and not [path for path in Path().iterdir() if "part" in path.name]
    return errors[0]


# --- the command on all of them is the command on each -----------------------------------------------------------


@everywhere
@both_ways
def test_growing(made: Made, tmp_path: Path, family: str, tied: bool) -> None:
    """The function is kept, which is that of the models as they were."""
    own, merged = made(family, tied)
    whole, _ = both("grow", tmp_path, own, merged, to_ffn=64)
    assert apart(said(whole), mean(own)) <= BOUND
    assert apart(said(whole), mean(own, (0.5, 0.5))) >= WRONG, "weights must matter"


@everywhere
@both_ways
def test_slicing(made: Made, tmp_path: Path, family: str, tied: bool) -> None:
    own, merged = made(family, tied)
    whole, each = both("slice", tmp_path, own, merged, dim=16, ffn=20, heads=4)
    assert apart(said(whole), mean(each)) <= BOUND
    assert apart(said(whole), mean(own)) >= WRONG, "a slice is another function"


@everywhere
def test_factoring(made: Made, tmp_path: Path, family: str) -> None:
    own, merged = made(family, True)
    whole, each = both("factor", tmp_path, own, merged, rank=6)
    logits = [weight * said(one) for weight, one in zip(WEIGHTS, each, strict=True)]
    assert apart(said(whole), sum(logits, start=torch.zeros(()))) <= BOUND
    assert apart(said(whole), mean(own)) >= WRONG


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factoring_to_dense_matrices(made: Made, tmp_path: Path, family: str) -> None:
    own, merged = made(family, False)
    whole, each = both("factor", tmp_path, own, merged, rank=6, format="dense")
    assert apart(said(whole), mean(each)) <= BOUND
    assert apart(said(whole), mean(own)) >= WRONG


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("grow", {"to_dim": 64, "to_layers": 4, "method": "rotate"}),
        ("grow", {"to_vocab": 310, "to_heads": 8, "to_kv_heads": 4, "method": "spectral", "dtype": "bfloat16"}),
        ("slice", {"size": "1/4"}),
        ("slice", {"size": "1/3", "norm": "masked", "dtype": "bfloat16"}),
        ("slice", {"layers": 1, "vocab": 100}),
        ("slice", {"ffn": 20, "order": "importance", "refit": True, "calibration": "text.txt"}),
        ("slice", {"dim": 16, "order": "pca", "calibration": "text.txt"}),
        ("factor", {"keep": 0.6, "bits": 8}),
        (
            "factor",
            {"keep": 0.5, "format": "dense", "method": "whiten", "allocate": "uniform", "calibration": "text.txt"},
        ),
        ("factor", {"keep": 0.6, "refine": "drift", "calibration": "text.txt"}),
        ("factor", {"energy": 0.8, "only": ["*.mlp.*"]}),
    ],
)
def test_every_way(models: Path, tmp_path: Path, command: str, options: dict[str, Any]) -> None:
    """Whatever the sizes of each turn out to be, on models of unlike depths."""
    given = {key: [models / value] if key == "calibration" else value for key, value in options.items()}
    both(command, tmp_path, [models / "part0", models / "part1"], models / "merged", **given)


def test_a_level_of_each(tmp_path: Path) -> None:
    """A nested model beside another of the same levels."""
    own = [make_checkpoint(tmp_path / f"{n}", "llama", seed=n) for n in range(2)]
    for one in own:
        config = json.loads((one / "config.json").read_text())
        levels = [{"dim": 16, "ffn": 24, "heads": 2, "kv_heads": 1, "head_dim": 8, "layers": 3}]
        (one / "config.json").write_text(json.dumps({**config, "nested": {"norm": "sliced", "levels": levels}}))
    whole, each = both("slice", tmp_path, own, merge(own, tmp_path / "merged"), level=1)
    assert apart(said(whole), mean(each)) <= BOUND


@torch.no_grad()
def test_merged_of_merged(models: Path, tmp_path: Path) -> None:
    """Three models of unlike widths and depths, under the weights that two merges gave them."""
    own, weights = [models / f"part{number}" for number in range(3)], (0.125, 0.375, 0.5)
    grown = report("grow", models / "deep", "--to-ffn", 64, "-o", "grown")
    report("grow", models / "deep", "--to-ffn", 64, "--seed", 1, "-o", "other")
    assert not same_bits(Path("grown"), Path("other"))
    assert tuple(part["weight"] for part in grown["parts"]) == weights
    assert [part["name"] for part in grown["parts"]] == ["part0", "part1", "part2"]
    assert apart(said(Path("grown"), 300), mean(own, weights, 300)) <= BOUND
    assert apart(said(Path("grown"), 300), mean(own, (0.5, 0.125, 0.375), 300)) >= WRONG
    cut, each = both("slice", tmp_path, own, models / "deep", dim=24, layers=2)
    assert apart(said(cut, 300), mean(each, weights, 300)) <= BOUND
    again = merge([cut, models / "part0"], tmp_path / "on", (0.5, 0.5))
    assert apart(said(again, 300), mean([*each, own[0]], (*(w / 2 for w in weights), 0.5), 300)) <= BOUND


# --- what it says, and what it writes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "output", "options"),
    [
        ("grow", "out", ["--to-ffn", 64, "--max-shard-size", "50KB"]),
        ("grow", "out.safetensors", ["--to-dim", 64, "--dtype", "bf16"]),
        ("slice", "deep/down/out", ["--size", "1/2"]),
        ("slice", "out.st", ["--ffn", 20, "--block", "2/2", "--data", "text.txt"]),
        ("factor", "out", ["--rank", 4]),
        ("factor", "out.safetensors", ["--keep", 0.5, "--format", "dense"]),
    ],
)
def test_a_dry_run_foretells_the_real_one(models: Path, command: str, output: str, options: list[Any]) -> None:
    shutil.copy(models / "text.txt", "text.txt")
    before = contents(Path())
    told = report(command, models / "merged", *options, "-o", output, "--dry-run")
    assert contents(Path()) == before and [path.name for path in Path().iterdir()] == ["text.txt"]
    done = report(command, models / "merged", *options, "-o", output)
    assert told.pop("dry_run") is True and told.pop("free_bytes") > told["bytes"]
    for found in (told, done):
        for one in (found, *found.get("parts", ())):
            for key in ("verification", "seconds", "matrix_seconds", "total_seconds"):
                one.pop(key, None)
    assert told == done
    files = contents(Path(output))
    assert {file["name"]: file["bytes"] for file in told["files"]} == {
        name or Path(output).name: len(content) for name, content in files.items()
    }
    for file in told["files"]:
        if "header_bytes" in file:
            size, stored = header(Path(output) if Path(output).is_file() else Path(output, file["name"]))
            assert file["header_bytes"] == size and json.loads(stored["__metadata__"]["tlt"]) == told["lineage"]
    report(command, models / "merged", *options, "-o", output, "--force", "--jobs", 1)
    assert contents(Path(output)) == files


def test_what_it_says(models: Path) -> None:
    result = tlt("grow", models / "merged", "--to-ffn", 64)
    assert (result.exit_code, result.stdout) == (0, "merged-ffn64\n")
    words = " ".join(result.stderr.split())
    for expected in (
        "each of the 2 models is grown by itself; sizes and shares are those of each", "ffn 48 64",
        "parameters, part 1 of 2 (part0)", "part1 is filled up with zeros, which nothing reads: layer 2 of 3",
    ):  # fmt: skip
        assert words.count(expected) == 1, words
    found = report("slice", models / "deep", "--size", "1/2")
    assert found["verification"]["relative"] <= found["verification"]["bound"] and found["exact"] is False
    assert [model["weight"] for model in found["models"]] == [0.125, 0.375, 0.5]
    assert found["sizes"]["hidden"] == max(part["to"]["dim"] for part in found["parts"])
    for part in found["parts"]:
        assert part["verification"]["relative"] <= part["verification"]["bound"]
        assert part["to"]["dim"] < part["from"]["dim"] and not {"path", "lineage", "files"} & part.keys()
    shared = [note for note in found["notes"] if "was not trained to be cut" in note]
    assert len(shared) == 1 and not shared[0].startswith("part")
    assert any(note.startswith("part 3 of 3 (part2): ") for note in found["notes"])


def test_where_it_comes_from(models: Path, tmp_path: Path) -> None:
    """The command as typed and the merged source, and no word of the folder that parts stood in."""
    found = report("grow", models / "merged", "--to-ffn", 64, "--seed", 3, "-o", "deep/out")
    assert found["command"] == "tlt grow merged --to-ffn 64 --method duplicate --seed 3"
    [parent] = found["lineage"]["parents"]
    assert parent == {"source": "merged", "sha256": open_checkpoint(models / "merged").digest()}
    assert [step["operation"] for step in found["lineage"]["history"]] == ["merge"]
    assert found["source"] == str(models / "merged") and found["path"] == "deep/out"
    files = contents(Path("deep/out"))
    assert sorted(files) == sorted(contents(models / "merged"))
    for name, content in files.items():
        for secret in (str(tmp_path), ".parts", "taken", "/made"):
            assert secret.encode() not in content, (name, secret)
    groups = json.loads(files["config.json"])["groups"]
    before = json.loads((models / "merged" / "config.json").read_text())["groups"]
    for key in ("name", "sha256"):
        assert [part[key] for part in groups["parts"]] == [part[key] for part in before["parts"]]
    assert groups["weights"] == list(WEIGHTS)
    assert "tlt grow merged --to-ffn 64" in files["README.md"].decode()


def test_what_lies_beside_goes_along(models: Path) -> None:
    """A table of the family's own among it, without which none of the parts could be read."""
    shutil.copytree(models / "merged", "merged")
    table = Path(tlt_cli.__file__).parent / "families" / "llama.toml"
    Path("merged/tlt.toml").write_text(table.read_text())
    Path("merged/LICENSE.txt").write_text("do what you like")
    for command, options in (("grow", ["--to-ffn", 64]), ("slice", ["--ffn", 20]), ("slice", ["--block", "1/2"])):
        report(command, "merged", *options, "-o", "out", "--force")
        for name in ("tlt.toml", "LICENSE.txt"):
            assert Path("out", name).read_bytes() == Path("merged", name).read_bytes()


def test_shards_stay_shards(models: Path) -> None:
    sources = models / "part0", models / "part1"
    assert tlt("merge", *sources, "--weights", "1/4,3/4", "--max-shard-size", "60KB", "-o", "sharded").exit_code == 0
    found = report("grow", "sharded", "--to-ffn", 64)
    weights = [file["name"] for file in found["files"] if "header_bytes" in file]
    assert len(weights) == len(list(Path("sharded").glob("*.safetensors"))) > 2
    report("grow", models / "merged", "--to-ffn", 64, "-o", "one")
    stored = {name: value for one in weights for name, value in load_file(Path(found["path"], one)).items()}
    whole = load_file("one/model.safetensors")
    assert stored.keys() == whole.keys() and all(torch.equal(stored[name], whole[name]) for name in whole)


def test_in_a_notebook(models: Path) -> None:
    for command, options, typed in (
        ("grow", {"to_ffn": 64}, ["--to-ffn", 64]),
        ("slice", {"ffn": 20}, ["--ffn", 20]),
        ("factor", {"rank": 4}, ["--rank", 4]),
    ):
        found = getattr(tlt_cli, command)(models / "merged", f"{command}-note", quiet=True, **options)
        assert len(found["parts"]) == 2
        report(command, models / "merged", *typed, "-o", f"{command}-typed")
        assert contents(Path(f"{command}-note")) == contents(Path(f"{command}-typed"))


def test_the_text_is_read_by_all_together(models: Path) -> None:
    text = models / "text.txt"
    found = report("factor", models / "merged", "--rank", 6, "--eval", text, "-o", "out")
    read = json.loads(tlt("eval", "out", "--data", text, "--json").stdout)
    assert found["verification"]["perplexity"] == pytest.approx(read["perplexity"], rel=1e-6)
    bound = ["--max-perplexity", read["perplexity"] * 0.9]
    line = refused("factor", models / "merged", "--rank", 6, "--eval", text, *bound, "-o", "no")
    assert "--max-perplexity allows" in line
    cut = report("slice", models / "merged", "--ffn", 20, "--data", text, "-o", "cut")
    ids = torch.tensor(list(TEXT.encode()))[:128].reshape(2, 64)
    with torch.no_grad():
        lost = distance(remote(models / "merged")(ids).logits, remote(Path("cut"))(ids).logits)
    assert cut["verification"]["lost"]["kl"] == pytest.approx(lost.kl, rel=1e-4) and lost.kl > 1e-3


def test_two_ranks_write_the_bytes_of_one(models: Path) -> None:
    command = ("grow", models / "merged", "--to-ffn", 64, "--max-shard-size", "60KB")
    first, second = run_ranks(Path(), (*command, "-o", "shared"))
    assert (first.code, first.stdout, second.code, second.stdout) == (0, "shared\n", 0, ""), (first, second)
    report(*command, "-o", "alone")
    assert contents(Path("shared")) == contents(Path("alone"))
    assert sorted(path.name for path in Path().iterdir()) == ["alone", "shared"]


# --- the way back ------------------------------------------------------------------------------------------------


def test_a_growth_is_undone(models: Path) -> None:
    """Of all together, of one taken out first, and of one taken out and cut at once; and two growths one by one."""
    how = ["--method", "identity", "--noise", 0]
    report("grow", models / "merged", "--to-dim", 128, *how, "-o", "grown")
    report("grow", "grown", "--to-ffn", 256, *how, "-o", "twice")
    once = report("slice", "twice", "--ffn", 192, "-o", "once")
    back = report("slice", "once", "--dim", 32, "-o", "back")
    for found in (once, back):
        assert [part["undoes"] for part in found["parts"]] == ["grow", "grow"] and found["exact"] is True
    assert same_bits(Path("back"), models / "merged") and not same_bits(Path("once"), models / "merged")
    assert json.loads(Path("back/config.json").read_text()) == json.loads((models / "merged/config.json").read_text())
    at_once = report("slice", "grown", "--block", "2/2", "--dim", 32, "-o", "one")
    assert at_once["undoes"] == "grow" and at_once["block"] == "2/2" and same_bits(Path("one"), models / "part1")
    report("slice", "twice", "--block", "1/2", "-o", "taken")
    for size, name in ((["--ffn", 192], "first"), (["--dim", 32], "second")):
        step = report("slice", "taken", *size, "-o", name)
        assert step["undoes"] == "grow"
        shutil.rmtree("taken")
        shutil.move(name, "taken")
    assert same_bits(Path("taken"), models / "part0")
    assert "undoes" not in report("slice", "grown", "--dim", 64, "-o", "cut")["parts"][0]
    report("merge", "grown", models / "part2", "-o", "mixed")
    assert "undoes" not in report("slice", "mixed", "--block", "1/3", "--dim", 32, "-o", "no")


def test_one_of_them_cut(models: Path) -> None:
    """Taken out and sliced in two steps, or in one that says both."""
    options = ["--ffn", 20, "--heads", 2]
    found = report("slice", models / "merged", "--block", "2/2", *options, "-o", "one")
    report("slice", models / "merged", "--block", "2/2", "-o", "taken")
    report("slice", "taken", *options, "-o", "two")
    assert same_bits(Path("one"), Path("two"))
    assert json.loads(Path("one/config.json").read_text()) == json.loads(Path("two/config.json").read_text())
    assert found["command"] == "tlt slice merged --ffn 20 --heads 2 --block 2/2" and found["block"] == "2/2"
    assert [parent["source"] for parent in found["lineage"]["parents"]] == ["merged"]
    stock_logits(Path("one"), some_ids(300))
    chosen = [*options, "--order", "importance", "--calibration", models / "text.txt"]
    report("slice", models / "merged", "--block", "2/2", *chosen, "-o", "chosen")
    assert not same_bits(Path("chosen"), Path("one"))


# --- what is refused, and what is left then ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["grow", "merged", "--to-layers", 3], 1, "part 1 of 2 (part0): nothing to grow"),
        (["slice", "merged", "--layers", 2], 1, "part 2 of 2 (part1): nothing to slice"),
        (["slice", "merged", "--layers", 3], 1, "part 1 of 2 (part0): nothing to slice"),
        (["grow", "deep", "--to-dim", 48], 1, "part 3 of 3 (part2): nothing to grow"),
        (["grow", "merged"], 2, "error: nothing to grow: say at least one of"),
        (["grow", "merged", "--to-ffn", 64, "--optimizer-state", "none"], 2, "several side by side"),
        (["grow", "merged", "--to-ffn", 64, "--max-shard-size", "big"], 2, "--max-shard-size 'big' is not"),
        (["grow", "merged", "--to-ffn", 64, "--max-shard-size", "1GB", "-o", "x.st"], 2, "cannot be sharded"),
        (["grow", "merged", "--to-ffn", 10**12], 1, "would take"),
        (["slice", "merged", "--ffn", 20, "--data", "missing.txt"], 1, "missing.txt"),
        (["slice", "merged", "--ffn", 20, "--data", "missing.txt", "--dry-run"], 1, "missing.txt"),
        (["slice", "merged", "--dim", 16, "--order", "pca", "--dry-run"], 2, "--order pca decides by values"),
        (["slice", "merged", "--dim", 16, "--order", "pca", "--block", "1/2", "--dry-run"], 2, "--order pca decides"),
        (["slice", "merged", "--dim", 16, "--block", "1/3"], 1, "take one out with --block 1/2"),
        (["slice", "merged", "--level", 1, "--block", "1/2"], 1, "take it out, then slice its level"),
        (["slice", "merged", "--level", 1], 1, "part 1 of 2 (part0): --level 1: config.json names no levels"),
        (["slice", "part0", "--dim", 16, "--block", "1/2"], 2, "take them, or sizes"),
        (["factor", "merged", "--rank-sweep"], 1, "2 models side by side; a sweep of ranks needs one model"),
        (["factor", "merged", "--energy", 0.9, "--dry-run"], 2, "--energy decides by values"),
        (["factor", "merged", "--rank", 2, "--only", "nothing"], 2, "no matrix of the checkpoint"),
    ],
)
def test_what_is_refused(models: Path, command: list[Any], code: int, message: str) -> None:
    assert message in refused(command[0], models / command[1], *command[2:], code=code)


def test_a_text_of_other_tokens_is_refused(models: Path) -> None:
    for source in ("merged", "part0"):
        said = refused("slice", models / source, "--vocab", 5, "--data", models / "text.txt", code=1)
        assert "the text has none of the model's 5 tokens" in said


@pytest.mark.parametrize("kind", ["glued", "folded"])
def test_parts_that_are_no_models_any_more(models: Path, kind: str) -> None:
    source = models / "part0"
    merge([source, source], Path("glued"), (0.5, 0.5), glue="blocks")
    if kind == "folded":
        tlt_cli.fold("glued", "folded", quiet=True)
    why = "glued together" if kind == "glued" else "folded into one another"
    for command, options, done in (
        ("grow", ["--to-ffn", 64], "grown"), ("slice", ["--ffn", 20], "sliced"), ("factor", ["--rank", 2], "factored"),
        ("slice", ["--ffn", 20, "--block", "1/2"], "sliced"),
    ):  # fmt: skip
        line = refused(command, kind, *options, "-o", "out")
        assert f"are {why}, so none of them can be {done} by itself" in line and "and merge again" in line


class Stopped(Exception):
    """Something that nobody foresaw."""


@pytest.mark.parametrize("how", [KeyboardInterrupt, Stopped, TltError])
@pytest.mark.parametrize("forced", [False, True])
def test_nothing_is_left(models: Path, monkeypatch: pytest.MonkeyPatch, how: type[BaseException], forced: bool) -> None:
    """Stopped while the second part is worked on, whatever stops it; an output that was there stays."""
    if forced:
        report("grow", models / "merged", "--to-ffn", 56, "-o", "out")
    before, real, seen = contents(Path()), growing.verify, list[int]()

    def stopped(*given: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            assert [path.name for path in Path().iterdir() if path.is_dir() and path.name != "out"] == [
                "out.parts.partial"
            ]
            raise how("stopped")
        return real(*given, **options)

    monkeypatch.setattr(growing, "verify", stopped)
    command = ("grow", models / "merged", "--to-ffn", 64, "-o", "out", *(["--force"] if forced else []))
    if how is Stopped:
        with pytest.raises(Stopped):
            tlt(*command)
    else:
        assert tlt(*command).exit_code == (1 if how is TltError else 130)
    assert len(seen) == 2 and contents(Path()) == before
    assert [path.name for path in Path().iterdir()] == (["out"] if forced else [])


def test_a_killed_run_is_cleared_away(models: Path) -> None:
    child = os.fork()
    if child == 0:  # never returns
        slicing.check_slice = lambda *_: os._exit(9)  # type: ignore[assignment]
        tlt("slice", models / "merged", "--ffn", 20, "-o", "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(path.name == "out.parts.partial" for path in Path().iterdir())
    report("slice", models / "merged", "--ffn", 20, "-o", "out", "--dry-run")
    report("slice", models / "merged", "--ffn", 20, "-o", "out")
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_a_wrong_mean_is_not_written(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge of what became of the parts is proved as every merge is."""
    weights = surgery.Groups.weights
    monkeypatch.setattr(surgery.Groups, "weights", property(lambda groups: tuple(reversed(weights.fget(groups)))))  # type: ignore[attr-defined]
    mixed: Mapping[str, Any] = {"mean": surgery.padded}
    monkeypatch.setattr(surgery, "padded", lambda block, *rest: mixed["mean"](block * 1.01, *rest))
    assert "verification failed" in refused("slice", models / "merged", "--ffn", 20, "-o", "out")
    assert tlt("slice", models / "merged", "--ffn", 20, "-o", "out", "--no-verify").exit_code == 0
