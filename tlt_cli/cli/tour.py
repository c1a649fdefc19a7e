"""The stops of `tlt demo`: one per thing to see. Each adds to what is known of the tour's models.

A later command joins by a function of its own in STOPS, and by a column.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tlt_cli
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli.console import Output, Table
from tlt_cli.cli.description import describe
from tlt_cli.cli.factor_request import Request
from tlt_cli.cli.factoring import factor_checkpoint
from tlt_cli.cli.measuring import measure, prepare
from tlt_cli.cli.opening import opened
from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.generate import generate
from tlt_cli.model.text import BUILT_IN, Tokenizer, built_in_text
from tlt_cli.surgery.arrows import METHODS
from tlt_cli.surgery.grow import Recipe
from tlt_cli.training.flops import training_flops
from tlt_cli.training.loop import held_out, train
from tlt_cli.training.saving import save
from tlt_cli.training.start import blank, new_decoder

BATCH = 8
TRAINED_SHARE = 0.95  # of the text; the rest is held out
CONFIG: dict[str, Any] = json.loads(Path(__file__).with_name("demo.json").read_text("utf-8"))
PROMPT, WRITTEN = "The ", 60
CONTEXT = CONFIG["max_position_embeddings"]
TO_DIM = 2 * CONFIG["hidden_size"]
SMALL, RANDOM, FACTORED = "small", "random", "factored"
KEEP, CALIBRATION = 0.6, 1 << 16  # of the linear layers' parameters; bytes of text to fit to
GROWN = Recipe().method  # grown models are called by their methods; this one is trained on


@dataclass(frozen=True)
class Tour:
    """What all stops share: texts as ids, and `models`, by name what has been found out of each."""

    folder: Path
    steps: int
    seed: int
    out: Output
    trained_on: torch.Tensor
    kept_back: torch.Tensor
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What makes the same models again."""
        return shlex.join(["tlt", "demo", "--steps", str(self.steps), "--seed", str(self.seed)])

    @property
    def held_out_file(self) -> Path:
        """The text that no model is trained on."""
        return self.folder / "held-out.txt"

    def path(self, name: str) -> Path:
        """Where a model lies."""
        return self.folder / name


@dataclass(frozen=True)
class Seen:
    """What the tour showed: everything, the closing table, whether all that must be kept was, and that in words."""

    report: dict[str, Any]
    table: Table
    kept: bool
    verdict: str


def tour(folder: Path, *, steps: int, seed: int, out: Output) -> Seen:
    """Go round all stops, with everything written below `folder`, which must be new or empty.

    Raises TltError where it is not, and where a growth misses its bound: then nothing of that is written.
    """
    Recipe(seed=seed)  # refuses a seed that growing could not take, before the training
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TltError(f"{folder}: exists already; name a new folder: -o PATH")
    folder.mkdir(parents=True, exist_ok=True)
    text = built_in_text().encode()
    cut = int(TRAINED_SHARE * len(text))
    texts = [part.decode(errors="ignore") for part in (text[:cut], text[cut:])]
    trained_on, kept_back = (Tokenizer("bytes", CONFIG["vocab_size"]).encode(part) for part in texts)
    going = Tour(folder, steps, seed, out, trained_on, kept_back)
    going.held_out_file.write_bytes(texts[1].encode())
    with _one_core():
        for number, (title, stop) in enumerate(STOPS, 1):
            out.note(f"{number} of {len(STOPS)}: {title}")
            stop(going)
    return _seen(going)


# --- the stops ---------------------------------------------------------------------------------------------


def _make(tour: Tour) -> None:
    fitted = blank(CONFIG)
    decoder = new_decoder(fitted, seed=tour.seed)
    _train(tour, SMALL, decoder, tour.steps, seed=tour.seed)
    save(decoder.stored, tour.path(SMALL), config=CONFIG, command=tour.command)


def _grow(tour: Tour) -> None:
    for method in METHODS:
        report = tlt_cli.grow(
            tour.path(SMALL), tour.path(method), to_dim=TO_DIM, method=method, seed=tour.seed, quiet=True
        )
        cost = {key: tour.models[SMALL][key] for key in ("steps", "flops")}  # what the source has cost counts too
        tour.models[method] = {"command": report["command"], **cost, **_distance(report["verification"])}
        tour.out.detail(f"{report['command']}: logits within {report['verification']['relative']:.1e} deviations")


def _factor(tour: Tour) -> None:
    text = tour.folder / "calibration.txt"
    text.write_bytes(bytes(tour.trained_on[:CALIBRATION].tolist()))
    request = Request(keep=KEEP, calibration=[text], context=CONTEXT, output=tour.path(FACTORED), seed=tour.seed)
    with tour.out.progress("fitting factors") as progress:
        progress(0, 1)
        report = factor_checkpoint(str(tour.path(SMALL)), request, out=Output(quiet=True)).report
    tour.models[FACTORED] = {"command": report["command"], "keep": report["keep"]}
    tour.out.detail(f"{report['command']}: {report['keep']:.1%} of the linear layers' parameters")


def _inspect(tour: Tour) -> None:
    for name, model in tour.models.items():
        checkpoint, fitted = opened(str(tour.path(name)), out=Output(quiet=True))
        data = describe(checkpoint, fitted)
        model.update(parameters=data["parameters"], axes=data["axes"])


def _evaluate(tour: Tour) -> None:
    sources = [str(tour.path(name)) for name in tour.models]
    quiet = Output(quiet=True)
    ready = prepare(sources, out=quiet, family=None, axes=None, tokenizer=None, data=[tour.held_out_file])
    reports = measure(ready, out=tour.out, context=CONTEXT, batch_size=None, device="cpu", dtype=None, stream=False)
    for model, report in zip(tour.models.values(), reports, strict=True):
        model.update(perplexity=report["perplexity"], loss=report["nll"], tokens=report["tokens"])


def _generate(tour: Tour) -> None:
    words = Tokenizer("bytes", CONFIG["vocab_size"])
    for name in (SMALL, GROWN):
        decoder = tlt_cli.load(tour.path(name), device="cpu", quiet=True)
        drawn = generate(decoder, words.encode(PROMPT), WRITTEN, temperature=0.0)
        tour.models[name]["continuation"] = words.decode(list(drawn))
        tour.out.note(f"{name} goes on: {PROMPT}{tour.models[name]['continuation']}")


def _train_on(tour: Tour) -> None:
    for name in (SMALL, GROWN):
        decoder = tlt_cli.load(tour.path(name), device="cpu", quiet=True)
        _train(tour, name, decoder, tour.steps, seed=tour.seed + 1)
        source = open_checkpoint(tour.path(name))
        assert source.config is not None
        save(decoder.stored, tour.path(f"{name}-trained"), config=source.config, command=tour.command, source=source)
        tour.models[name]["loss_trained_on"] = held_out(decoder, tour.kept_back, context=CONTEXT)


def _control(tour: Tour) -> None:
    config = open_checkpoint(tour.path(GROWN)).config
    assert config is not None
    decoder = new_decoder(blank(config), seed=tour.seed)
    tour.models[RANDOM] = {"parameters": tour.models[GROWN]["parameters"]}
    loss = held_out(decoder, tour.kept_back, context=CONTEXT)
    tour.models[RANDOM].update(perplexity=math.exp(loss), loss=loss)
    _train(tour, RANDOM, decoder, 2 * tour.steps, seed=tour.seed)
    tour.models[RANDOM]["loss_trained_on"] = held_out(decoder, tour.kept_back, context=CONTEXT)
    save(decoder.stored, tour.path(f"{RANDOM}-trained"), config=config, command=tour.command)


STOPS: tuple[tuple[str, Callable[[Tour], None]], ...] = (
    (f"train a small model on {BUILT_IN}", _make),
    (f"tlt grow small --to-dim {TO_DIM}, by every method", _grow),
    (f"tlt factor small --keep {KEEP}, fitted to the text it was trained on", _factor),
    ("tlt inspect: what is in them", _inspect),
    ("tlt eval: perplexity of all of them", _evaluate),
    ("tlt generate: how two of them go on", _generate),
    (f"train the small one and {GROWN} on", _train_on),
    ("train a random model of the large size from the start", _control),
)


# --- what stops have in common ---------------------------------------------------------------------------------


def _train(tour: Tour, name: str, decoder: Decoder, steps: int, *, seed: int) -> None:
    with tour.out.progress(f"training {name}") as progress:
        losses = train(
            decoder, tour.trained_on, steps=steps, batch=BATCH, context=CONTEXT, learning_rate=3e-3, schedule="linear",
            seed=seed, progress=progress,
            log=lambda step, loss: tour.out.detail(f"{name}: step {step}, loss {loss:.4f}") if step % 50 == 0 else None,
        )  # fmt: skip
    model = tour.models.setdefault(name, {})
    model["steps"] = model.get("steps", 0) + steps
    model["flops"] = model.get("flops", 0) + training_flops(decoder, steps * BATCH * CONTEXT, context=CONTEXT)
    model.setdefault("losses", []).extend(losses)


def _distance(verification: dict[str, Any]) -> dict[str, float]:
    return {key: verification[key] for key in ("max_logit", "deviation", "relative", "bound", "kl")}


@contextmanager
def _one_core() -> Iterator[None]:
    """Models this small run faster on one core, and much faster where others use the machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- the end ------------------------------------------------------------------------------------------------


def _seen(tour: Tour) -> Seen:
    small = tour.models[SMALL]
    for method in METHODS:
        model = tour.models[method]
        # no token's log-probability moves by more than twice what its logits do
        allowed = 2 * model["bound"] * model["deviation"]
        model["kept"] = model["relative"] <= model["bound"] and abs(model["loss"] - small["loss"]) <= allowed
    kept = all(model.get("kept", True) for model in tour.models.values())
    verdict = _verdict(tour, kept)
    report = {
        "command": tour.command, "seed": tour.seed, "steps": tour.steps, "corpus": BUILT_IN, "kept": kept,
        "verdict": verdict, "models": [{"model": name, **model} for name, model in tour.models.items()],
    }  # fmt: skip
    columns = ("model", "weights", "max |Δlogit|", "KL", "perplexity", "trained on")
    rows = [
        [name, *(model.get(key) for key in ("parameters", "max_logit", "kl", "perplexity")), _later(model)]
        for name, model in tour.models.items()
    ]
    return Seen(report, Table(columns, rows), kept, verdict)


def _verdict(tour: Tour, kept: bool) -> str:
    small, grown = tour.models[SMALL], tour.models[GROWN]
    lost = "nothing was lost" if kept else "SOMETHING WAS LOST"
    before, after = f"{small['perplexity']:.4f}", f"{grown['perplexity']:.4f}"
    ended = {
        name: f"{model['loss_trained_on']:.3f}" for name, model in tour.models.items() if "loss_trained_on" in model
    }
    cost = {name: f"{tour.models[name]['flops'] / 1e9:,.0f}" for name in ended}
    return (
        f"{lost}: perplexity {before} before growing, {after} after; {tour.models[FACTORED]['perplexity']:.4f} with "
        f"{KEEP:.0%} of the linear layers' parameters. It trains on: held-out loss {grown['loss']:.3f} "
        f"nats per byte, {ended[GROWN]} after {tour.steps} more steps; the small model {ended[SMALL]} after as many; "
        f"a random model of the large size {ended[RANDOM]} after {2 * tour.steps}. That took {cost[GROWN]}, "
        f"{cost[SMALL]} and {cost[RANDOM]} GFLOP of training in all. One seed and a short run: this shows that the "
        "grown model learns, not which way is the cheapest."
    )


def _later(model: dict[str, Any]) -> float | None:
    return math.exp(model["loss_trained_on"]) if "loss_trained_on" in model else None
