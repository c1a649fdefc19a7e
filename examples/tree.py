#!/usr/bin/env python3
"""A tree of LoRAs against one LoRA, on a mixture of texts and on one text alone.

    python examples/tree.py MODEL TEXT TEXT TEXT [--seeds 3] [--steps 300] [--json table.json]

Every row is trained on the same windows of the training part of all texts, a tenth of each being held out: one LoRA of
the rank that a leaf of the tree has (what is served costs the same), one of the rank of all nodes together (what is
trained costs the same), and the tree, measured soft, as it is trained, and hard, as it is served. Rates are swept, and
each method has its best. The control is the first text alone, where there is nothing to route by. Losses are in nats
per held-out token, the mean over texts. About two hours on one core with three seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tlt_cli as tlt
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import load_tokenizer
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_shape import Shape
from tlt_cli.model.tree_start import aim
from tlt_cli.training.corpus import Stream, read_streams
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.windows import Windows, evaluation_windows, hold_out

AIMED_AT = 64  # windows


@dataclass(frozen=True)
class Texts:
    """What is trained on and what is held out, text by text."""

    trained: tuple[Stream, ...]
    held: tuple[Stream, ...]


def measured(decoder: Decoder, texts: Texts, context: int, most: int) -> float:
    """Nats per token of what is held out, the mean over texts."""
    rows = [evaluation_windows(stream, context, most) for stream in texts.held]
    return statistics.mean(perplexity(decoder, some.flatten(), context)["nll"] for some in rows)


def trained(decoder: Decoder, adapter: Lora | Tree, texts: Texts, recipe: Recipe) -> None:
    """Train the adapter in place, on the windows that belong to the recipe's seed. Texts have equal shares."""
    windows = Windows(texts.trained, recipe.context, recipe.seed, weights=(1.0,) * len(texts.trained))
    decoder.adapter = adapter.train()
    if isinstance(adapter, Tree):
        some = windows.batch(0, AIMED_AT)
        aim(adapter, decoder, some.rows[:, :-1], None if some.documents is None else some.documents[:, :-1])
    parameters: dict[str, nn.Parameter] = dict(adapter.named_parameters())
    run = Run(
        decoder=decoder, trained=parameters, windows=windows, recipe=recipe,
        optimizers=optimizers(parameters, recipe), adapter=adapter,
    )  # fmt: skip
    for step in range(recipe.steps):
        take_step(run, step)
    adapter.eval()


def row(
    decoder: Decoder, make: Callable[[int], Lora | Tree], texts: Texts, recipe: Recipe, most: int
) -> dict[str, Any]:
    """The losses of one adapter trained by one recipe; of a tree also soft, and what became of its leaves."""
    adapter = make(recipe.seed)
    trained(decoder, adapter, texts, recipe)
    found: dict[str, Any] = {}
    if isinstance(adapter, Tree):
        found["soft"] = measured(decoder, texts, recipe.context, most)
        adapter.report()
        adapter.hard = True
    found["loss"] = measured(decoder, texts, recipe.context, most)
    return {**found, **adapter.report()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("texts", metavar="TEXT", nargs="+")
    for name, default in (("seeds", 3), ("steps", 300), ("batch", 8), ("context", 128), ("depth", 2), ("rank", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--route", default="running")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of every text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    decoder = tlt.load(options.model, device="cpu").requires_grad_(False)
    tokenizer = load_tokenizer(open_checkpoint(options.model).companions, decoder.description["vocab"])
    mixture = Texts(*hold_out(read_streams(options.texts, tokenizer), 0.1))
    alone = Texts(mixture.trained[:1], mixture.held[:1])
    shape = Shape(depth=options.depth, rank=options.rank, route=options.route)

    def lora(rank: int) -> Callable[[int], Lora]:
        return lambda seed: Lora(decoder, updates(decoder, rank=rank), generator=torch.Generator().manual_seed(seed))

    methods: dict[str, Callable[[int], Lora | Tree]] = {
        f"LoRA, rank {shape.active}": lora(shape.active),
        f"LoRA, rank {shape.nodes * shape.rank}": lora(shape.nodes * shape.rank),
        f"tree of {shape.leaves}, rank {shape.active}": lambda seed: Tree(decoder, shape, seed=seed),
    }
    results: list[dict[str, Any]] = []
    for where, texts in (("all texts", mixture), ("the first text alone", alone)):
        decoder.adapter = None
        print(f"{where}\n  base: {measured(decoder, texts, options.context, options.windows):.4f}", flush=True)
        for name, make in methods.items():
            best: list[dict[str, Any]] = []
            for learning_rate in options.rates:
                found = []
                for seed in range(options.seeds):
                    recipe = Recipe(
                        steps=options.steps, learning_rate=learning_rate, batch=options.batch, context=options.context,
                        seed=seed,
                    )  # fmt: skip
                    found.append(row(decoder, make, texts, recipe, options.windows))
                    results.append({"where": where, "method": name, "rate": learning_rate, "seed": seed, **found[-1]})
                if not best or statistics.mean(one["loss"] for one in found) < statistics.mean(
                    one["loss"] for one in best
                ):
                    best, rate = found, learning_rate
            losses = [one["loss"] for one in best]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            line = f"  {name}: {statistics.mean(losses):.4f} ± {spread:.4f} at {rate:g}"
            if "soft" in best[0]:
                soft = statistics.mean(one["soft"] for one in best)
                line += f" served; {soft:.4f} soft, {statistics.mean(losses) - soft:+.4f} apart; "
                line += f"dead leaves {max(one['dead_leaves'] for one in best):.0f}"
            print(line, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
