#!/usr/bin/env python3
"""One model, four inside it, sixteen inside these: 21 models trained together, and what each becomes good at.

    python examples/fractal.py [TEXT TEXT TEXT TEXT] [--steps 800] [--json table.json]

A small Llama of bytes holds 4 blocks side by side, and in each of them 4 more. The batch is split: the whole sees every
window, and in each level every window goes to one block. Trained first on the first text alone, with nothing inside and
with blocks, to which windows are dealt out in equal shares; and then on all texts, each of which has a block of its own
and in it four; as a control on the same windows, dealt out without a look at which text they are of. The tables have
every model's loss on what is held out of each text, nats per byte. Without texts it takes four kinds from the standard
library. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import sysconfig
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import BYTES, Tokenizer
from tlt_cli.training.corpus import Stream, read_streams
from tlt_cli.training.fractal import check_splits
from tlt_cli.training.init import initial_config
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.nested import inner_models, of_levels, shares
from tlt_cli.training.objective import Loss
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.start import blank, new_decoder
from tlt_cli.training.windows import Batch, Windows, evaluation_windows, hold_out

LEVELS, SPLIT = 3, 4
BYTES_EACH = 400_000
Table = dict[str, dict[str, float]]


def built_in(folder: Path) -> list[Path]:
    """Four kinds of text that every Python has: prose, code, names of characters, and arithmetic."""
    library = Path(sysconfig.get_path("stdlib"))
    drawn = random.Random(0)
    sums = ((drawn.randrange(1000), drawn.randrange(1000)) for _ in range(30_000))
    names = (unicodedata.name(chr(code), "") for code in range(0x20, 0x3000))
    texts = {
        "prose": "\n".join(pydoc_data.topics.topics.values()),
        "code": "\n".join(path.read_text("utf-8") for path in sorted(library.glob("*.py"))),
        "names": "\n".join(name for name in names if name),
        "sums": "\n".join(f"{one} + {other} = {one + other}" for one, other in sums),
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text[:BYTES_EACH], "utf-8")
    return [folder / f"{name}.txt" for name in texts]


def trained(
    texts: Sequence[Stream], recipe: Recipe, spec: str, *, levels: int = LEVELS, by_stream: bool = True
) -> dict[str, Decoder]:
    """A model trained with the others inside, of one level with none; all of them by name, running where they are."""
    fit = blank(initial_config(spec, vocab=BYTES, context=recipe.context))
    check_splits(fit, levels, SPLIT)
    fit = replace(fit, config={**fit.config, "fractal": {"norm": "sliced", "levels": levels, "split": SPLIT}})
    decoder = new_decoder(fit, seed=recipe.seed)
    inner = inner_models(decoder, fit)
    models = [[each.decoder for each in level] for level in inner]
    objective = of_levels(models, shares(levels), streams=len(texts) if by_stream else 1)

    def without_a_look(decoder: Decoder, batch: Batch) -> Loss:
        return objective(decoder, replace(batch, streams=torch.zeros_like(batch.streams)))

    windows = Windows(tuple(texts), recipe.context, recipe.seed, (1.0,) * len(texts))
    parameters = dict(decoder.named_parameters())
    run = Run(
        decoder=decoder, trained=parameters, windows=windows, recipe=recipe, optimizers=optimizers(parameters, recipe),
        objective=objective if by_stream else without_a_look,
    )  # fmt: skip
    for step in range(recipe.steps):
        take_step(run, step)
    return {"whole": decoder, **{each.level.name: each.decoder for level in inner for each in level}}


def measured(models: dict[str, Decoder], held: dict[str, Tensor]) -> Table:
    """Every model's loss on each text."""
    return {
        name: {text: perplexity(decoder, rows.flatten(), rows.shape[1], 64)["nll"] for text, rows in held.items()}
        for name, decoder in models.items()
    }


def shown(title: str, table: Table) -> None:
    texts = list(next(iter(table.values())))
    print(f"\n{title}\n{'model':8}" + "".join(f"{text[:14]:>16}" for text in texts))
    for name, losses in table.items():
        best = {text: min(row[text] for other, row in table.items() if depth(other) == depth(name)) for text in texts}
        marks = {text: "*" if len(texts) > 1 and losses[text] == best[text] else " " for text in texts}
        print(f"{name:8}" + "".join(f"{losses[text]:15.4f}{marks[text]}" for text in texts), flush=True)


def depth(name: str) -> str:
    return name.partition(":")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", metavar="TEXT", nargs="*", type=Path)
    for name, default in (("seed", 0), ("steps", 800), ("batch", 16), ("context", 64), ("dim", 128), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--windows", type=int, default=200, help="held-out windows of every text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    with TemporaryDirectory() as folder:
        paths = options.texts or built_in(Path(folder))
        streams = read_streams(paths, Tokenizer("bytes", BYTES))
    training, held_out = hold_out(streams, 0.05)
    held = {
        Path(stream.source).stem: evaluation_windows(stream, options.context, options.windows) for stream in held_out
    }
    spec = f"llama:dim={options.dim},layers={options.layers},heads=4,ffn={3 * options.dim}"
    recipe = Recipe(
        steps=options.steps, learning_rate=options.lr, batch=options.batch, context=options.context, seed=options.seed
    )
    first = next(iter(held))
    tables = {}
    for title, levels in ((f"trained on {first} alone, with nothing inside", 1), (f"on {first} alone", LEVELS)):
        tables[title] = measured(trained(training[:1], recipe, spec, levels=levels), {first: held[first]})
        shown(title, tables[title])
    if len(training) > 1:
        for title, by_stream in (("each text to blocks of its own", True), ("dealt out without a look", False)):
            tables[title] = measured(trained(training, recipe, spec, by_stream=by_stream), held)
            shown(f"{title} (a star: the best of its level)", tables[title])
    if options.json is not None:
        settings = {**vars(options), "texts": list(held), "json": None}
        options.json.write_text(json.dumps({"settings": settings, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()
