"""`tlt merge` as typed: what it prints and writes, what every other command makes of it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import apart, modules_cache, remote  # noqa: F401
from family_zoo import make_checkpoint, some_ids, stock_logits
from merging import same_bits
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import tlt_cli
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.cli import app, vocabularies
from tlt_cli.errors import TltError
from tlt_cli.model.modeling import modeling_source
from tlt_cli.surgery import verify_merge

TREE = ("--lora-tree", 1, "--rank", 2, "--lr", 0.03)
CARD = "---\nlicense: {license}\nlanguage: en\nbase_model: somebody/{name}\n---\n# A model\n"
TEXT = "Es war einmal ein kleines Modell, das rechnete wie zwei. " * 30
pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models of one vocabulary, one wider than the others, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for number, own in enumerate(({}, {}, {"hidden_size": 48})):
        make_checkpoint(folder / f"part{number}", "llama", seed=number, vocab_size=300, **own)
    (folder / "t.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has an empty current folder, and lines that no terminal breaks."""
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.delenv("TLT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


def tlt(*arguments: str | Path | int) -> Any:
    """Run a command in this process. An unforeseen exception is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def report(*arguments: str | Path | int) -> dict[str, Any]:
    result = tlt(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    read: dict[str, Any] = json.loads(result.stdout)
    return read


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_one_line_and_a_folder(made: Path) -> None:
    result = tlt("merge", made / "part0", made / "part1")
    assert (result.exit_code, result.stdout) == (0, "part0-merged2\n")
    ids = some_ids(300)
    mean = (stock_logits(made / "part0", ids) + stock_logits(made / "part1", ids)) / 2
    assert apart(remote(Path("part0-merged2"))(ids).logits, mean) <= 1e-5
    assert sorted(files(Path("part0-merged2"))) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_tlt.py",
    ]  # fmt: skip


def test_json_lineage_and_repetition(made: Path) -> None:
    sources = [made / f"part{number}" for number in range(3)]
    found = report("merge", *sources, "--weights", "1/2,1/4,0.25", "-o", "out")
    assert [model["weight"] for model in found["models"]] == [0.5, 0.25, 0.25]
    assert found["sizes"]["hidden"] == 48 and found["verification"]["relative"] <= found["verification"]["bound"]
    assert [parent["source"] for parent in found["lineage"]["parents"]] == ["part0", "part1", "part2"]
    assert found["command"] == "tlt merge part0 part1 part2 --weights 0.5,0.25,0.25"
    assert any("filled up with zeros" in note and "hidden 32 of 48" in note for note in found["notes"])
    before = files(Path("out"))
    dry = report("merge", *sources, "--weights", "0.5,0.25,0.25", "-o", "out", "--dry-run", "--force")
    assert files(Path("out")) == before and dry["dry_run"]
    assert {file["name"]: file["bytes"] for file in dry["files"]} == {name: len(text) for name, text in before.items()}
    report("merge", *sources, "--weights", "0.5,0.25,0.25", "-o", "out", "--force", "--jobs", 1)
    assert files(Path("out")) == before
    again = report("merge", "out", made / "part1", "-o", "again")
    assert [step["operation"] for step in again["lineage"]["history"]] == ["merge"]
    assert [model["weight"] for model in again["models"]] == [0.25, 0.125, 0.125, 0.5]


def test_every_command_takes_it(made: Path) -> None:
    """eval, generate, inspect, train whole and in part, a LoRA beside it, and the way back."""
    assert tlt("merge", made / "part0", made / "part2", "-o", "m.safetensors", "-q").exit_code == 0
    text = made / "t.txt"
    first = report("eval", "m.safetensors", "--data", text)["perplexity"]
    assert report("eval", "m.safetensors", "--data", text, "--stream")["perplexity"] == pytest.approx(first, rel=1e-4)
    assert tlt("generate", "m.safetensors", "--prompt", "a", "--max-tokens", 4, "--temperature", 0).exit_code == 0
    assert "part0 (0.5), part2 (0.5)" in tlt("inspect", "m.safetensors").stderr
    short = ("--data", text, "--steps", 15, "--context", 16, "-q")
    for name, how in {"all": (), "some": ("--only", "*.mlp.*"), "lora": ("--lora", 2), "tree": TREE}.items():
        made_of = name if name in ("lora", "tree") else f"{name}.safetensors"
        result = tlt("train", "m.safetensors", *short, *how, "-o", made_of)
        assert result.exit_code == 0, result.stderr
        assert report("eval", made_of, "--data", text)["perplexity"] < 0.9 * first
    for number, part in ((1, "part0"), (2, "part2")):
        result = tlt("slice", "m.safetensors", "--block", f"{number}/2", "-o", f"back{number}")
        assert result.exit_code == 0, result.stderr
        assert same_bits(Path(f"back{number}"), made / part)
    result = tlt("slice", "all.safetensors", "--block", "1/2", "-o", "trained")
    assert result.exit_code == 0, result.stderr
    stock_logits(Path("trained"), some_ids(300))
    assert not same_bits(Path("trained"), made / "part0")


@pytest.mark.parametrize(
    ("command", "match"),
    [
        (("factor", "m", "--rank-sweep"), "2 models side by side; a sweep of ranks needs one"),
        (("train", "m", "--data", "t.txt", "--steps", 1, "--regularizer", "nuclear"), "several side by side"),
        (("train", "m", "--data", "t.txt", "--steps", 1, "--optimizer", "muon"), "merged models have a matrix of each"),
    ],
)
def test_commands_for_one_model_say_so(made: Path, command: tuple[str | int, ...], match: str) -> None:
    tlt("merge", made / "part0", made / "part1", "-o", "m", "--no-verify", "-q")
    Path("t.txt").write_text(TEXT)
    result = tlt(*command)
    assert result.exit_code in (1, 2) and match in result.stderr.splitlines()[-1]


def test_cards(made: Path) -> None:
    """All models are base models; a licence is stated where all have it."""
    for number, license in enumerate(("mit", "mit", "apache-2.0")):
        card = CARD.format(license=license, name=f"model{number}")
        (made / f"part{number}" / "README.md").write_text(card)
    assert tlt("merge", made / "part0", made / "part1", "-o", "same").exit_code == 0
    same = Path("same/README.md").read_text()
    assert "license: mit" in same and "- somebody/model0\n- somebody/model1\n" in same
    assert tlt("merge", made / "part0", made / "part2", "-o", "other").exit_code == 0
    other = Path("other/README.md").read_text()
    assert "license:" not in other and "language: en" in other and "under several licences" in other
    for number in range(3):
        (made / f"part{number}" / "README.md").unlink()


def _tokenizer(folder: Path, **changed: int) -> None:
    vocab = {f"w{number}": number for number in range(300)}
    for token, number in changed.items():
        vocab = {word: at for word, at in vocab.items() if at != number} | {token: number}
    engine = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save(str(folder / "tokenizer.json"))


def test_vocabularies_are_compared_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = (make_checkpoint(tmp_path / name, "llama", vocab_size=300) for name in ("one", "two", "three"))
    _tokenizer(one)
    _tokenizer(two)
    with monkeypatch.context() as patch:  # the same file need not be read to be the same
        patch.setattr(vocabularies, "load_tokenizer", lambda *_: 1 / 0)
        assert tlt("merge", one, two, "-o", "alike").exit_code == 0
    result = tlt("merge", one, two, three, "-o", "same")
    assert result.exit_code == 0 and "three has no tokenizer beside it" in result.stderr
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
    _tokenizer(two, other=17)
    result = tlt("merge", three, one, two, "-o", "differ")
    assert result.exit_code == 1 and "'w17' is id 17 in the first and missing in the second" in result.stderr
    assert not Path("differ").exists()
    larger = make_checkpoint(tmp_path / "larger", "llama", vocab_size=301)
    result = tlt("merge", one, larger, "-o", "differ")
    assert result.exit_code == 1 and "one has 300 tokens and larger 301" in result.stderr


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ("1,2", "add up to 3; those of a mean add up to 1"),
        ("0.5", "1 numbers for 2"),
        ("a,b", "expected a number for each model"),
        ("1/0,1", "expected a number for each model"),
        ("1,0", "no share"),
        ("nan,1", "expected a number for each model"),
    ],
)
def test_weights_that_are_none(made: Path, weights: str, match: str) -> None:
    result = tlt("merge", made / "part0", made / "part1", "--weights", weights, "-o", "out")
    assert result.exit_code == 2 and match in result.stderr and not Path("out").exists()


@pytest.mark.parametrize(
    ("sources", "weights", "code", "match"),
    [(("part0", "part1"), "1,2", 2, "add up to 3"), (("part0", "other"), "1/2,1/2", 1, "a llama and other a qwen2")],
)
def test_refused_before_anything_is_hashed(
    made: Path, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...], weights: str, code: int, match: str
) -> None:
    """Hashing reads all of every file: what headers and options tell comes first."""
    make_checkpoint(Path("other"), "qwen2", vocab_size=300)

    def hashed(_: Checkpoint) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr(Checkpoint, "digest", hashed)
    paths = [Path(name) if name == "other" else made / name for name in sources]
    result = tlt("merge", *paths, "--weights", weights, "-o", "out")
    assert result.exit_code == code and match in result.stderr and not Path("out").exists()
    with pytest.raises(AssertionError, match="hashed"):
        tlt("merge", made / "part0", made / "part1", "-o", "out")


def test_the_code_goes_along_where_it_is_needed(made: Path) -> None:
    """Beside every folder whose config.json names it, whatever lay beside the source, and said where there is no
    folder."""
    code = "modeling_tlt.py"
    said = tlt("merge", made / "part0", made / "part1", "--glue", "lowrank", "-o", "m.safetensors").stderr
    assert said.count(f"m.safetensors has no place for {code}") == 1
    assert tlt("fold", "m.safetensors", "-o", "folded").exit_code == 0 and Path("folded", code).exists()
    Path("t.txt").write_text("a model of models " * 200)
    trained = tlt("train", "m.safetensors", "--data", "t.txt", "--steps", 1, "--context", 16, "-o", "trained")
    assert trained.exit_code == 0 and Path("trained", code).exists()
    assert f"f.safetensors has no place for {code}" in tlt("fold", "m.safetensors", "-o", "f.safetensors").stderr
    said = tlt("factor", made / "part0", "--rank", 4, "-o", "low.safetensors").stderr
    assert f"low.safetensors has no place for {code}" in said
    assert tlt("factor", made / "part0", "--rank", 4, "-o", "low").exit_code == 0 and Path("low", code).exists()
    assert tlt("merge", made / "part0", made / "part1", "-o", "merged").exit_code == 0
    Path("merged", code).write_text("of another version")
    for command in (("fold", "low", "-o", "plain"), ("slice", "merged", "--block", "1/2", "-o", "part")):
        assert tlt(*command).exit_code == 0 and not Path(command[-1], code).exists()
    assert tlt("merge", "merged", made / "part0", "-o", "again").exit_code == 0
    assert Path("again", code).read_bytes() == modeling_source()


def test_outputs_that_are_refused(made: Path, tmp_path: Path) -> None:
    assert tlt("merge", made / "part0", "-o", "out").exit_code == 2
    before = [files(made / part) for part in ("part0", "part1")]
    for taken in ("part0", "part1"):
        result = tlt("merge", made / "part0", made / "part1", "-o", made / taken, "--force")
        assert result.exit_code != 0 and [files(made / part) for part in ("part0", "part1")] == before
    assert tlt("merge", made / "part0", made / "part1", "-o", "out", "-q").exit_code == 0
    assert tlt("merge", made / "part0", made / "part1", "-o", "out").exit_code == 1


def test_a_wrong_merge_is_not_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is verified is the file: bytes of another model in it are seen."""
    plan = verify_merge.load_checkpoint

    def broken(checkpoint: Any, fitted: Any, **options: Any) -> Any:
        decoder = plan(checkpoint, fitted, **options)
        if fitted.groups is not None:
            decoder.description["groups"]["weights"] = [0.6, 0.4]
        return decoder

    monkeypatch.setattr(verify_merge, "load_checkpoint", broken)
    result = tlt("merge", made / "part0", made / "part1", "-o", "out")
    assert result.exit_code == 1 and "verification failed" in result.stderr and not Path("out").exists()
    assert tlt("merge", made / "part0", made / "part1", "-o", "out", "--no-verify").exit_code == 0


@torch.no_grad()
def test_another_dtype(made: Path) -> None:
    found = report("merge", made / "part0", made / "part2", "--dtype", "bfloat16", "-o", "coarse")
    assert found["verification"]["written"]["relative"] > found["verification"]["relative"]
    ids, weights = some_ids(300), remote(Path("coarse")).dtype
    mean = (stock_logits(made / "part0", ids) + stock_logits(made / "part2", ids)) / 2
    assert (
        weights == torch.bfloat16 and 1e-4 < apart(remote(Path("coarse"), dtype=torch.float32)(ids).logits, mean) < 0.1
    )


def test_in_a_notebook(made: Path) -> None:
    sources = [made / "part0", made / "part1"]
    found = tlt_cli.merge(sources, "note", weights=[0.25, 0.75], quiet=True)
    assert tlt("merge", *sources, "--weights", "1/4,3/4", "-o", "typed").exit_code == 0
    assert found["path"] == "note" and same_bits(Path("note"), Path("typed"))
    with pytest.raises(TltError, match="add up to"):
        tlt_cli.merge(sources, "other", weights=[1, 1], quiet=True)
