"""Text to ids: the checkpoint's tokenizer, or bytes; what is wrong with a text is said in one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers, processors

from tlt_cli.errors import TltError
from tlt_cli.model.text import built_in_text, load_tokenizer, load_tokens


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer.json of whole words that would add a token of its own in front."""
    engine = Engine(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 9}, unk_token="<s>"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    engine.enable_truncation(2)
    engine.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_the_tokenizer_beside_the_checkpoint(words: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"a b\r\n")
    (tmp_path / "two.txt").write_text("b a b")
    tokens = load_tokens(load_tokenizer([words], 10), [tmp_path / "one.txt", tmp_path / "two.txt"])
    assert tokens.ids.tolist() == [1, 2, 2, 1, 2]  # nothing in front, nothing cut off
    assert tokens.info["sha256"] == hashlib.sha256(b"a b\r\nb a b").hexdigest()
    assert tokens.info["tokenizer"] == str(words) and tokens.notes == ()


def test_bytes_and_the_text_every_python_has() -> None:
    tokenizer = load_tokenizer([], 300)
    tokens = load_tokens(tokenizer)
    assert tokens.info["source"] == "pydoc_data.topics" and tokens.info["tokenizer"] == "bytes"
    assert len(tokens.ids) == len(built_in_text().encode()) > 300_000  # 466 kB in 3.11, more in later ones
    assert any("every byte is a token" in note for note in tokens.notes)
    assert any("no text given" in note for note in tokens.notes)
    assert tokenizer.decode(tokenizer.encode("größer").tolist()) == "größer"


def test_what_is_wrong_is_said(words: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer([], 256)
    with pytest.raises(TltError, match="no such file"):
        load_tokens(tokenizer, [tmp_path / "missing.txt"])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(TltError, match="is empty"):
        load_tokens(tokenizer, [tmp_path / "empty.txt"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(TltError, match="not UTF-8 text: byte 3 is 0xe9"):
        load_tokens(tokenizer, [tmp_path / "latin.txt"])
    with pytest.raises(TltError, match="cannot read"):
        load_tokens(tokenizer, [tmp_path])
    (tmp_path / "text.txt").write_text("a c")
    with pytest.raises(TltError, match="disagrees with the vocabulary: id 9, vocabulary 5"):
        load_tokens(load_tokenizer([words], 5), [tmp_path / "text.txt"])
    with pytest.raises(TltError, match="vocabulary of 97 cannot hold"):
        load_tokenizer([], 97)
    with pytest.raises(TltError, match="SentencePiece"):
        load_tokenizer([tmp_path / "tokenizer.model"], 500)
    words.write_text("{}")
    with pytest.raises(TltError, match="cannot read"):
        load_tokenizer([words], 10)
