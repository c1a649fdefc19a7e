"""Whatever is wrong with a checkpoint is one line that names it, before any work and with nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from broken import BROKEN, GOOD_TEXT, TEXT_FAULT, Broken, config, sharded, tensors, whole
from typer.testing import CliRunner

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli import app
from tlt_cli.errors import TltError
from tlt_cli.families.fit import Fit, fit
from tlt_cli.families.ties import check_ties
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import load_tokenizer, load_tokens
from tlt_cli.model.weights import load_checkpoint


def use(path: Path, command: str, text: Path) -> None:
    """What the commands do with a checkpoint, from its path to its first number."""
    checkpoint = open_checkpoint(path)
    table = path / "tlt.toml"
    if command == "inspect" and not table.is_file():  # where no table fits it shows the tensors all the same
        return
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    fitted: Fit = fit(shapes, checkpoint.config, family=str(table) if table.is_file() else None)
    check_ties(checkpoint, fitted)
    if command == "eval":
        tokens = load_tokens(load_tokenizer(checkpoint.companions, fitted.sizes["vocab"]), [text])
    decoder = load_checkpoint(checkpoint, fitted)
    if command == "eval":
        perplexity(decoder, tokens.ids, context=16)


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def skip_if_everything_is_readable(broken: Broken) -> None:
    if "Permission denied" in broken.message and os.geteuid() == 0:
        pytest.skip("root may read everything")


@pytest.mark.parametrize("name", BROKEN)
def test_one_line_says_what_is_wrong(tmp_path: Path, name: str) -> None:
    broken = BROKEN[name]
    skip_if_everything_is_readable(broken)
    path = broken.make(tmp_path)
    before = listing(tmp_path)
    for command in broken.commands:
        with pytest.raises(TltError) as caught:
            use(path, command, tmp_path / broken.data)
        message = str(caught.value)
        assert broken.message in message and "\n" not in message, command
    assert listing(tmp_path) == before


@pytest.mark.parametrize("make", [whole, sharded])
def test_what_is_not_broken_works(tmp_path: Path, make: object) -> None:
    assert callable(make)
    path = make(tmp_path)
    for command in ("inspect", "eval", "grow"):
        use(path, command, tmp_path / GOOD_TEXT)


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    """As some savers do; a copy that is none is in the table."""
    copied = tensors(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"]}))
    path = config(tie_word_embeddings=True, start=copied)(tmp_path)
    use(path, "eval", tmp_path / GOOD_TEXT)
    checkpoint = open_checkpoint(path)
    assert checkpoint.equal("lm_head.weight", "model.embed_tokens.weight")
    assert not checkpoint.equal("lm_head.weight", "model.norm.weight")
    assert not checkpoint.equal("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


def test_the_table_is_long_and_each_entry_its_own() -> None:
    assert len(BROKEN) >= 40
    assert all(set(broken.commands) <= {"inspect", "eval", "grow"} and broken.commands for broken in BROKEN.values())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no checkpoint given: the name is empty"),
        ("~nobody_of_this_name/model", "not a usable path"),
        ("x" * 5000, "not a usable path"),
        ("a\0b.safetensors", "no such file or folder"),
        ("none.safetensors", "none.safetensors: no such file or folder"),
        ("some/none.bin", "some/none.bin: no such file or folder"),
        ("model name", "model name: no such file or folder"),
    ],
)
def test_names_that_are_no_checkpoint(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(tmp_path)
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(TltError) as caught:
        open_checkpoint(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_repository_while_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for source in ("org/name", "hf://org/name@main"):
        with pytest.raises(TltError, match=r"org/name.*HF_HUB_OFFLINE is set and it is not in the cache"):
            open_checkpoint(source)


@pytest.mark.parametrize("name", BROKEN)
def test_the_commands_refuse_it(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 or 2, nothing on stdout, one line of error, and no file that was not there before."""
    broken = BROKEN[name]
    skip_if_everything_is_readable(broken)
    path = broken.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    before = listing(tmp_path)
    arguments = {
        "inspect": [],
        "eval": ["--data", str(tmp_path / broken.data), "--context", "16"],
        "grow": ["--to-dim", "64", "-o", "grown"],
    }
    for command, options in arguments.items():
        if command == "grow" and broken.commands == TEXT_FAULT:
            continue  # it needs no text, and would write
        result = CliRunner().invoke(app, [command, str(path), *options], prog_name="tlt")
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        if command not in broken.commands:
            assert result.exit_code == 0, (command, result.stderr)
            continue
        errors = [line for line in result.stderr.splitlines() if not line.startswith("tlt: ") or "error" in line]
        assert result.exit_code in (1, 2) and result.stdout == "", (command, result.exit_code, result.stdout)
        assert len(errors) == 1 and broken.message in errors[0], (command, result.stderr)
    assert listing(tmp_path) == before
