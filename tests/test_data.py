"""Texts and ids become streams, and streams become windows: every token once, documents apart, the same each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_zoo import ZOO, make_checkpoint, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.errors import TltError
from tlt_cli.families.fit import fit
from tlt_cli.model import perplexity
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.text import Tokenizer, built_in_text, load_tokens
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.training import tokenizing
from tlt_cli.training.ahead import Ahead
from tlt_cli.training.corpus import Stream, of_ids, read_streams
from tlt_cli.training.windows import IGNORED, Windows, evaluation_windows, hold_out, targets

BYTEWISE = Tokenizer("bytes", 256)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) >= 20)


def numbered(*lengths: int, first: int = 0, parts: int = 1) -> Stream:
    """Documents of these lengths whose ids count their tokens, so that an id says where it stands."""
    ids = np.arange(first, first + sum(lengths), dtype=np.int32)
    starts = np.cumsum([0, *lengths[:-1]])
    return Stream("numbers", tuple(np.array_split(ids, parts)), starts, "")


def whole(stream: Stream) -> torch.Tensor:
    return torch.from_numpy(stream.take(0, stream.tokens))


def documents_of(stream: Stream) -> list[list[int]]:
    return [part.tolist() for part in np.split(stream.take(0, stream.tokens), stream.starts[1:])]


def read_one(source: Path, tokenizer: Tokenizer = BYTEWISE, **options: Any) -> Stream:
    (stream,) = read_streams([source], tokenizer, **options)
    return stream


# --- windows -----------------------------------------------------------------------------------------------------


def test_the_order_is_a_pure_function_of_seed_and_index() -> None:
    def rows(seed: int, first: int, count: int, *, windows: Windows | None = None) -> torch.Tensor:
        return (windows or Windows(streams, 7, seed)).batch(first, count).rows

    streams = (numbered(100, 31, parts=3), numbered(60, first=1000))
    expected, warm = rows(5, 0, 90), Windows(streams, 7, 5)
    for size in (1, 4, 90):
        pieces = [rows(5, first, min(size, 90 - first), windows=warm) for first in range(0, 90, size)]
        assert torch.equal(torch.cat(pieces), expected)
    assert torch.equal(rows(5, 61, 20), expected[61:81]), "from the middle, with nothing asked before"
    ahead = Ahead(Windows(streams, 7, 5))
    for first, count in ((0, 4), (4, 4), (8, 4), (40, 3), (46, 3), (52, 3), (0, 90)):
        assert torch.equal(ahead.batch(first, count).rows, expected[first : first + count])
    per_epoch = warm.per_epoch
    assert not torch.equal(rows(6, 0, 90), expected), "another seed"
    assert not torch.equal(expected[:per_epoch], expected[per_epoch : 2 * per_epoch]), "another epoch"


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_an_epoch_has_every_window_once(lengths: list[int], context: int, epoch: int, parts: int) -> None:
    windows = Windows((numbered(*lengths, parts=parts), numbered(33, first=5000)), context, seed=epoch)
    batch = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
    for number, stream in enumerate(windows.streams):
        rows = batch.rows[batch.streams == number]
        assert len(rows) == stream.tokens // context
        seen, base = rows[:, 1:].flatten(), stream.take(0, 1).item()
        assert len(seen.unique()) == len(seen) == stream.tokens // context * context
        assert torch.equal((rows - base)[:, 1:], ((rows - base)[:, :-1] + 1) % stream.tokens), "tokens in their order"


def test_windows_off_the_epochs_repeat_tokens() -> None:
    """The negative control of the law above; and the cuts move, so that what one epoch drops another one has."""
    windows = Windows((numbered(205),), 10)
    assert windows.per_epoch == 20
    assert len(windows.batch(7, 20).rows[:, 1:].unique()) < 200
    epochs = [windows.batch(20 * epoch, 20).rows[:, 1:] for epoch in range(12)]
    dropped = [set(range(205)) - set(rows.flatten().tolist()) for rows in epochs]
    assert all(len(some) == 5 for some in dropped) and len(set.union(*dropped)) > 20
    assert len({int(rows[:, 0].min()) % 10 for rows in epochs}) > 3


def test_streams_are_mixed_and_weights_change_the_mix() -> None:
    streams = (numbered(4000), numbered(1000, first=10_000))
    plain = Windows(streams, 10)
    order = plain.batch(0, 500).streams
    assert int((order == 1).sum()) == 100
    assert 10 < int((order[:250] == 1).sum()) < 90, "one stream must not wait for the other"
    weighted = Windows(streams, 10, weights=(1.0, 3.0))
    assert weighted.per_epoch == 500
    batch = weighted.batch(0, 4000)
    assert float((batch.streams == 1).float().mean()) == pytest.approx(0.75, abs=1e-3)
    small = batch.rows[batch.streams == 1]
    counts = torch.bincount(small[:, 1:].flatten() - 10_000, minlength=1000)
    assert int(counts.min()) == int(counts.max()) == 30, "its own epochs are whole, however fast they go"
    assert torch.equal(weighted.batch(3990, 10).rows, batch.rows[3990:])
    slow = batch.rows[:1000][batch.streams[:1000] == 0][:, 0]
    gaps = slow.sort().values.diff()
    assert len(slow) == 250 and int((gaps > 10).sum()) > 50, "a part of the large one, from all over it"
    rare = Windows(streams, 10, weights=(1.0, 1e-9)).batch(0, 1000).streams
    assert int((rare == 1).sum()) == 1


@given(LENGTHS, st.integers(2, 20))
@settings(deadline=None, max_examples=60)
def test_documents_are_numbered_where_a_window_holds_several(lengths: list[int], context: int) -> None:
    stream = numbered(*lengths)
    batch = Windows((stream,), context).batch(0, 50)
    of = np.repeat(np.arange(len(lengths)), lengths)
    for number in range(50):
        row = batch.rows[number].numpy()
        turns = (of[row][1:] != of[row][:-1]) | (row[1:] == 0)  # the ring's ends are no neighbours
        expected = np.concatenate([[0], turns.cumsum()])
        found = np.zeros(context + 1) if batch.documents is None else batch.documents[number].numpy()
        assert np.array_equal(found, expected)
        alone = batch[number : number + 1]
        assert (alone.documents is None) == (not turns.any())
        hidden = targets(alone)[0].numpy() == IGNORED
        assert np.array_equal(hidden, turns), "the first token of a document is nobody's target"
        assert np.array_equal(targets(alone)[0].numpy()[~hidden], row[1:][~hidden])


def test_one_document_needs_no_numbers() -> None:
    windows = Windows((numbered(500),), 10)
    within = [number for number in range(50) if windows.batch(number, 1).rows.diff().min() == 1]
    assert len(within) >= 49
    assert all(windows.batch(number, 1).documents is None for number in within)


def decoder_of(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(folder)
    return load_checkpoint(
        checkpoint, fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    )


@pytest.mark.parametrize("family", ZOO)
@torch.no_grad()
def test_packed_documents_are_computed_as_if_alone(tmp_path: Path, family: str) -> None:
    """Documents longer and shorter than the attention windows of 8; positions start again with each of them."""
    lengths = (13, 5, 1, 9, 20, 11, 3, 30)
    ids = some_ids(batch=1, length=sum(lengths))[0]
    stream = Stream("text", (ids.numpy(),), np.cumsum([0, *lengths[:-1]]), "")
    batch = Windows((stream,), 24).batch(0, 3)
    assert batch.documents is not None
    decoder, rows, documents = decoder_of(make_checkpoint(tmp_path, family)), batch.rows[:, :-1], batch.documents
    packed = decoder(rows, documents=documents[:, :-1])
    mixed = decoder(rows)
    off = torch.zeros(())
    for row, numbers, got, without in zip(rows, documents[:, :-1], packed, mixed, strict=True):
        for number in range(int(numbers[-1]) + 1):
            mine = numbers == number
            alone = decoder(row[mine][None])[0]
            assert (got[mine] - alone).abs().max() <= 2e-5 * packed.std()
            off = torch.maximum(off, (without[mine] - alone).abs().max() / packed.std())
    assert off > 0.3, "without the numbers, documents look at each other"


def test_positions_start_again(tmp_path: Path) -> None:
    decoder = decoder_of(make_checkpoint(tmp_path, "gpt2"))
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    assert decoder.begin(6, documents=documents).positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context of 0 predicts nothing"),
        ({"context": 51}, "numbers has 50 tokens, less than one window of 51"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 streams"),
        ({"weights": (0.0,)}, "weight is 0; it must be a positive number"),
        ({"weights": (float("nan"),)}, "weight is nan"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TltError, match=message):
        Windows((numbered(50),), **{"context": 10, **options})


# --- what is held out --------------------------------------------------------------------------------------------


@given(LENGTHS, st.floats(0.12, 0.8), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_training_never_sees_what_is_held_out(lengths: list[int], share: float, parts: int) -> None:
    streams = (numbered(*lengths, parts=parts), numbered(90, first=5000))
    training, held = hold_out(streams, share)
    for stream, mine, kept in zip(streams, training, held, strict=True):
        assert torch.equal(torch.cat([whole(mine), whole(kept)]), whole(stream)), "the end of it, and nothing lost"
        assert 0.45 * share <= kept.tokens / stream.tokens <= max(1.55 * share, share + 0.1)
    hidden = torch.cat([whole(stream) for stream in held])
    context = min(stream.tokens for stream in training)
    for some, leaks in ((training, False), (streams, True)):
        windows = Windows(some, context)
        rows = windows.batch(0, 40 * windows.per_epoch).rows
        assert bool(torch.isin(rows, hidden).any()) == leaks, "the whole streams are the negative control"


def test_whole_documents_are_held_out_where_they_can_be() -> None:
    stream = numbered(40, 30, 20, 10, 7, 3)
    (training,), (held,) = hold_out([stream], 0.1)
    assert held.starts.tolist() == [0, 7] and held.tokens == 10 and training.tokens == 100
    assert documents_of(held) == documents_of(stream)[4:] and documents_of(training) == documents_of(stream)[:4]
    (training,), (held,) = hold_out([numbered(90, 10)], 0.02)
    assert held.tokens == 2 and training.starts.tolist() == [0, 90], "ten would be five times too many"
    assert hold_out([stream], 0) == ((stream,), ())
    with pytest.raises(TltError, match=r"numbers has 30 tokens: a held-out share of 0\.01"):
        hold_out([numbered(30)], 0.01)
    with pytest.raises(TltError, match="share of 1 is none"):
        hold_out([stream], 1)


def test_what_is_held_out_is_measured_as_eval_does(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(built_in_text()[:5000])
    stream = read_one(path)
    assert torch.equal(evaluation_windows(stream, 64), perplexity.windows(load_tokens(BYTEWISE, [path]).ids, 64))
    assert torch.equal(evaluation_windows(stream, 64, most=3), evaluation_windows(stream, 64)[:3])
    _, (held,) = hold_out([stream], 0.25)
    assert torch.equal(evaluation_windows(held, 64), perplexity.windows(whole(stream)[-held.tokens :], 64))
    assert evaluation_windows(numbered(5), 64).shape == (1, 5)


# --- reading -----------------------------------------------------------------------------------------------------


def byte_pairs() -> Tokenizer:
    """As GPT-2's: byte-level pairs within words, offsets without the spaces before words."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<|endoftext|>", "<|other|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    engine.train_from_iterator([built_in_text()[:100_000]], trainer)
    return Tokenizer("pairs", engine.get_vocab_size(), engine)


def meta_space() -> Tokenizer:
    """As Llama's: a space is put before the text, and pairs go across spaces."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, normalizers, trainers

    engine = Engine(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=90,
        max_token_length=12,
    )
    words = built_in_text()[:30_000].split(" ")
    engine.train_from_iterator([" ".join(words[i : i + 3]) for i in range(0, len(words), 3)], trainer)
    return Tokenizer("spaces", engine.get_vocab_size(), engine)


@pytest.mark.parametrize("make", [byte_pairs, meta_space, lambda: BYTEWISE], ids=["pairs", "spaces", "bytes"])
def test_pieces_give_the_ids_of_the_whole(
    tmp_path: Path, make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    path = tmp_path / "t.txt"
    topics = built_in_text()
    path.write_text(
        "".join(topics[i : i + 700] + " naïve — 日本語\n\n\n\t\t   x  🙂🙂 " for i in range(0, 60_000, 700))
    )
    expected = load_tokens(tokenizer, [path])

    def read(piece: int, overlap: int) -> Stream:
        for name, value in (("PIECE", piece), ("OVERLAP", overlap), ("_BATCH", 10_000), ("_BLOCK", 997)):
            monkeypatch.setattr(tokenizing, name, value)
        return read_one(path, tokenizer)

    for piece in (2000, 2477):
        stream = read(piece, 200)
        assert torch.equal(whole(stream), expected.ids) and len(stream.starts) == 1
        assert stream.sha256 == expected.info["sha256"]
    if tokenizer.engine is not None:
        assert not torch.equal(whole(read(2000, 0)), expected.ids), "pieces that do not overlap cut words"
        assert stream.parts[0].dtype == np.int32


def test_a_word_longer_than_a_piece_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers

    engine = Engine(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    monkeypatch.setattr(tokenizing, "PIECE", 500)
    monkeypatch.setattr(tokenizing, "OVERLAP", 50)
    (tmp_path / "t.txt").write_text(f"a {'x' * 3000} b")
    assert documents_of(read_one(tmp_path / "t.txt", Tokenizer("words", 3, engine))) == [[1, 0, 2]]


def test_a_text_is_cut_where_the_separator_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("one<|end|>two is longer<|end|><|end|> \n<|end|>thrée")
    for block in (1, 2, 7, 1000):
        monkeypatch.setattr(tokenizing, "_BLOCK", block)
        stream = read_one(tmp_path / "t.txt", separator="<|end|>", end=0)
        texts = [bytes(ids).decode() for ids in documents_of(stream)]
        assert texts == ["one\0", "two is longer\0", "thrée\0"], "documents without a word are left out"
    assert len(read_one(tmp_path / "t.txt").starts) == 1
    assert [len(ids) for ids in documents_of(read_one(tmp_path / "t.txt", separator="<|end|>"))] == [3, 13, 6]


def test_every_end_ends_a_document_and_is_written_once(tmp_path: Path) -> None:
    tokenizer = byte_pairs()
    (tmp_path / "t.txt").write_text("one two<|endoftext|>three<|endoftext|>")
    stream = read_one(tmp_path / "t.txt", tokenizer, end=0)
    assert [tokenizer.decode(ids) for ids in documents_of(stream)] == ["one two<|endoftext|>", "three<|endoftext|>"]
    apart = read_one(tmp_path / "t.txt", tokenizer, end=0, separator="<|endoftext|>")
    assert documents_of(apart) == documents_of(stream)
    assert len(read_one(tmp_path / "t.txt", tokenizer, end=1).starts) == 1, "another id ends nothing"
    with pytest.raises(TltError, match="end-of-text id 256 is not in the vocabulary of 256"):
        read_one(tmp_path / "t.txt", end=256)


def test_lines_are_documents(tmp_path: Path) -> None:
    entries = [{"text": "first", "n": 1}, {"text": "sécond\nline"}, {"n": 2, "text": "third"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    stream = read_one(tmp_path / "t.jsonl", end=0)
    assert [bytes(ids).decode() for ids in documents_of(stream)] == ["first\0", "sécond\nline\0", "third\0"]
    (tmp_path / "o.jsonl").write_text('{"body": "b", "text": 3}')
    assert documents_of(read_one(tmp_path / "o.jsonl", field="body")) == [[98]]


def test_ids_are_the_same_in_every_file(tmp_path: Path) -> None:
    ids = np.array([5, 6, 9, 7, 9, 9, 8, 5], dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids.astype(">i8"))
    ids.tofile(tmp_path / "a.bin")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "shard.bin").write_bytes(header.tobytes() + ids.tobytes())
    save_file({"tokens": ids.astype(np.int32)}, tmp_path / "a.safetensors")
    read = [read_one(tmp_path / name, end=9) for name in ("a.npy", "a.bin", "shard.bin", "a.safetensors")]
    for stream in read:
        assert documents_of(stream) == [[5, 6, 9], [7, 9], [9], [8, 5]]
        assert isinstance(stream.parts[0], np.memmap), "mapped, not read"
    assert len({stream.sha256 for stream in read}) == 1
    assert read_one(tmp_path / "a.bin").sha256 == of_ids(torch.from_numpy(ids.astype(np.int64))).sha256
    assert documents_of(read_one(tmp_path / "a.bin")) == [ids.tolist()]
    ids[0] = 4
    ids.tofile(tmp_path / "a.bin")
    assert read_one(tmp_path / "a.bin").sha256 != read[0].sha256


def test_folders_and_patterns_mean_their_files_in_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", "B"), ("a.txt", "A"), ("c/d.md", "D"), (".hidden", "\xff"), (".git/x", "X")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "e.jsonl").write_text('{"text": "E"}')
    np.array([70, 71], dtype=np.uint16).tofile(tmp_path / "f.bin")
    seen: list[tuple[int, int]] = []
    streams = read_streams(
        [tmp_path, str(tmp_path / "*.txt")], BYTEWISE, progress=lambda done, total: seen.append((done, total))
    )
    assert documents_of(streams[0]) == [[65], [66], [68], [69], [70, 71]]
    assert documents_of(streams[1]) == [[65], [66]]
    assert seen == sorted(seen) and seen[-1] == (22, 22)
    assert streams[0].info["tokens"] == 6 and streams[0].info["documents"] == 5
    assert read_one(tmp_path / "a.txt").sha256 != read_one(tmp_path / "b.txt").sha256


def test_without_data_it_is_pythons_own_text() -> None:
    (stream,) = read_streams([], BYTEWISE)
    built_in = load_tokens(BYTEWISE)
    assert torch.equal(whole(stream), built_in.ids)
    assert {**built_in.info, **stream.info} == {**stream.info, "tokenizer": "bytes"}


WRONG: dict[str, tuple[str, bytes, str]] = {
    "empty": ("t.txt", b"", "t.txt is empty"),
    "blank": ("t.txt", b" \n\n", "t.txt is empty"),
    "not UTF-8": ("t.txt", b"a" * 60 + b"\xe6\x97\xff", "t.txt is not UTF-8 text: byte 60 is 0xe6"),
    "UTF-8 cut short": ("t.txt", b"a" * 49 + b"\xe6\x97", "t.txt is not UTF-8 text: byte 49 is 0xe6"),
    "no JSON": ("t.jsonl", b'{"text": "a"}\n{"text": \n', "t.jsonl, line 2 is not JSON"),
    "no object": ("t.jsonl", b'\n["a"]', "line 2 is a JSON list"),
    "no such key": ("t.jsonl", b'{"body": "a"}', "line 1 has no key \"text\"; it has 'body'"),
    "no string": ("t.jsonl", b'{"text": null}', '"text" is a NoneType, not a string'),
    "half a pair": ("t.jsonl", b'{"text": "a\\ud83d"}', 'line 1: "text" holds half a surrogate pair at character 1'),
    "line not UTF-8": ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8 text: its byte 10 is 0xff"),
    "too deep": ("t.jsonl", b"[" * 200_000, "line 1 is JSON nested too deeply"),
    "odd bytes": ("t.bin", b"abc", "t.bin is 3 bytes long, an odd number"),
    "no ids": ("t.bin", b"", "t.bin holds no ids"),
    "ids too large": ("t.bin", b"\1\0\2\0\0\1", "t.bin: id 256 at place 2 is not in the vocabulary of 256"),
    "no .npy": ("t.npy", b"abcdefgh", "t.npy cannot be read as .npy"),
    "no safetensors": ("t.safetensors", b"abc", "t.safetensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_named(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, message = WRONG[case]
    monkeypatch.setattr(tokenizing, "_BLOCK", 50)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TltError) as caught:
        read_one(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_that_are_no_ids(tmp_path: Path) -> None:
    for array, message in (
        (np.zeros((2, 3), dtype=np.int32), r"holds int32 \[2, 3\]"),
        (np.zeros(3), r"holds float64 \[3\]"),
        (np.array([1, -2, 3]), "id -2 at place 1 is not in the vocabulary"),
        (np.array([{}]), "cannot be read as .npy"),
        (np.zeros(0, dtype=np.int32), "holds no ids|cannot be read"),
    ):
        np.save(tmp_path / "t.npy", array, allow_pickle=True)
        with pytest.raises(TltError, match=message):
            read_one(tmp_path / "t.npy")
    for tensors, message in (
        ({"a": np.zeros(3, dtype=np.int32), "b": np.zeros(3, dtype=np.int32)}, "holds 2 tensors"),
        ({"a": np.zeros(3, dtype=np.float32)}, r"a is F32 \[3\]; token ids are integers"),
        ({"a": np.zeros((3, 1), dtype=np.int32)}, r"holds int32 \[3, 1\]"),
        ({"a": np.zeros(0, dtype=np.int32)}, "holds no ids"),
    ):
        save_file(tensors, tmp_path / "t.safetensors")
        with pytest.raises(TltError, match=message):
            read_one(tmp_path / "t.safetensors")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source, message in (
        (tmp_path / "no.txt", "no.txt: no such file or folder"),
        (tmp_path / "*.txt", "no file fits this pattern"),
        (tmp_path / "folder", "a folder without files"),
    ):
        with pytest.raises(TltError, match=message):
            read_one(source)


def test_a_tokenizer_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = byte_pairs()
    (tmp_path / "t.txt").write_text(built_in_text()[:2000])
    read_one(tmp_path / "t.txt", tokenizer)
    with pytest.raises(TltError, match=r"the tokenizer disagrees with the vocabulary: id .*, vocabulary 300"):
        read_one(tmp_path / "t.txt", Tokenizer("pairs", 300, tokenizer.engine))
