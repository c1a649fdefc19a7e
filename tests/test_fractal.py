"""Blocks inside a model share its batch: each row has one of a level's models, and nothing else decides which."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import documents, gradients, values
from test_nested import BOUND, apart, some_batch, take_steps, taken_out
from test_train import SHAPE, content, here, in_a_folder, interrupted, log, refused, stock_loss, train  # noqa: F401
from torch import Tensor

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.families import Fit, fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.training.fractal import assigned, seen
from tlt_cli.training.nested import Inner, inner_models, of_levels, shares
from tlt_cli.training.objective import next_token, scored
from tlt_cli.training.saving import save
from tlt_cli.training.windows import Batch, Windows


def opened(folder: Path, levels: int = 3, split: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Decoder, Fit]:
    """A checkpoint, its config.json with blocks inside."""
    checkpoint = open_checkpoint(folder)
    found = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    config = {**found.config, "fractal": {"norm": "sliced", "levels": levels, "split": split}}
    return load_checkpoint(checkpoint, found, dtype=dtype), replace(found, config=config)


def decoders(inner: tuple[tuple[Inner, ...], ...]) -> list[list[Decoder]]:
    return [[each.decoder for each in level] for level in inner]


def rows_of(numbers: list[int], streams: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 97, (len(numbers), 17), generator=generator)
    return Batch(rows, None, torch.tensor(streams), torch.tensor(numbers))


# --- who is given what -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    first=st.integers(0, 1 << 40), count=st.integers(1, 70), streams=st.integers(1, 9), split=st.integers(2, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_dealt_out_alike_however_they_come(
    first: int, count: int, streams: int, split: int, seed: int
) -> None:
    """One by one or together the same; the models inside one see what it sees; never anything but its streams."""
    of = torch.randint(0, streams, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    batch = rows_of(list(range(first, first + count)), of)
    outer, inner = assigned(batch, streams, split), assigned(batch, streams, split * split)
    assert torch.equal(inner // split, outer) and int(inner.max()) < split * split and int(inner.min()) >= 0
    assert torch.equal(torch.cat([assigned(batch[row : row + 1], streams, split) for row in range(count)]), outer)
    for stream, block in zip(of, outer.tolist(), strict=True):
        assert seen(block + 1, split, streams)[stream] > 0


@settings(deadline=None)
@given(streams=st.integers(1, 12), blocks=st.integers(1, 40))
def test_every_stream_is_dealt_out_once(streams: int, blocks: int) -> None:
    shares_seen = [seen(block, blocks, streams) for block in range(1, blocks + 1)]
    for column in zip(*shares_seen, strict=True):
        assert sum(column) == pytest.approx(1)
    for row in shares_seen:
        assert sum(row) == pytest.approx(streams / blocks)


def test_one_stream_is_dealt_out_in_equal_shares() -> None:
    """In every sixteen windows each of sixteen models has one; four streams have a model each, sixteen models four."""
    batch = rows_of(list(range(64)), [0] * 64)
    assert all(sorted(assigned(batch, 1, 16)[at : at + 16].tolist()) == list(range(16)) for at in range(0, 64, 16))
    streams = [number // 16 for number in range(64)]
    several = rows_of(list(range(64)), streams)
    assert assigned(several, 4, 4).tolist() == streams
    assert [sorted({*assigned(several, 4, 16)[at : at + 16].tolist()}) for at in (0, 16)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    thirds = assigned(rows_of(list(range(3000)), [0] * 3000), 1, 3).bincount()
    assert int((thirds - 1000).abs().max()) <= 2 * (math.log2(3000) / 3 + 1)  # the sequence's discrepancy, twice


# --- the law: a block is trained on its rows as if it were alone -----------------------------------------------


@pytest.mark.parametrize("family", ZOO)
def test_a_block_learns_from_its_own_rows_as_if_it_were_alone(tmp_path: Path, family: str) -> None:
    """Its share of the gradient is that of the block taken out, of the rows that are its own; gains of the norms of
    heads belong to all heads, so to all blocks, and add up. The negative controls: from rows that are another's a block
    has none, and all rows give another gradient."""
    decoder, found = opened(make_checkpoint(tmp_path, family, num_key_value_heads=4), levels=2)
    (blocks,) = inner_models(decoder, found)
    batch = replace(some_batch(rows=6), streams=torch.tensor([0, 1, 0, 1, 1, 0]))
    objective = of_levels([[block.decoder for block in blocks]], (0.0, 1.0), streams=2)
    together = gradients(decoder, objective(decoder, batch).total)
    others = [of_levels([[b.decoder for b in blocks]], (0.0, 1.0), streams=2)(decoder, batch[rows]).total
              for rows in (torch.tensor([1, 3, 4]), torch.tensor([0, 2, 5]))]  # fmt: skip
    without_own = [gradients(decoder, total) for total in others]
    common: dict[str, list[Tensor]] = {}
    for at, block in enumerate(blocks):
        own = (batch.streams == at).nonzero()[:, 0]
        alone = taken_out(decoder, block.child)
        expected = gradients(alone, next_token(alone, batch[own]).total)
        of_all = gradients(alone, next_token(alone, batch).total)
        wrong = []
        for name, cut in block.child.cuts.items():
            if cut.plain:
                common.setdefault(name, []).append(expected[name])
                continue
            assert not bool(cut.of(without_own[at][cut.source]).any())
            if float(expected[name].abs().max()) > 1e-9:  # the bias of a key has no gradient but rounding
                assert apart(cut.of(together[cut.source]), expected[name]) < BOUND
                wrong.append(apart(of_all[name], expected[name]))
        assert max(wrong) > 0.3
    assert bool(common) == ("query_norm" in decoder.description["roles"])
    for name, parts in common.items():
        assert apart(together[name], torch.stack(parts).sum(0)) < BOUND


def test_swapped_streams_are_others_rows(tmp_path: Path) -> None:
    decoder, found = opened(make_checkpoint(tmp_path, "llama"))
    objective = of_levels(decoders(inner_models(decoder, found)), (0.0, 0.5, 0.5), streams=2)
    batch = replace(some_batch(rows=4), streams=torch.tensor([0, 0, 1, 1]))
    swapped = replace(batch, streams=1 - batch.streams)
    one, other = (gradients(decoder, objective(decoder, each).total) for each in (batch, swapped))
    assert min(apart(one[name], other[name]) for name in one) > 0.3
    assert torch.equal(objective(decoder, batch).nll, objective(decoder, swapped).nll)


def test_a_levels_loss_is_the_sum_over_its_blocks(tmp_path: Path) -> None:
    decoder, found = opened(make_checkpoint(tmp_path, "llama"))
    inner = inner_models(decoder, found)
    batch = replace(some_batch(rows=5, packed=False), streams=torch.tensor([0, 1, 2, 0, 1]))
    loss = of_levels(decoders(inner), (0.5, 0.3, 0.2), streams=3)(decoder, batch)
    total = 0.5 * float(loss.nll)
    for level, weight in ((1, 0.3), (2, 0.2)):
        chosen = assigned(batch, 3, len(inner[level - 1])).tolist()
        rows = [
            float(next_token(inner[level - 1][at].decoder, batch[row : row + 1]).nll) for row, at in enumerate(chosen)
        ]
        assert float(loss.numbers[f"loss_level_{level}"]) == pytest.approx(sum(rows), rel=1e-9)
        total += weight * sum(rows)
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-9)


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", vocab_size=32)
    stream = documents([9, 30, 200])
    ends, logged = [], []
    for micro in (None, 1, 3):
        decoder, found = opened(folder, dtype=torch.float32)
        objective = of_levels(decoders(inner_models(decoder, found)), shares(3), streams=1)
        logged.append([done.numbers for done in take_steps(decoder, stream, objective, steps=3, micro=micro)])
        ends.append(values(decoder))
    for end, numbers in zip(ends[1:], logged[1:], strict=True):
        assert max(apart(end[name], ends[0][name]) for name in end) < 1e-3
        assert all(one == pytest.approx(other, rel=1e-4) for one, other in zip(numbers, logged[0], strict=True))
    batch = Windows((stream,), 16).batch(0, 4)
    decoder, found = opened(folder, dtype=torch.float32)
    chosen = assigned(batch, 1, 2).tolist()
    (halves, _) = inner_models(decoder, found)
    rows = [float(next_token(halves[at].decoder, batch[row : row + 1]).nll) for row, at in enumerate(chosen)]
    assert logged[0][0]["loss_level_1"] == pytest.approx(sum(rows) / scored(batch), rel=1e-5)


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts that have nothing in common: letters that go up, and digits that go down."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz " * 400)
    (folder / "digits.txt").write_text("9876543210 9753186420 " * 500)
    return folder


def test_children_learn_what_they_are_given(here: Path, streams: Path, tmp_path: Path) -> None:  # noqa: F811
    """On two kinds of text each block is far better on its own, and stock transformers says so of one taken out. The
    whole knows both, and so do, the negative control, the blocks of a model that was trained on both as one stream."""
    model = make_checkpoint(tmp_path / "model", "llama", vocab_size=256, num_key_value_heads=4)
    texts = (streams / "letters.txt", streams / "digits.txt")
    data = ("--data", texts[0], "--data", texts[1])
    shape = ("--steps", "60", *SHAPE, "--fractal", "3", "--split", "2", "--lr", "1e-2", "--eval-every", "60")
    report = train(model, *data, *shape, "-o", "out")
    found = {row["model"]: row["streams"] for row in report["evaluation"]["models"]}
    print(json.dumps(report["evaluation"], indent=1))
    assert list(found) == ["1:1/2", "1:2/2", "2:1/4", "2:2/4", "2:3/4", "2:4/4"]
    for name, losses in found.items():
        own, other = ("letters", "digits") if name in ("1:1/2", "2:1/4", "2:2/4") else ("digits", "letters")
        assert losses[own] + 1 < losses[other]
    assert max(report["evaluation"][f"loss_{name}"] for name in ("letters", "digits")) < 1
    Path("joined.txt").write_text("".join(text.read_text() for text in texts))
    measured = ("--eval-data", texts[0], "--eval-data", texts[1], "--eval-tokens", "2048")
    blind = train(model, "--data", "joined.txt", *measured, *shape, "-o", "blind")["evaluation"]["models"]
    told_apart = [[abs(losses["letters"] - losses["digits"]) for losses in each]
                  for each in (found.values(), [row["streams"] for row in blind])]  # fmt: skip
    print(told_apart)
    assert 3 * max(told_apart[1]) < min(told_apart[0])
    told = report["evaluation"]["loss_level_1"]  # each block's loss on what it was given, by tokens
    assert min(found["1:1/2"]["letters"], found["1:2/2"]["digits"]) < told
    assert told < max(found["1:1/2"]["letters"], found["1:2/2"]["digits"])
    assert json.loads(Path("out/config.json").read_text())["fractal"] == {"norm": "sliced", "levels": 3, "split": 2}
    checkpoint = open_checkpoint(Path("out"))
    fitted = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    decoder = load_checkpoint(checkpoint, fitted)
    block = inner_models(decoder, fitted)[1][2]
    save(taken_out(decoder, block.child).stored, Path("block"), config=block.child.fit.config, command="")
    held = (streams / "digits.txt").read_bytes()[-report["data"]["held_out"]["streams"][1]["tokens"] :]
    Path("held.txt").write_bytes(held)
    stock = transformers.AutoModelForCausalLM.from_pretrained("block")
    assert stock_loss(stock, Path("held.txt"), 32) == pytest.approx(found["2:3/4"]["digits"], rel=1e-4)


def test_a_fractal_run_that_is_resumed_ends_in_the_same_bytes(
    here: Path, streams: Path, interrupted: Callable[..., None]  # noqa: F811
) -> None:  # fmt: skip
    arguments: tuple[Any, ...] = (
        here / "model", "--data", streams / "letters.txt", "--data", streams / "digits.txt", "--steps", "6", *SHAPE,
        "--save-every", "2", "--fractal", "3", "--split", "2", "--separator", " ",
    )  # fmt: skip
    train(*arguments, "-o", "whole")
    interrupted(5, *arguments, "-o", "cut")
    assert train(*arguments, "-o", "cut", "--resume")["resumed_at"] == 4
    assert content(Path("cut")) == content(Path("whole"))
    assert [e["loss"] for e in log("cut") if "loss" in e] == [e["loss"] for e in log("whole") if "loss" in e]


def test_sizes_that_do_not_split(here: Path) -> None:  # noqa: F811
    """The error lists the splits that work, and how deep the one that was asked for can go."""
    shape = (here / "model", "--data", here / "text.txt", "--steps", "1")
    refused(2, "into 9 blocks; these work: --split 2", *shape, "--fractal", "3", "--split", "3")
    refused(2, "into 64 blocks; these work: --split 2 or --fractal 2", *shape, "--fractal", "4")
    refused(2, "--split says nothing without --fractal", *shape, "--split", "2")
    refused(2, "--fractal trains the model's own weights", *shape, "--fractal", "2", "--lora", "2")
