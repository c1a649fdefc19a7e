"""Models inside a model are trained as if each were alone, and taken out they are what they were inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint
from test_loop import documents, gradients, pattern, values
from test_train import SHAPE, content, here, in_a_folder, interrupted, log, refused, stock_loss, tlt, train  # noqa: F401
from torch import Tensor

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.families import Fit, fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.nested import shrunk, stated, without_levels
from tlt_cli.model.part import Child
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.training.corpus import Stream, of_ids
from tlt_cli.training.loop import Done, Run, take_step
from tlt_cli.training.nested import Drawn, Inner, inner_models, of_levels, shares
from tlt_cli.training.objective import Objective, next_token, scored
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.saving import save
from tlt_cli.training.start import blank, new_decoder
from tlt_cli.training.windows import Batch, Windows

BOUND = 1e-5  # relative to the largest entry
VOCAB = 32
HALVES: tuple[Mapping[str, Any], ...] = ({"share": Fraction(1, 2)}, {"share": Fraction(1, 4), "layers": 2})


def opened(folder: Path, levels: Sequence[Mapping[str, Any]] = HALVES) -> tuple[Decoder, Fit]:
    """A checkpoint in float64, its config.json with levels inside."""
    checkpoint = open_checkpoint(folder)
    found = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    sizes = [shrunk(found, **level) for level in levels]
    return load_checkpoint(checkpoint, found, dtype=torch.float64), with_levels(found, sizes)


def with_levels(found: Fit, sizes: Sequence[Mapping[str, int]]) -> Fit:
    return replace(found, config={**found.config, "nested": stated(sizes)})


def small(seed: int = 0, **overrides: Any) -> tuple[Decoder, Fit]:
    """A new Llama of 32 words with its half and its quarter inside."""
    config = ZOO["llama"](vocab_size=VOCAB, architectures=["LlamaForCausalLM"], **overrides).to_dict()
    found = blank({**config, "num_hidden_layers": 2})
    found = with_levels(found, [shrunk(found, Fraction(1, 2)), shrunk(found, Fraction(1, 4))])
    return new_decoder(found, seed=seed), found


def inside(decoder: Decoder, found: Fit) -> list[Inner]:
    return [inner for (inner,) in inner_models(decoder, found)]


def taken_out(decoder: Decoder, part: Child) -> Decoder:
    """A part as a model of its own."""
    alone = Decoder(describe(part.fit), dtype=next(decoder.parameters()).dtype)
    cut = {name: cut.of(decoder.weight(cut.source)).detach().clone() for name, cut in part.cuts.items()}
    alone.load_state_dict(cut)
    return alone


def some_batch(vocab: int = 97, rows: int = 3, length: int = 17, packed: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (rows, length), generator=generator)
    documents = torch.zeros(rows, length, dtype=torch.int32)
    documents[0, 5:], documents[-1, 9:] = 1, 1
    numbers = torch.arange(rows)
    return Batch(ids, documents if packed else None, torch.zeros(rows, dtype=torch.long), numbers)


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def take_steps(
    decoder: Decoder, stream: Stream, objective: Objective, *, steps: int = 3, micro: int | None = None, **recipe: Any
) -> list[Done]:
    chosen = Recipe(**{"steps": steps, "batch": 4, "context": 16, "learning_rate": 1e-2, **recipe})
    trained = dict(decoder.named_parameters())
    run = Run(
        decoder=decoder, trained=trained, windows=Windows((stream,), chosen.context, chosen.seed), recipe=chosen,
        optimizers=optimizers(trained, chosen), objective=objective, micro=micro,
    )  # fmt: skip
    return [take_step(run, step) for step in range(steps)]


# --- the law: inside as alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ZOO)
def test_a_level_learns_as_if_it_were_alone(tmp_path: Path, family: str, tied: bool) -> None:
    """Its loss's gradient inside is that of the level taken out; what lies outside it gets none.

    The negative control: the whole's own gradient of the same entries is another, and it has some everywhere.
    """
    decoder, found = opened(make_checkpoint(tmp_path, family, tied))
    batch = some_batch()
    whole = gradients(decoder, next_token(decoder, batch).total)
    for inner in inside(decoder, found):
        alone = taken_out(decoder, inner.child)
        own = next_token(alone, batch)
        there = next_token(inner.decoder, batch)
        assert float(there.total.detach()) == pytest.approx(float(own.total.detach()), rel=1e-12)
        gradient, expected = gradients(decoder, there.total), gradients(alone, own.total)
        wrong = []
        for name, cut in inner.child.cuts.items():
            kept = cut.of(gradient[cut.source])
            if float(expected[name].abs().max()) > 1e-9:  # the bias of a key has no gradient but rounding
                assert apart(kept, expected[name]) < BOUND
                wrong.append(apart(cut.of(whole[cut.source]), expected[name]))
            assert float(gradient[cut.source].abs().sum()) == pytest.approx(float(kept.abs().sum()), rel=1e-9)
        assert min(wrong) > 0.05 and max(wrong) > 0.3
        assert set(gradient) == {cut.source for cut in inner.child.cuts.values()} <= set(whole)


def test_steps_on_a_level_are_those_of_the_model_alone() -> None:
    """With all weight on a level an optimizer moves it as it moves the model taken out, clipping included."""
    decoder, found = small()
    inner = inside(decoder, found)[0]
    alone = taken_out(decoder, inner.child)
    start = values(decoder)
    there = take_steps(decoder, of_ids(pattern()), of_levels([[inner.decoder]], (0.0, 1.0)), clip=0.5)
    own = take_steps(alone, of_ids(pattern()), next_token, clip=0.5)
    for done, expected in zip(there, own, strict=True):
        assert done.numbers["loss_level_1"] == pytest.approx(expected.loss, rel=1e-6)
        assert done.norm == pytest.approx(expected.norm, rel=1e-5) and expected.norm > 0.5
    for name, cut in inner.child.cuts.items():
        moved = cut.of(decoder.weight(cut.source).detach())
        before = cut.of(start[cut.source])
        assert apart(moved - before, alone.weight(name).detach() - before) < 1e-3


def test_without_levels_it_is_the_plain_objective() -> None:
    batch = some_batch(VOCAB)
    decoder = small()[0]
    one, other = of_levels([], shares(1))(decoder, batch), next_token(decoder, batch)
    assert torch.equal(one.total, other.total) and torch.equal(one.nll, other.nll) and not one.numbers
    first, second = gradients(decoder, one.total), gradients(decoder, other.total)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_log_has_each_levels_loss() -> None:
    decoder, found = small()
    batch = Windows((documents([9, 30, 200]),), 16).batch(0, 4)
    expected = [float(next_token(inner.decoder, batch).nll) / scored(batch) for inner in inside(decoder, found)]
    whole = float(next_token(decoder, batch).nll) / scored(batch)
    for micro in (None, 1, 3):
        decoder = small()[0]
        models = [inner.decoder for inner in inside(decoder, found)]
        (done,) = take_steps(
            decoder, documents([9, 30, 200]), of_levels([[model] for model in models], shares(3)), steps=1, micro=micro
        )
        assert done.loss == pytest.approx(whole, rel=1e-5)
        assert [done.numbers[f"loss_level_{at}"] for at in (1, 2)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("drawn", [None, Drawn(4, 3)], ids=["all", "drawn"])
def test_micro_batches_change_nothing(drawn: Drawn | None) -> None:
    ends = []
    for micro in (None, 1, 3):
        decoder, found = small()
        models = [inner.decoder for inner in inside(decoder, found)]
        take_steps(
            decoder,
            documents([9, 30, 200]),
            of_levels([[model] for model in models], shares(3), drawn=drawn),
            steps=4,
            micro=micro,
        )
        ends.append(values(decoder))
    for end in ends[1:]:
        assert max(apart(end[name], ends[0][name]) for name in end) < 1e-3


def test_each_step_draws_one_level() -> None:
    """All of a step's rows the same one, which the seed and the step decide; every level has its turn, as often."""
    drawn, windows = Drawn(4, 3), Windows((documents([3000]),), 16)
    found = [{drawn(windows.batch(step * 4 + row, 1), 3) for row in range(4)} for step in range(300)]
    assert all(len(each) == 1 for each in found)
    chosen = [each.pop() for each in found]
    assert np.bincount(chosen, minlength=3).min() > 70
    assert [Drawn(4, 4)(windows.batch(step * 4, 1), 3) for step in range(300)] != chosen
    decoder, levels = small()
    models = [inner.decoder for inner in inside(decoder, levels)]
    batch = windows.batch(0, 4)
    loss = of_levels([[model] for model in models], (0.5, 0.25, 0.25), drawn=drawn)(decoder, batch)
    (name,) = loss.numbers
    assert name == f"loss_level_{drawn(batch, 2) + 1}"
    total = 0.5 * float(loss.nll) + 2 * 0.25 * float(loss.numbers[name])
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-6)


def test_a_nested_model_can_be_cut_and_a_plain_one_cannot() -> None:
    """After as many steps the half and the quarter of a nested model know the rule, those of a plain one far less; the
    whole has not suffered."""
    losses = {}
    for way in ("nested", "plain"):
        decoder, found = small()
        models = [inner.decoder for inner in inside(decoder, found)]
        objective = of_levels([[model] for model in models], shares(3)) if way == "nested" else next_token
        take_steps(decoder, of_ids(pattern()), objective, steps=60)
        losses[way] = [perplexity(model, pattern()[64:], 16)["nll"] for model in (decoder, *models)]
    print(losses)
    whole, *levels = zip(losses["nested"], losses["plain"], strict=True)
    assert max(whole) < 0.01 and losses["nested"][-1] < 0.7
    assert all(2 * nested_loss < cut_loss and cut_loss > 0.2 for nested_loss, cut_loss in levels)


# --- the command -----------------------------------------------------------------------------------------------

LEVELS = ("--nested", "1/2,8", "--nested-layers", "2,1/2")


def extracted(folder: Path, output: Path, level: int) -> Path:
    """A level of a checkpoint as one of its own."""
    checkpoint = open_checkpoint(folder)
    found = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    decoder = load_checkpoint(checkpoint, found)
    part = inside(decoder, found)[level - 1].child
    save(taken_out(decoder, part).stored, output, config=without_levels(part.fit.config), command="")
    return output


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_level_taken_out_is_what_it_was_in_the_report(here: Path, tmp_path: Path, family: str) -> None:  # noqa: F811
    """Stock transformers has the held-out loss that the run told of each level; another level has another."""
    model = make_checkpoint(tmp_path / "model", family, vocab_size=256)
    report = train(model, "--data", here / "text.txt", "--eval-data", here / "held.txt", "--steps", "6", *SHAPE,
                   "--nested", "1/2,1/4", "--lr", "1e-2", "-o", "out")  # fmt: skip
    (tmp_path / "cut.txt").write_bytes((here / "held.txt").read_bytes())
    told = [report["evaluation"][f"loss_level_{level}"] for level in (1, 2)]
    found = [
        stock_loss(transformers.AutoModelForCausalLM.from_pretrained(extracted(Path("out"), Path(f"{at}"), at)),
                   here / "held.txt", 32)
        for at in (1, 2)
    ]  # fmt: skip
    assert found == pytest.approx(told, rel=1e-5)
    assert abs(told[0] - told[1]) > 1e-2
    assert [row["model"] for row in report["evaluation"]["models"]] == ["1", "2"]
    assert [row["dim"] for row in report["levels"]] == [16, 8]


def test_config_json_names_the_levels(here: Path) -> None:  # noqa: F811
    report = train(here / "model", "--data", here / "text.txt", "--steps", "2", *SHAPE, *LEVELS, "-o", "out")
    levels = json.loads(Path("out/config.json").read_text())["nested"]["levels"]
    assert levels == [
        {"dim": 16, "ffn": 24, "heads": 2, "kv_heads": 1, "head_dim": 8, "layers": 2},
        {"dim": 8, "ffn": 12, "heads": 2, "kv_heads": 1, "head_dim": 4, "layers": 1},
    ]
    assert [{name: row[name] for name in levels[0]} for row in report["levels"]] == levels
    entries = [entry for entry in log("out") if "rate" in entry]
    assert all({"loss_level_1", "loss_level_2"} <= set(entry) for entry in entries)
    again = train("out", "--data", here / "text.txt", "--steps", "2", *SHAPE, "-o", "more")
    assert "loss_level_2" in again["evaluation"]
    assert json.loads(Path("more/config.json").read_text())["nested"]["levels"] == levels
    train("out", "--data", here / "text.txt", "--steps", "2", *SHAPE, "--nested", "none", "-o", "plain")
    assert "nested" not in json.loads(Path("plain/config.json").read_text())
    train("out", "--data", here / "text.txt", "--steps", "2", *SHAPE, "--level-weights", "3,1,1", "-o", "weighed")
    train("out", "--data", here / "text.txt", "--steps", "2", *SHAPE, "--nested-sample", "-o", "drawn")
    assert len({content(Path(name))["model.safetensors"] for name in ("more", "weighed", "drawn")}) == 3
    assert all(len({name for name in entry if "level" in name}) == 1 for entry in log("drawn") if "rate" in entry)
    train("out", "--data", here / "text.txt", "--steps", "2", *SHAPE, "--lora", "2", "-o", "adapter")
    told = tlt("train", "out", "--data", here / "text.txt", "--steps", "2", *SHAPE, "--nested", "1/4", "-o", "other")
    assert "are not trained on" in told.stderr and "loss level 1" in told.stderr
    assert len(json.loads(Path("other/config.json").read_text())["nested"]["levels"]) == 1


def test_heads_and_weights_of_levels(here: Path) -> None:  # noqa: F811
    report = train(
        here / "model", "--data", here / "text.txt", "--steps", "2", *SHAPE, "--nested", "1/2,0.25",
        "--nested-heads", "1/2,2", "--level-weights", "2,1,1", "--dry-run",
    )  # fmt: skip
    assert [(row["heads"], row["kv_heads"], row["head_dim"]) for row in report["levels"]] == [(2, 1, 8), (2, 1, 8)]
    assert not Path("out").exists()


def test_what_it_says_of_levels(here: Path) -> None:  # noqa: F811
    told = tlt("train", here / "model", "--data", here / "text.txt", "--steps", "2", *SHAPE, *LEVELS, "--dry-run")
    assert told.exit_code == 0 and told.stdout == "model-trained\n"
    for said in ("dim 16, ffn 24, heads 2/1 of 8, 2 deep", "dim 8, ffn 12, heads 2/1 of 4, 1 deep"):
        assert said in told.stderr


def test_mfu_counts_the_levels(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What a step costs is that of the models one by one; of drawn levels the mean."""
    from tlt_cli.cli import training

    costs = []
    monkeypatch.setattr(training, "journal", lambda *_, cost, **__: costs.append(cost) or 1 / 0)
    arguments = (here / "model", "--data", here / "text.txt", "--steps", "1", *SHAPE, "-o", "out")
    for more in ((), ("--nested", "1/2"), ("--nested", "1/4"), ("--nested", "1/2,1/4"),
                 ("--nested", "1/2,1/4", "--nested-sample"), ("--fractal", "2", "--split", "2")):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            train(*arguments, *more)
    plain, half, quarter, both, drawn, blocks = costs
    assert both == half + quarter - plain and drawn == plain + (both - plain) // 2
    assert blocks == half and plain < quarter < half < 2 * plain


def test_a_level_learns_of_a_teacher_too(here: Path) -> None:  # noqa: F811
    """The report has the divergence of the whole, as that of a model without levels has."""
    arguments = (here / "other", "--data", here / "text.txt", "--steps", "2", *SHAPE, "--distill", here / "model")
    nested, alone = train(*arguments, "--nested", "1/2", "-o", "out"), train(*arguments, "-o", "alone")
    begun = [next(entry["evaluation"] for entry in log(name) if "evaluation" in entry) for name in ("out", "alone")]
    assert begun[0]["kl"] == pytest.approx(begun[1]["kl"], rel=1e-6) and begun[0]["kl"] > 0
    assert 0 < nested["evaluation"]["kl"] != alone["evaluation"]["kl"]
    assert nested["teacher"] == alone["teacher"] and nested["teacher"]["source"] == "model"


@pytest.mark.parametrize("more", [LEVELS, ("--nested", "1/2,1/4", "--nested-sample")], ids=["all", "drawn"])
def test_a_nested_run_that_is_resumed_ends_in_the_same_bytes(
    here: Path, interrupted: Callable[..., None], more: tuple[str, ...]  # noqa: F811
) -> None:  # fmt: skip
    arguments = (here / "model", "--data", here / "text.txt", "--steps", "8", *SHAPE, "--save-every", "3", *more)
    train(*arguments, "-o", "whole")
    interrupted(5, *arguments, "-o", "cut")
    assert train(*arguments, "-o", "cut", "--resume")["resumed_at"] == 3
    assert content(Path("cut")) == content(Path("whole"))
    assert [e["loss"] for e in log("cut") if "loss" in e] == [e["loss"] for e in log("whole") if "loss" in e]


USAGE: dict[str, tuple[str, ...]] = {
    "--nested 2.0: expected": ("--nested", "2.0"),
    "--nested 1/1 is the whole": ("--nested", "1/1"),
    "'half' is neither a share": ("--nested", "half"),
    "'0' is neither a share": ("--nested", "1/2,0"),
    "1 values for the 2 levels": ("--nested", "1/2,1/4", "--nested-layers", "1"),
    "--nested-layers 1/4: 0.5 of 2": ("--nested", "1/2", "--nested-layers", "1/4"),
    "--nested-heads 9: 9 of 4": ("--nested", "1/2", "--nested-heads", "9"),
    "2 weights for 3 levels": ("--nested", "1/2,1/4", "--level-weights", "1,1"),
    "--level-weights 1,-1: expected": ("--nested", "1/2", "--level-weights", "1,-1"),
    "--level-weights 1,x: expected": ("--nested", "1/2", "--level-weights", "1,x"),
    "--nested-layers says nothing without --nested": ("--nested-layers", "1"),
    "--nested-sample says nothing of models side by side": ("--fractal", "2", "--nested-sample"),
    "--nested-sample says nothing where no models inside": ("--nested-sample",),
    "--nested-sample says nothing where no models inside are": ("--nested", "none", "--nested-sample"),
    "--level-weights says nothing": ("--level-weights", "1,1"),
    "--level-weights says nothing where": ("--lora", "2", "--level-weights", "1,1"),
    "--nested-layers says nothing with --nested none": ("--nested", "none", "--nested-layers", "1"),
    "--nested-heads says nothing with --nested none": ("--nested", "none", "--nested-heads", "1"),
    "--nested and --fractal": ("--nested", "1/2", "--fractal", "2"),
    "--nested trains the model's own weights": ("--nested", "1/2", "--lora", "2"),
    "--hierarchy orders one model's embedding": ("--nested", "1/2", "--hierarchy", "emergent"),
    "--nested-only orders one model's embedding": ("--fractal", "2", "--split", "2", "--nested-only", "embeddings"),
}


@pytest.mark.parametrize("told", USAGE)
def test_levels_that_are_none(here: Path, told: str) -> None:  # noqa: F811
    refused(2, told, here / "model", "--data", here / "text.txt", "--steps", "1", *USAGE[told])


def test_shares_that_leave_no_whole_sizes(here: Path) -> None:  # noqa: F811
    refused(
        1, "1/3 of the width would have dim 10.6667", here / "model", "--data", here / "text.txt", "--steps", "1",
        "--nested", "1/3",
    )  # fmt: skip
