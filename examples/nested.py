#!/usr/bin/env python3
"""Models inside a model, against models of those sizes trained alone, and against cuts of a model trained as one.

    python examples/nested.py TEXT [--seeds 3] [--steps 800] [--json table.json] [--plot nested.png]

A small Llama of bytes is trained with its half and its quarter inside: the first half of all axes is a model, and the
first half of that. Beside it, for as many steps on the same windows at the same rate: models of the three sizes, each
trained alone, and of the largest of them its half and its quarter cut out without any training. `--sampled` trains the
whole and one of the others per step instead of all three. Losses are nats per held-out byte, mean and deviation over
seeds. Some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from tlt_cli.families import Fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.nested import shrunk, stated
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import BYTES, Tokenizer
from tlt_cli.training.corpus import read_streams
from tlt_cli.training.init import initial_config
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.nested import Drawn, Inner, inner_models, of_levels, shares
from tlt_cli.training.objective import Objective, next_token
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.start import blank, new_decoder
from tlt_cli.training.windows import Windows, evaluation_windows, hold_out

SHARES = ("1/2", "1/4")
Losses = dict[str, list[float]]


def train(decoder: Decoder, windows: Windows, recipe: Recipe, objective: Objective = next_token) -> None:
    """Train all weights in place."""
    trained = dict(decoder.named_parameters())
    run = Run(
        decoder=decoder, trained=trained, windows=windows, recipe=recipe, optimizers=optimizers(trained, recipe),
        objective=objective,
    )  # fmt: skip
    for step in range(recipe.steps):
        take_step(run, step)


def inside(decoder: Decoder, fit: Fit) -> list[Inner]:
    """The models inside, one a level."""
    return [inner for (inner,) in inner_models(decoder, fit)]


def compared(fit: Fit, windows: Windows, held: Tensor, recipe: Recipe, *, sampled: bool) -> Losses:
    """For every way to get them the losses of the whole and of each size inside it."""

    def measured(decoder: Decoder) -> float:
        return float(perplexity(decoder, held.flatten(), held.shape[1], 64)["nll"])

    def measured_with(decoder: Decoder) -> list[float]:
        return [measured(decoder), *(measured(inner.decoder) for inner in inside(decoder, fit))]

    together = new_decoder(fit, seed=recipe.seed)
    models = [[inner.decoder] for inner in inside(together, fit)]
    drawn = Drawn(recipe.batch, recipe.seed) if sampled else None
    train(together, windows, recipe, of_levels(models, shares(1 + len(models)), drawn=drawn))
    found = {"nested": measured_with(together)}
    plain = new_decoder(fit, seed=recipe.seed)
    train(plain, windows, recipe)
    found["alone"], found["cut"] = [measured(plain)], measured_with(plain)
    for inner in inside(plain, fit):
        small = new_decoder(inner.child.fit, seed=recipe.seed)
        train(small, windows, recipe)
        found["alone"].append(measured(small))
    return found


def plotted(path: Path, sizes: Sequence[int], results: Sequence[Losses]) -> None:
    """Loss over parameters, a line for every way, with the deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "nested": "one model, trained nested",
        "alone": "trained alone",
        "cut": "cut out of one trained as a whole",
    }
    for way, name in names.items():
        columns = list(zip(*(result[way] for result in results), strict=True))
        means = [statistics.mean(column) for column in columns]
        pyplot.errorbar(sizes, means, [deviation(column) for column in columns], marker="o", capsize=3, label=name)
    pyplot.xscale("log")
    pyplot.xlabel("parameters")
    pyplot.ylabel("held-out loss, nats per byte")
    pyplot.legend()
    pyplot.savefig(path, dpi=150, bbox_inches="tight")


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT")
    for name, default in (("seeds", 3), ("steps", 800), ("batch", 16), ("context", 64), ("dim", 128), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--windows", type=int, default=800, help="held-out windows")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)

    trained, held_out = hold_out(read_streams([options.text], Tokenizer("bytes", BYTES)), 0.05)
    held = evaluation_windows(held_out[0], options.context, options.windows)
    spec = f"llama:dim={options.dim},layers={options.layers},heads=4,ffn={3 * options.dim}"
    fit = blank(initial_config(spec, vocab=BYTES, context=options.context))
    fit = replace(fit, config={**fit.config, "nested": stated([shrunk(fit, Fraction(share)) for share in SHARES])})
    results: list[Losses] = []
    for seed in range(options.seeds):
        recipe = Recipe(
            steps=options.steps, learning_rate=options.lr, batch=options.batch, context=options.context, seed=seed
        )
        results.append(compared(fit, Windows(trained, options.context, seed), held, recipe, sampled=options.sampled))
        print(f"seed {seed}: {json.dumps(results[-1])}", flush=True)

    decoder = new_decoder(fit)
    sizes = [sum(p.numel() for p in decoder.parameters()), *(inner.parameters for inner in inside(decoder, fit))]
    table = rows(sizes, results)
    print("\nsize  parameters  nested           alone            nested/alone  cut of the plain whole")
    for name, row in table.items():
        pairs = [_pair(row[way]) for way in ("nested", "alone", "cut")]
        print(f"{name:5} {row['parameters']:10,}  {pairs[0]}  {pairs[1]}  {row['ratio'] - 1:+12.2%}  {pairs[2]}")
    if options.json is not None:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "plot")}
        options.json.write_text(json.dumps({"settings": settings, "seeds": results, "table": table}, indent=1))
    if options.plot is not None:
        plotted(options.plot, sizes, results)


def rows(sizes: Sequence[int], results: Sequence[Losses]) -> dict[str, dict[str, Any]]:
    """Size by size each way's mean and deviation, and how much worse nested is than alone, the mean over seeds."""
    found: dict[str, dict[str, Any]] = {}
    for at, name in enumerate(("1", *SHARES)):
        columns = {way: [result[way][at] for result in results] for way in ("nested", "alone", "cut")}
        ratio = statistics.mean(a / b for a, b in zip(columns["nested"], columns["alone"], strict=True))
        pairs = {way: {"mean": statistics.mean(c), "deviation": deviation(c)} for way, c in columns.items()}
        found[name] = {"parameters": sizes[at], **pairs, "ratio": ratio}
    return found


def _pair(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.4f} ± {found['deviation']:.4f}"


if __name__ == "__main__":
    main()
