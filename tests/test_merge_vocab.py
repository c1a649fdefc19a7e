"""`tlt merge --vocab union`: tokens matched by their text, and what models say of those that they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factored import apart, modules_cache, remote  # noqa: F401
from family_zoo import make_checkpoint, stock_logits
from merging import same_bits, weights_of
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from typer.testing import CliRunner

from tlt_cli.cli import app

BOUND, WRONG = 1e-5, 1e-1
WORDS = [f"w{number}" for number in range(60)]
pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.chdir(tmp_path)


def model(folder: Path, words: list[str], added: list[str], seed: int, rows: int | None = None, **own: Any) -> Path:
    """A checkpoint whose tokenizer knows words, in this order, and has others added; `rows` of embeddings."""
    count = len(words) + len(added)
    make_checkpoint(folder, own.pop("family", "llama"), seed=seed, vocab_size=rows or count, **own)
    engine = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[0]))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_tokens([AddedToken(token) for token in added])
    engine.save(str(folder / "tokenizer.json"))
    return folder


def merge(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def vocabulary(folder: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def encoded(folder: Path, text: str) -> Tensor:
    return torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids])


@torch.no_grad()
def agrees(out: Path, parts: list[Path], text: str) -> float:
    """How far the merged model is from the mean of its models on text that all know, for tokens that all know."""
    merged, own = vocabulary(out), [vocabulary(part) for part in parts]
    shared = [token for token in merged if all(token in known for known in own)]
    assert set(text.split()) <= set(shared)
    found = remote(out)(encoded(out, text)).logits[..., [merged[token] for token in shared]]
    each = [
        stock_logits(part, encoded(part, text))[..., [known[token] for token in shared]]
        for part, known in zip(parts, own, strict=True)
    ]
    return apart(found, sum(each) / len(each))


TEXT = " ".join(f"w{at * 7 % 40}" for at in range(24))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_added_tokens(tmp_path: Path, family: str, tied: bool) -> None:
    """Behind the first model's ids come those that were added to others; each has a row of its own or the mean."""
    how = {"family": family, "tied": tied}
    parts = [
        model(tmp_path / "one", WORDS, ["<a>", "<b>"], 0, **how),
        model(tmp_path / "two", WORDS, ["<c>", "<a>"], 1, **how),
        model(tmp_path / "three", WORDS, [], 2, rows=64, **how),
    ]
    refused = merge(*parts[:2], "-o", "no")
    assert refused.exit_code == 1 and "'<a>' is id 60 in the first and id 61" in refused.stderr
    assert "--vocab union" in refused.stderr and not Path("no").exists()
    result = merge(*parts, "--vocab", "union", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert "two lacks 1 of 63 tokens" in result.stderr and "three lacks 3 of 63" in result.stderr
    found = vocabulary(Path("out"))
    assert {token: found[token] for token in ("w0", "<a>", "<b>", "<c>")} == {"w0": 0, "<a>": 60, "<b>": 61, "<c>": 62}
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 63
    assert agrees(Path("out"), parts, TEXT) <= BOUND
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    table, own = (weights_of(folder)[name] for folder in (Path("out"), parts[1]))
    assert torch.equal(table[1, 60], own[61]) and torch.equal(table[1, 62], own[60])
    assert torch.allclose(table[1, 61], own.mean(0), atol=1e-6) and not torch.allclose(table[1, 61], own[1], atol=1e-2)
    assert transformers.AutoTokenizer.from_pretrained("out")("w5 <c> w7").input_ids == [5, 62, 7]


def test_one_that_knows_all(tmp_path: Path) -> None:
    """Its ids and its tokenizer count, wherever it stands; matched by number it would be another mean."""
    shuffled = [*WORDS[30:], *WORDS[:30]]
    parts = [model(tmp_path / "one", WORDS[:50], [], 0), model(tmp_path / "two", shuffled, ["<a>"], 1)]
    result = merge(*parts, "--vocab", "union", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert "ids are those of two" in result.stderr and "one lacks 11 of 61 tokens" in result.stderr
    assert Path("out/tokenizer.json").read_bytes() == (parts[1] / "tokenizer.json").read_bytes()
    assert agrees(Path("out"), parts, TEXT) <= BOUND
    with torch.no_grad():
        ids = encoded(parts[1], " ".join(shuffled[at] for at in range(20)))
        wrong = (stock_logits(parts[0], ids)[..., :50] + stock_logits(parts[1], ids)[..., :50]) / 2
        assert apart(remote(Path("out"))(ids).logits[..., :50], wrong) >= WRONG
    result = merge("out", parts[1], "--vocab", "union", "-o", "again")
    assert result.exit_code == 0, result.stderr
    sliced = CliRunner().invoke(app, ["slice", "out", "--block", "2/2", "-o", "back"])
    assert sliced.exit_code == 0, sliced.stderr
    assert same_bits(Path("back"), parts[1])


@torch.no_grad()
def test_tables_filled_up_to_other_sizes(tmp_path: Path) -> None:
    """Equal tokenizers need no union, whatever rows lie behind their tokens."""
    parts = [model(tmp_path / "one", WORDS, [], 0, rows=64), model(tmp_path / "two", WORDS, [], 1, rows=72)]
    result = merge(*parts, "-o", "out")
    assert result.exit_code == 0 and "one has 64 rows of embeddings of 72" in result.stderr
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 72
    assert agrees(Path("out"), parts, TEXT) <= BOUND
    low = remote(Path("out"))(encoded(Path("out"), TEXT)).logits.log_softmax(-1)
    one = weights_of(Path("out"))["lm_head.weight"][0]
    assert torch.allclose(one[70], weights_of(parts[0])["lm_head.weight"].mean(0), atol=1e-6) and low.isfinite().all()
    assert merge(*parts, "--layout", "stock", "-o", "dense").exit_code == 0
    assert stock_logits(Path("dense"), encoded(Path("out"), TEXT)).shape[-1] == 72


def test_tokenizers_that_no_union_can_stand_for(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", WORDS[:50], [], 0), model(tmp_path / "two", WORDS[10:], [], 1)
    result = merge(one, two, "--vocab", "union", "-o", "out")
    assert result.exit_code == 1 and "'w0' is id 0 in the first and missing in the second" in result.stderr
    assert "no one tokenizer splits text" in result.stderr and not Path("out").exists()
    (two / "tokenizer.json").unlink()
    result = merge(one, two, "--vocab", "union", "-o", "out")
    assert result.exit_code == 1 and "two has no tokenizer.json beside it" in result.stderr
    result = merge(one, two, "--vocab", "both", "-o", "out")
    assert result.exit_code == 2 and "expected same or union" in result.stderr
