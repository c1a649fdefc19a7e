"""The command line's contract: data on stdout, the rest on stderr, one line per error, exit codes 0, 1, 2 and 130."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from family_zoo import ZOO, make_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers
from typer.testing import CliRunner

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli import app
from tlt_cli.cli.console import Output, Table, printable, run
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families.fit import fit
from tlt_cli.families.table import Family, parse_family
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import Tokenizer, load_tokenizer, load_tokens, pieces
from tlt_cli.model.weights import load_checkpoint

TEXT = "Es war einmal ein größeres Modell, das rechnete wie ein kleines. " * 8


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another one, a bare file, and a text."""
    folder = tmp_path_factory.mktemp("models")
    make_checkpoint(folder / "model", "llama", vocab_size=300)
    make_checkpoint(folder / "other", "gpt2", seed=1, vocab_size=300)
    save_file(load_file(folder / "model" / "model.safetensors"), folder / "bare.st")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.delenv("TLT_DEBUG", raising=False)


def tlt(*arguments: str | Path) -> Any:
    """Run a command in this process; stdout, stderr and the exit code apart. An unforeseen exception is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tlt_cli", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def the_error(result: Any) -> str:
    """The one line of an error; fails where there is more, or less, or data."""
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("tlt: ") or "error" in line]
    assert len(errors) == 1 and errors[0].startswith("tlt: error: "), result.stderr
    return errors[0].removeprefix("tlt: error: ")


# what each command prints


def test_inspect_prints_a_table_a_program_can_read(here: Path) -> None:
    result = tlt("inspect", here / "model")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0] == ["tensor", "axes", "shape", "dtype", "bytes"]
    stored = load_file(here / "model" / "model.safetensors")
    assert [row[0] for row in rows[1:]] == [*open_checkpoint(here / "model").tensors]
    assert {row[0]: row[2] for row in rows[1:]} == {k: "x".join(map(str, v.shape)) for k, v in stored.items()}
    assert sum(int(row[4]) for row in rows[1:]) == sum(v.nbytes for v in stored.values())
    assert "family: llama" in result.stderr and "kv=2, group=2, rotary=4" in result.stderr
    assert tlt("inspect", here / "model", "-q").stderr == ""


def test_inspect_as_json(here: Path) -> None:
    data = json.loads(tlt("inspect", here / "model", "--json").stdout)
    assert data["axes"] == {"vocab": 300, "hidden": 32, "ffn": 48, "layer": 3, "kv": 2, "group": 2, "rotary": 4}
    assert data["family"] == "llama" and data["tied"] is False and data["lineage"] is None
    assert data["parameters"] * 4 == data["bytes"] == sum(tensor["bytes"] for tensor in data["tensors"])
    query = next(tensor for tensor in data["tensors"] if tensor["name"].endswith("0.self_attn.q_proj.weight"))
    assert query["axes"] == "(kv group 2 rotary) <- hidden" and query["shape"] == [32, 32] and query["dtype"] == "F32"


def test_inspect_prints_the_lineage(here: Path, tmp_path: Path) -> None:
    parent = {"source": "small.st", "sha256": "ab" * 32}
    first = {"version": "0.1.0", "operation": "grow", "command": "tlt grow small.st --to-dim 64", "parents": [parent]}
    last = {**first, "command": "tlt grow mid.st --to-dim 128", "history": [first]}
    for name, lineage in {"told.st": last, "odd.st": {"history": 3, "parents": "none"}}.items():
        save_file(load_file(here / "bare.st"), tmp_path / name, {"tlt": json.dumps(lineage)})
    told = tlt("inspect", tmp_path / "told.st", "--axis", "kv=2").stderr
    assert told.index("made by: tlt grow mid.st") < told.index("made by: tlt grow small.st")
    assert f"from small.st, sha256 {'ab' * 32}" in told
    assert "made by" not in tlt("inspect", tmp_path / "odd.st", "--axis", "kv=2").stderr


def test_inspect_needs_no_family(here: Path) -> None:
    """Any safetensors file is listed; why no family fits is a note. What the user claims must be true, though."""
    result = tlt("inspect", here / "bare.st", "--json")
    data = json.loads(result.stdout)
    assert data["family"] is None and data["axes"] == {} and len(data["tensors"]) == 30
    assert "--axis kv=N" in result.stderr
    assert json.loads(tlt("inspect", here / "bare.st", "--json", "--axis", "kv=2").stdout)["axes"]["kv"] == 2
    assert "does not fit" in the_error(tlt("inspect", here / "bare.st", "--axis", "kv=3"))


def test_eval_is_the_perplexity_of_the_model(here: Path) -> None:
    data = json.loads(tlt("eval", here / "model", "--data", here / "text.txt", "--json", "--context", "32").stdout)
    checkpoint = open_checkpoint(here / "model")
    fitted = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    tokens = load_tokens(load_tokenizer([], 300), [here / "text.txt"])
    wanted = perplexity(load_checkpoint(checkpoint, fitted), tokens.ids, 32)
    assert data["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6) and data["tokens"] == wanted["tokens"]
    assert data["corpus_sha256"] == tokens.info["sha256"] and data["context"] == 32 and data["tokenizer"] == "bytes"
    assert data["source"] == str(here / "model")
    streamed = tlt("eval", here / "model", "--data", here / "text.txt", "--json", "--context", "32", "--stream")
    assert json.loads(streamed.stdout)["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)
    other = tlt("eval", here / "model", "--data", here / "text.txt", "--json", "--context", "16")
    assert json.loads(other.stdout)["perplexity"] != pytest.approx(wanted["perplexity"], rel=1e-3)


def test_eval_of_several_is_side_by_side(here: Path, tmp_path: Path) -> None:
    """They are read in the same windows: as long as the shortest-sighted of them can see."""
    wide = make_checkpoint(tmp_path / "wide", "llama", vocab_size=300, max_position_embeddings=128)
    sources = (wide, here / "other")
    models = json.loads(tlt("eval", *sources, "--data", here / "text.txt", "--json").stdout)["models"]
    assert [model["source"] for model in models] == [str(source) for source in sources]
    assert [model["context"] for model in models] == [64, 64] and models[0]["tokens"] == models[1]["tokens"]
    alone = json.loads(tlt("eval", wide, "--data", here / "text.txt", "--json").stdout)
    assert alone["context"] == 128
    lines = tlt("eval", *sources, "--data", here / "text.txt").stdout.splitlines()
    assert lines[0].startswith("source\tperplexity\tnll\ttokens") and len(lines) == 3
    assert float(lines[1].split("\t")[1]) == models[0]["perplexity"]  # unrounded


def test_eval_says_which_text_it_took(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlt_cli.model.text.built_in_text", lambda: TEXT)
    result = tlt("eval", here / "model", "--json")
    assert "no text given" in result.stderr and json.loads(result.stdout)["corpus"] == "pydoc_data.topics"
    assert "no text given" not in tlt("eval", here / "model", "--data", here / "text.txt").stderr


def test_generate_streams_what_json_returns(here: Path) -> None:
    asked = ("generate", here / "model", "--prompt", "Es war", "--max-tokens", "24", "--seed", "3")
    text = tlt(*asked).stdout
    data = json.loads(tlt(*asked, "--json").stdout)
    assert text == data["text"] + "\n" and data["tokens"] == 24 and data["prompt"] == "Es war" and data["seed"] == 3
    assert tlt(*asked).stdout == text
    assert tlt(*asked[:-1], "4").stdout != text


def test_a_tokenizer_from_elsewhere(here: Path, tmp_path: Path) -> None:
    engine = Engine(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b b a")
    asked = ("eval", here / "model", "--data", tmp_path / "text.txt", "--json")
    assert json.loads(tlt(*asked).stdout)["tokens"] == 6
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        assert json.loads(tlt(*asked, "--tokenizer", given).stdout)["tokens"] == 3
    assert "no tokenizer.json" in the_error(tlt(*asked, "--tokenizer", here / "other"))
    small = make_checkpoint(tmp_path / "small", "llama", vocab_size=97)
    assert "pass --tokenizer PATH" in the_error(tlt("eval", small, "--data", tmp_path / "text.txt"))
    assert tlt("eval", small, "--data", tmp_path / "text.txt", "--tokenizer", tmp_path).exit_code == 0


# characters of several tokens


def byte_level() -> Tokenizer:
    """A tokenizer whose tokens are bytes in disguise, as GPT-2's."""
    engine = Engine(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return Tokenizer("byte level", 256, engine)


@pytest.mark.parametrize("tokenizer", [Tokenizer("bytes", 256), byte_level()], ids=["bytes", "byte level"])
@pytest.mark.parametrize("text", ["größer als 日本語 🙂!", "🙂" * 20, "plain"])
def test_no_character_is_broken(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    shown = list(pieces(tokenizer, ids))
    assert "".join(shown) == text and not any("\ufffd" in piece for piece in shown)
    if text != "plain":  # one token after the other would break them
        assert "\ufffd" in "".join(tokenizer.decode([token]) for token in ids)
    half = list(pieces(tokenizer, tokenizer.encode("ü").tolist()[:1]))
    assert half == ["\ufffd"]  # what is never completed still shows


def test_words_keep_their_spaces() -> None:
    """Some tokenizers drop the space before a first token: what stands before the new ids must be known."""
    engine = Engine(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    engine.decoder = decoders.Metaspace()
    words = Tokenizer("words", 2, engine)
    assert "".join(pieces(words, [0, 1, 0], after=[1])) == " a b a"
    assert "".join(pieces(words, [0, 1, 0])) == words.decode([0, 1, 0]) == "a b a"
    assert "".join(words.decode([token]) for token in [0, 1, 0]) == "aba"


# family tables as text


def restricted(family: Family, to: Family) -> dict[str, Any]:
    """What must be the same of a table and the one read back from its print."""
    kept = {key: value for key, value in vars(family).items() if key not in ("name", "text", "rows")}
    return {**kept, "rows": {row: arrow for row, arrow in family.rows.items() if row in to.rows}}


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_solved_table_reads_back(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_checkpoint(tmp_path / "model", family, tied)
    table = tmp_path / "own.toml"
    table.write_text(tlt("inspect", folder, "--toml").stdout)
    checkpoint = open_checkpoint(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    carried, own = fit(shapes, checkpoint.config), fit(shapes, checkpoint.config, family=str(table))
    assert restricted(own.family, own.family) == restricted(carried.family, own.family)
    assert (own.sizes, own.places, own.tied) == (carried.sizes, carried.places, carried.tied)
    assert f'hidden = "{carried.family.axes["hidden"]}"  # 32\n' in table.read_text()


FOREIGN = {
    "model.layers.": "blocks.", "self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "mlp.up_proj": "ffn.w3",
    "self_attn.v_proj": "attn.wv", "self_attn.o_proj": "attn.wo", "input_layernorm": "attn_norm", "lm_head": "output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn.w1", "mlp.down_proj": "ffn.w2", "model.norm": "norm",
    "model.embed_tokens": "tok_embeddings",
}  # fmt: skip


def foreign(model: Path, to: Path) -> Path:
    """The same model under names that no family has."""
    to.mkdir()
    tensors = load_file(model / "model.safetensors")
    for old, new in FOREIGN.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, to / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"], "model_type": "own"}))
    return to


def test_a_draft_makes_an_unknown_family_run(here: Path, tmp_path: Path) -> None:
    strange = foreign(here / "model", tmp_path / "strange")
    data = ("--data", here / "text.txt", "--json")
    assert "no family table for" in the_error(tlt("eval", strange, *data))
    draft = tlt("inspect", strange, "--toml").stdout
    (tmp_path / "own.toml").write_text(draft)
    known = json.loads(tlt("eval", here / "model", *data).stdout)["perplexity"]
    assert json.loads(tlt("eval", strange, *data, "--family", tmp_path / "own.toml").stdout)["perplexity"] == known
    (strange / "tlt.toml").write_text(draft)  # a table beside config.json is taken by itself
    assert json.loads(tlt("eval", strange, *data).stdout)["perplexity"] == known
    (strange / "tlt.toml").write_text(draft.replace("attn.wk", "attn.w"))
    assert "attn.wk.weight" in the_error(tlt("eval", strange, *data))


def test_a_draft_with_gaps_is_refused_until_they_are_filled(here: Path, tmp_path: Path) -> None:
    config = json.loads((here / "other" / "config.json").read_text())
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "model.safetensors").write_bytes((here / "other" / "model.safetensors").read_bytes())
    (strange / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"], "model_type": "own"}))
    draft = tlt("inspect", strange, "--toml").stdout
    with pytest.raises(TltError, match="FILL_IN"):
        parse_family(draft, "own")
    for gap, filling in (
        ('"FILL_IN"  # [96]', '"(3 kv channel)"'),
        ("hidden -> FILL_IN", "hidden -> (3 kv channel)"),
        ('query = "FILL_IN"', 'query = "attn.c_attn[0]"'),
        ('key = "FILL_IN"', 'key = "attn.c_attn[1]"'),
        ('value = "FILL_IN"', 'value = "attn.c_attn[2]"'),
    ):
        assert gap in draft
        draft = draft.replace(gap, filling)
    assert draft.count("FILL_IN") == 1  # the comment that explains it
    (tmp_path / "own.toml").write_text(draft)
    data = ("--data", here / "text.txt", "--json")
    known = json.loads(tlt("eval", here / "other", *data).stdout)["perplexity"]
    own = tlt("eval", strange, *data, "--family", tmp_path / "own.toml")
    assert json.loads(own.stdout)["perplexity"] == known


# bad usage and bad input

COMMANDS: dict[str, tuple[str, ...]] = {"inspect": (), "eval": ("--data", "text.txt"), "generate": ("--prompt", "a")}

BAD_USAGE = [
    (("inspekt", "model"), "Did you mean 'inspect'"),
    (("inspect",), "Missing argument 'SRC'"),
    (("inspect", "model", "--tomll"), "No such option: --tomll"),
    (("inspect", "model", "--toml", "--json"), "give one of them"),
    (("inspect", "model", "--axis", "kv"), "--axis kv: expected a name and a size"),
    (("inspect", "model", "--axis", "kv=0"), "--axis kv=0: expected"),
    (("inspect", "model", "--axis", "kv=two"), "--axis kv=two: expected"),
    (("inspect", "model", "--axis", "kv=2", "--axis", "kv=4"), "--axis kv is given twice, as 2 and as 4"),
    (("eval",), "Missing argument"),
    (("eval", "model", "--data", "text.txt", "--context", "1"), "--context"),
    (("eval", "model", "--data", "text.txt", "--batch-size", "0"), "--batch-size"),
    (("eval", "model", "--data", "text.txt", "--dtype", "float8"), "--dtype float8"),
    (("eval", "model", "--data", "text.txt", "--device", "abacus"), "--device abacus"),
    (("generate", "model"), "Missing option '--prompt'"),
    (("generate", "model", "--prompt", "a", "--max-tokens", "0"), "--max-tokens"),
    (("generate", "model", "--prompt", "a", "--temperature", "-1"), "--temperature -1"),
    (("generate", "model", "--prompt", "a", "--temperature", "nan"), "--temperature nan"),
    (("generate", "model", "--prompt", "a", "--top-k", "0"), "--top-k 0"),
    (("generate", "model", "--prompt", "a", "--top-p", "1.5"), "--top-p 1.5"),
    (("generate", "model", "--prompt", "a\udc80"), "'--prompt': not valid UTF-8"),
]


@pytest.mark.parametrize(
    ("arguments", "told"), BAD_USAGE, ids=[" ".join(a).encode("unicode_escape").decode() for a, _ in BAD_USAGE]
)
def test_bad_usage(here: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str) -> None:
    monkeypatch.chdir(here)
    result = tlt(*arguments)
    assert result.exit_code == 2
    assert told in the_error(result)


def _file(content: bytes) -> Callable[[Path, Path], object]:
    return lambda model, to: to.write_bytes(content)


def _header(entry: dict[str, Any], data: int = 0) -> Callable[[Path, Path], object]:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return _file(len(text).to_bytes(8, "little") + text + bytes(data))


def _without_shard(model: Path, to: Path) -> None:
    to.mkdir()
    (to / "config.json").write_bytes((model / "config.json").read_bytes())
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))


def _folder_of(name: str, content: bytes) -> Callable[[Path, Path], object]:
    def make(model: Path, to: Path) -> None:
        to.mkdir()
        (to / name).write_bytes(content)

    return make


def _with_config(text: str) -> Callable[[Path, Path], object]:
    def make(model: Path, to: Path) -> None:
        to.mkdir()
        (to / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
        (to / "config.json").write_text(text)

    return make


BAD_INPUT: dict[str, Callable[[Path, Path], object]] = {
    "nothing.st": lambda model, to: None,
    "empty.st": _file(b""),
    "short.st": _file(b"\x01\x02"),
    "zero.st": _file(bytes(8)),
    "huge.st": _file((2**40).to_bytes(8, "little") + b"{}"),
    "cut.st": lambda model, to: to.write_bytes((model / "model.safetensors").read_bytes()[:-4]),
    "more.st": lambda model, to: to.write_bytes((model / "model.safetensors").read_bytes() + b"more"),
    "text.st": _file(b"this is not a checkpoint but a text of some length"),
    "dtype.st": _header({"dtype": "F33"}, 8),
    "size.st": _header({"shape": [3]}, 8),
    "offset.st": _header({"data_offsets": [8, 0]}, 8),
    "name\nof two lines.st": _file(b"{"),
    "weights.bin": _file(b"\x80\x04."),
    "pickles": _folder_of("pytorch_model.bin", b"\x80\x04."),
    "no-weights": _folder_of("config.json", b"{}"),
    "no-shard": _without_shard,
    "no-json": _with_config("{"),
    "no-object": _with_config("[]"),
    "org/of/nobody": lambda model, to: None,
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD_INPUT, ids=[name.replace("\n", " ") for name in BAD_INPUT])
def test_bad_input_is_one_line(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, bad: str
) -> None:
    BAD_INPUT[bad](here / "model", tmp_path / bad)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    result = tlt(command, bad, *COMMANDS[command])
    assert result.exit_code == 1
    assert the_error(result) and "Traceback" not in result.stderr


def test_weights_that_are_not_numbers(here: Path, tmp_path: Path) -> None:
    tensors = load_file(here / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    broken_model = foreign(here / "model", tmp_path / "broken")
    save_file(tensors, broken_model / "model.safetensors")
    (broken_model / "config.json").write_bytes((here / "model" / "config.json").read_bytes())
    assert "the weights are broken" in the_error(tlt("eval", broken_model, "--data", here / "text.txt"))
    assert "the weights are broken" in the_error(tlt("generate", broken_model, "--prompt", "a"))


# the console itself


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (TltError("kv is 3"), 1, "tlt: error: kv is 3\n"),
        (TltError("two\nlines \x1b[31m"), 1, "tlt: error: two\\nlines \\x1b[31m\n"),
        (UsageError("--axis"), 2, "tlt: error: --axis\n"),
        (OSError(28, "No space left on device", "/dev/full"), 1, "tlt: error: /dev/full: No space left on device\n"),
        (MemoryError(), 1, "tlt: error: out of memory: the process may not have more\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "tlt: error: out of memory: Default"),
        (typer.Abort(), 1, "tlt: error: aborted\n"),
    ],
)
def test_exceptions_become_lines(
    error: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise error

    assert run(fails) == code
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith(told) and stderr.count("\n") == 1
    if isinstance(error, TltError):
        monkeypatch.setenv("TLT_DEBUG", "1")
        assert run(fails) == code
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ValueError("a bug"), RuntimeError("a bug"), ZeroDivisionError()])
def test_bugs_are_not_hidden(bug: Exception) -> None:
    def fails() -> None:
        raise bug

    with pytest.raises(type(bug)):
        run(fails)


def test_json_has_no_infinity_and_tables_keep_their_cells(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).result({"a": float("inf"), "b": [float("nan"), 0.1 + 0.2], "c": {"d": 1}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 0.1 + 0.2], "c": {"d": 1}}
    Output().result({}, line="done", table=Table(("a", "b"), [["x\ty", None], [0.1 + 0.2, 3]]))
    assert capsys.readouterr().out == "done\na\tb\nx\\ty\t\n0.30000000000000004\t3\n"
    assert printable("größer 日本") == "größer 日本"


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, spoken in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        Output().result({}, line="path")
        Output().note("note")
        with Output().progress("work") as progress:
            progress(1, 2)
        assert capsys.readouterr() == (("path\n", "tlt: note\n") if spoken else ("", ""))


def test_quiet_and_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        ({}, "tlt: warning: b\n"),
        ({"quiet": True}, ""),
        ({"verbose": True}, "tlt: a\ntlt: warning: b\n"),
    ):
        out = Output(**options)
        out.detail("a")
        out.warn("b")
        assert capsys.readouterr().err == told


def test_a_terminal_gets_a_table_and_a_progress_bar(here: Path) -> None:
    """On a terminal columns are aligned and numbers grouped; in a pipe there are tabs, and never a bar."""
    script = (
        "import time; from tlt_cli.cli import console; console._PATIENCE = 0.01\n"
        "out = console.Output()\n"
        "with out.progress('growing') as progress:\n"
        "    progress(1, 4); time.sleep(0.4); progress(2, 4); time.sleep(0.2)\n"
        "out.result({}, table=console.Table(('name', 'bytes'), [('a', 1234567)]))\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", script], stdout=theirs, stderr=theirs, check=True, env=environment)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "1,234,567" in shown and "growing" in shown and "50%" in shown and "\t" not in shown
    piped = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment, text=True)
    assert piped.stdout == "name\tbytes\na\t1234567\n" and piped.stderr == ""


def test_ctrl_c_is_130(here: Path) -> None:
    process = start(
        "generate", here / "model", "--prompt", "a", "--max-tokens", "1000000", "-q", stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.read(1)  # it is at work
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr == b""


def test_a_reader_who_has_seen_enough(here: Path) -> None:
    process = start(
        "generate", here / "model", "--prompt", "a", "--max-tokens", "1000000", "-q", stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.read(1)
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr == b""


def test_help_everywhere() -> None:
    assert tlt("--version").stdout.startswith("tlt ")
    assert all(command in tlt("-h").stdout for command in COMMANDS) and tlt().exit_code == 0
    for command in COMMANDS:
        shown = tlt(command, "-h").stdout
        assert shown == tlt(command, "--help").stdout and "Examples:" in shown
        assert all(option in shown for option in ("--json", "--quiet", "--verbose"))
