"""Glue on the command line: merged in, trained alone, looked at, measured stream by stream, folded away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import apart, modules_cache, remote  # noqa: F401
from family_zoo import make_checkpoint, some_ids
from growing import opened
from merging import noisy, same_bits, sampled, weights_of
from test_cli_merge import TEXT, elsewhere, report, tlt  # noqa: F401

import tlt_cli
from tlt_cli.cli import streams
from tlt_cli.model.compare import distance
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.text import EVERY_BYTE
from tlt_cli.surgery import verify_slice

KL = 1e-4  # nats, in bfloat16
pytestmark = pytest.mark.usefixtures("modules_cache", "elsewhere")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a text in two streams, their merge with glue, and that trained."""
    folder = tmp_path_factory.mktemp("glue")
    for number in range(2):
        make_checkpoint(folder / f"part{number}", "llama", tied=True, seed=number, vocab_size=300)
    for number, text in enumerate((TEXT, TEXT[::-1])):
        (folder / f"{number}.txt").write_text(text)
    parts = [folder / "part0", folder / "part1"]
    tlt_cli.merge(parts, folder / "glued", glue="lowrank", glue_rank=2, quiet=True)
    tlt_cli.train(
        folder / "glued", folder / "trained", data=[folder / "0.txt"], only=["*glue*"], steps=8, context=16, quiet=True
    )
    return folder


def test_it_is_put_in_and_is_exact(made: Path) -> None:
    found = report("merge", made / "part0", made / "part1", "--glue", "lowrank", "--glue-rank", 2, "-o", "glued")
    assert found["exact"] and found["verification"]["relative"] <= found["verification"]["bound"]
    assert found["glue"]["rank"] == 2 and len(found["glue"]["sites"]) == 8
    assert found["command"] == "tlt merge part0 part1 --glue lowrank --glue-rank 2"
    assert same_bits(Path("glued"), made / "glued")
    report("merge", made / "part0", made / "part1", "--glue", "lowrank", "--seed", 1, "-o", "other")
    assert not same_bits(Path("other"), made / "glued")
    dry = report("merge", made / "part0", made / "part1", "--glue", "full", "-o", "dry", "--dry-run")
    assert dry["glue"]["kind"] == "full" and not Path("dry").exists()


def test_what_is_merged_already_gets_glue(made: Path) -> None:
    """The same as merging with glue at once; without glue there is nothing to do, nor of a single model."""
    report("merge", made / "part0", made / "part1", "-o", "merged")
    report("merge", "merged", "--glue", "lowrank", "--glue-rank", 2, "-o", "late")
    assert same_bits(Path("late"), made / "glued")
    groups = [json.loads((folder / "config.json").read_text())["groups"] for folder in (Path("late"), made / "glued")]
    assert groups[0] == groups[1]
    for source, more, code, match in (
        ("merged", (), 2, "merged already takes --glue"),
        (made / "part0", ("--glue", "full"), 1, "takes two or more"),
        (made / "glued", ("--glue", "full"), 1, "glued together"),
    ):
        result = tlt("merge", source, *more, "-o", "none")
        assert result.exit_code == code and match in result.stderr and not Path("none").exists()


def test_nothing_else_is_trained(made: Path) -> None:
    before, after = weights_of(made / "glued"), weights_of(made / "trained")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".glue" in name}
    configs = [json.loads((made / name / "config.json").read_text()) for name in ("glued", "trained")]
    assert configs[0]["groups"] == configs[1]["groups"]
    result = tlt("slice", made / "glued", "--block", "2/2", "-o", "still")
    assert result.exit_code == 0 and same_bits(Path("still"), made / "part1")
    result = tlt("slice", made / "trained", "--block", "2/2", "-o", "no")
    assert result.exit_code == 1 and "glued together; taking one out needs them apart" in result.stderr


def test_it_folds(made: Path) -> None:
    found = report("fold", made / "trained", "-o", "folded", "--data", made / "0.txt")
    proof = found["verification"]
    assert proof["relative"] <= proof["bound"] and proof["kl"] <= 1e-8 and proof["tokens"] > 128
    assert found["folded"] == 22 and "matrix of its own" in found["notes"][0]
    ids = some_ids(300)
    with torch.no_grad():
        exact = [remote(folder, dtype=torch.float64)(ids).logits for folder in (Path("folded"), made / "trained")]
    assert apart(*exact) <= 1e-5, "run in float64, so that all that is left is the rounding of the file"
    assert tlt("generate", "folded", "--prompt", "a", "--max-tokens", 3, "--temperature", 0).exit_code == 0
    assert "folded into one another: model.layers" in tlt("inspect", "folded").stderr
    assert tlt("train", "folded", "--data", made / "0.txt", "--steps", 2, "--context", 16, "-o", "on").exit_code == 0
    for command, match in (
        (("slice", "folded", "--block", "1/2"), "folded into one another; taking one out"),
        (("merge", "folded", made / "part0"), "folded into one another; merging"),
        (("fold", "folded"), "no glue between"),
        (("factor", "folded", "--rank", 2), "folded into one another, so none of them can be factored"),
    ):
        result = tlt(*command)
        assert result.exit_code == 1 and match in result.stderr


def test_it_folds_in_bfloat16(tmp_path: Path) -> None:
    """Rounding alone is far below what the glue does."""
    for number in range(2):
        make_checkpoint(tmp_path / f"p{number}", "llama", seed=number, vocab_size=300, dtype=torch.bfloat16)
    (tmp_path / "t.txt").write_text(TEXT)
    report("merge", "p0", "p1", "--glue", "lowrank", "--glue-rank", 2, "-o", "glued")
    steps = ("--steps", 8, "--context", 16, "--lr", 0.01, "-q")
    assert tlt("train", "glued", "--only", "*glue*", "--data", "t.txt", *steps, "-o", "trained").exit_code == 0
    result = tlt("fold", "trained", "-o", "folded", "--data", "t.txt", "--json")
    proof = json.loads(result.stdout)["verification"]
    assert EVERY_BYTE in result.stderr, "what there is to say of a text is said"
    assert proof["written"]["kl"] <= KL
    before, after = (remote(Path(name), dtype=torch.float32) for name in ("glued", "trained"))
    with torch.no_grad():
        assert distance(*(model(some_ids(300)).logits for model in (before, after))).kl >= 10 * KL


def test_models_of_unlike_positions(tmp_path: Path) -> None:
    """All together read no further than the one of the fewest positions, with nothing said of it."""
    for number, positions in enumerate((64, 32)):
        make_checkpoint(tmp_path / f"p{number}", "gpt2", seed=number, vocab_size=300, n_positions=positions)
    (tmp_path / "t.txt").write_text(TEXT)
    report("merge", "p0", "p1", "--glue", "lowrank", "-o", "glued")
    steps = ("--steps", 2, "--batch-size", 2, "-q", "-o", "trained")
    assert tlt("train", "glued", "--only", "*glue*", "--data", "t.txt", *steps).exit_code == 0
    assert report("fold", "trained", "-o", "folded")["verification"]["tokens"] == 2 * 32
    found = report("eval", "trained", "folded", "--data", "t.txt")["models"]
    assert [one["context"] for one in found] == [32, 32]
    assert found[0]["nll"] == pytest.approx(found[1]["nll"], abs=1e-5)
    assert report("eval", "glued", "p0", "--streams", "--data", "t.txt")["context"] == 32
    report("merge", "p0", "p1", "-o", "plain")
    assert report("merge", "plain", "p0", "-o", "again")["verification"]["tokens"] == 2 * 32


def test_inspect_says_where_it_is(made: Path) -> None:
    lines = [line for line in tlt("inspect", made / "trained").stderr.splitlines() if "glue" in line]
    assert sum("folds into" in line for line in lines) == 8
    assert any("would not fold: the residual stream" in line for line in lines)
    assert any("lm_head" in line and "untied" in line for line in lines)
    sites = report("inspect", made / "trained")["glue"]
    assert [site["rank"] for site in sites if site["folds"]] == [2] * 8


def test_streams(made: Path) -> None:
    """Each part, all without glue, and with it, are what they are by themselves."""
    tlt("fold", made / "trained", "-o", "folded", "-q")
    streams = ("--data", made / "0.txt", "--data", made / "1.txt")
    found = report("eval", made / "trained", "folded", "--streams", *streams)
    alone = [made / "part0", made / "part1", made / "glued", made / "trained", "folded"]
    assert found["streams"] == ["0.txt", "1.txt"] and len(found["models"]) == len(alone)
    for row, source in zip(found["models"], alone, strict=True):
        for name in found["streams"]:
            expected = report("eval", source, "--data", made / name)
            assert row["losses"][name]["nll"] == pytest.approx(expected["nll"], abs=1e-5)
    losses = [row["losses"]["0.txt"]["nll"] for row in found["models"]]
    assert losses[3] == pytest.approx(losses[4], abs=1e-5) and losses[3] < losses[2] - 0.01
    result = tlt("eval", made / "glued", "--streams", *streams)
    table = result.stdout.splitlines()
    assert table[0] == "model\t0.txt\t1.txt" and len(table) == 5
    assert result.stderr.count(EVERY_BYTE) == 1
    assert tlt("eval", made / "glued", "--streams").exit_code == 2
    assert tlt("eval", made / "glued", "--streams", "--levels", *streams).exit_code == 2


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two noisy copies of a model and a text that it said: each can learn from the other."""
    folder = tmp_path_factory.mktemp("worse")
    clean = opened(make_checkpoint(folder / "clean", "llama", tied=True, vocab_size=300))
    ids = sampled(clean, 24, 64, (32, 127))
    (folder / "t.txt").write_text("".join(map(chr, ids.flatten().tolist())))
    return [*(part.folder for part in noisy(clean, folder, 2)), folder / "t.txt"]


FITTED = ("--glue", "blocks", "--glue-init", "fit", "--calibration")


def test_streams_that_hold_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--stream is for every row: parts alone, all without glue, and the model."""
    held, plain = list[bool](), streams.perplexity

    def seen(decoder: Decoder, *more: Any) -> Any:
        held.append(not all(tensor.is_meta for tensor in decoder.stored.values()))
        return plain(decoder, *more)

    monkeypatch.setattr(streams, "perplexity", seen)
    command = ("eval", made / "trained", "--streams", "--data", made / "0.txt")
    losses = [
        [row["losses"]["0.txt"]["nll"] for row in report(*command, *more)["models"]] for more in ((), ("--stream",))
    ]
    assert held == [True] * 4 + [False] * 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_start_that_is_fitted(worse: list[Path]) -> None:
    """It is no longer the mean of the models, and says how far from it; it is what was planned."""
    found = report("merge", *worse[:2], *FITTED, worse[2], "-o", "f")
    fitted = found["glue"]["fit"]
    assert found["command"].endswith("--glue blocks --glue-init fit --calibration t.txt")
    assert fitted["share"] > 0 and fitted["losses"]["0.0"] >= fitted["losses"][str(fitted["share"])] + 0.01
    assert not found["exact"] and found["damage"]["random"]["kl"] > 1e-3
    assert found["verification"]["relative"] <= found["verification"]["bound"]
    read = [report("eval", name, "--data", worse[2], "--context", 64)["nll"] for name in (worse[0], worse[1], "f")]
    report("merge", *worse[:2], "-o", "mean")
    assert read[2] < report("eval", "mean", "--data", worse[2], "--context", 64)["nll"] - 0.01
    dry = report("merge", *worse[:2], *FITTED, worse[2], "-o", "f", "--dry-run", "--force")
    assert {file["name"]: file["bytes"] for file in dry["files"]} == {
        path.name: path.stat().st_size for path in Path("f").iterdir()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_fitted_start_is_not_written(worse: list[Path], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is held against the plan: other shares in it are seen, in a coarse dtype too."""
    read = verify_slice.load_checkpoint

    def broken(checkpoint: Any, fitted: Any, **options: Any) -> Any:
        decoder = read(checkpoint, fitted, **options)
        decoder.description["groups"]["weights"] = [0.52, 0.48]
        return decoder

    command = ("merge", *worse[:2], *FITTED, worse[2], "--dtype", dtype, "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(verify_slice, "load_checkpoint", broken)
        result = tlt(*command)
    assert result.exit_code == 1 and "verification failed" in result.stderr and not Path("out").exists()
    assert report(*command)["verification"]["relative"] <= 1e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--glue", "paste"), "none, lowrank, full, blocks"),
        (("--glue-rank", 2), "goes with --glue lowrank"),
        (("--glue", "lowrank", "--glue-rank", 100), "more than the 64"),
        (("--glue-init", "fit"), "there is none"),
        (("--glue", "full", "--glue-init", "guess"), "identity or fit"),
        (("--glue", "full", "--layout", "stock"), "--layout grouped"),
        (("--glue", "full", "--calibration", "t.txt"), "--glue-init fit"),
    ],
)
def test_what_is_refused(made: Path, options: tuple[str | int, ...], match: str) -> None:
    result = tlt("merge", made / "part0", made / "part1", "-o", "out", *options)
    assert result.exit_code == 2 and match in result.stderr and not Path("out").exists()
