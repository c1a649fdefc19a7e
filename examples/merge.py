#!/usr/bin/env python3
"""Four models of a quarter of a text each, merged, glued and folded, against what the same effort buys elsewhere.

    python examples/merge.py TEXT [--seeds 3] [--steps 200] [--json table.json]

Four small Llamas of bytes are trained, each on its quarter. Measured on what is held back of all quarters: each alone,
the mean of their weights, `tlt merge` of them, and that with `--glue lowrank` and nothing but the glue trained on all
quarters, before and after `tlt fold`. The controls see the same text: one part trained on, for as many steps and for
as many as cost the same (tokens times parameters), a LoRA beside the merged model of at least as many trained
parameters, and all of the merged model, for as many steps. Of each that is trained the best of several rates is taken,
by windows that the table does not read. Losses are nats per byte, mean and deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tlt_cli as tlt
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.sites import sites
from tlt_cli.model.text import BYTES, Tokenizer
from tlt_cli.training.corpus import Stream, read_streams
from tlt_cli.training.init import initial_config
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.saving import save
from tlt_cli.training.start import blank, new_decoder
from tlt_cli.training.windows import Windows, evaluation_windows, hold_out

QUARTERS = 4
SPEC = "llama:dim=64,layers=2,heads=4,ffn=192"
WAYS = {
    "single": "one part",
    "average": "mean of the weights",
    "ensemble": "merged",
    "glue": "merged, glue trained",
    "folded": "  and folded",
    "same": "control: one part, same tokens",
    "one": "control: one part, same compute",
    "lora": "control: LoRA beside the merged",
    "all": "control: all of it trained",
}


def train(decoder: Decoder, trained: Mapping[str, nn.Parameter], windows: Windows, recipe: Recipe) -> None:
    """Move the parameters named, and nothing else."""
    decoder.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    adapter: Any = decoder.adapter
    run = Run(
        decoder=decoder, trained=trained, windows=windows, recipe=recipe, optimizers=optimizers(trained, recipe),
        adapter=adapter,
    )  # fmt: skip
    for step in range(recipe.steps):
        take_step(run, step)


@dataclass(frozen=True)
class Texts:
    """The quarters to train on, and what is held back of all: windows to choose a rate by, and to measure."""

    quarters: tuple[Stream, ...]
    choosing: Tensor
    measuring: Tensor


def texts(path: Path, folder: Path, context: int) -> Texts:
    """The text in quarters, and a tenth of each held back."""
    whole = path.read_bytes()
    size = len(whole) // QUARTERS
    parts = [folder / f"{number}.txt" for number in range(QUARTERS)]
    for number, part in enumerate(parts):
        part.write_bytes(whole[number * size : (number + 1) * size])
    trained, held = hold_out(read_streams([str(part) for part in parts], Tokenizer("bytes", BYTES)), 0.1)
    rows = torch.cat([evaluation_windows(stream, context) for stream in held])
    return Texts(tuple(trained), rows[::4], rows[torch.arange(len(rows)) % 4 != 0])


@dataclass(frozen=True)
class Best:
    """The best of several rates: the model, the rate, and what the windows that chose it said of each."""

    decoder: Decoder
    rate: float
    chosen_by: dict[float, float]


class Comparison:
    """One seed."""

    def __init__(self, texts: Texts, options: argparse.Namespace, seed: int, folder: Path) -> None:
        self.texts, self.options, self.seed, self.folder = texts, options, seed, folder
        self.together = Windows(texts.quarters, options.context, seed)

    def measured(self, decoder: Decoder, rows: Tensor | None = None) -> float:
        rows = self.texts.measuring if rows is None else rows
        return float(perplexity(decoder, rows.flatten(), rows.shape[1], 64)["nll"])

    def recipe(self, steps: int, rate: float, **more: Any) -> Recipe:
        return Recipe(
            steps=steps, learning_rate=rate, batch=self.options.batch, context=self.options.context, seed=self.seed,
            **more,
        )  # fmt: skip

    def best(self, name: str, rates: Sequence[float], steps: int, rank: int = 0) -> Best:
        """A checkpoint trained at each rate: its glue if it has any, a LoRA of `rank` beside it, or all of it."""
        found, best = dict[float, float](), None
        for rate in rates:
            decoder = tlt.load(self.folder / name, quiet=True)
            trained = {n: p for n, p in decoder.named_parameters() if ".glue" in n} or dict(decoder.named_parameters())
            if rank:
                generator = torch.Generator().manual_seed(self.seed)
                decoder.adapter = Lora(decoder, updates(decoder, rank=rank), generator=generator)
                trained = dict(decoder.adapter.named_parameters())
            decay = 0.1 if len(trained) == len(list(decoder.parameters())) else 0.0
            train(decoder, trained, self.together, self.recipe(steps, rate, weight_decay=decay))
            found[rate] = self.measured(decoder, self.texts.choosing)
            if best is None or found[rate] < found[best.rate]:
                best = Best(decoder, rate, found)
        assert best is not None
        return best

    def parts(self) -> list[Decoder]:
        """Four models, each trained on its quarter and written."""
        fit, found = blank(initial_config(SPEC, vocab=BYTES, context=self.options.context)), []
        for number, quarter in enumerate(self.texts.quarters):
            decoder = new_decoder(fit, seed=QUARTERS * self.seed + number)
            windows = Windows((quarter,), self.options.context, self.seed)
            recipe = self.recipe(self.options.part_steps, self.options.part_lr)
            train(decoder, dict(decoder.named_parameters()), windows, recipe)
            save(decoder.stored, self.folder / f"part{number}", config=fit.config, command="examples/merge.py")
            found.append(decoder)
        return found

    def run(self) -> dict[str, Any]:
        options, parts = self.options, self.parts()
        singles = [self.measured(part) for part in parts]
        weights = [dict(part.named_parameters()) for part in parts]
        average = new_decoder(blank(initial_config(SPEC, vocab=BYTES, context=options.context)))
        average.load_state_dict({name: sum(one[name].detach() for one in weights) / QUARTERS for name in weights[0]})
        names = [str(self.folder / f"part{number}") for number in range(QUARTERS)]
        tlt.merge(names, self.folder / "merged", quiet=True)
        tlt.merge(names, self.folder / "glued", glue="lowrank", glue_rank=options.rank, seed=self.seed, quiet=True)
        ensemble = self.measured(tlt.load(self.folder / "merged", quiet=True))

        glued = self.best("glued", options.rates, options.steps)
        size = sum(p.numel() for n, p in glued.decoder.named_parameters() if ".glue" in n)
        whole, one = (sum(p.numel() for p in decoder.parameters()) for decoder in (glued.decoder, parts[0]))
        config = json.loads((self.folder / "glued" / "config.json").read_text())
        save(glued.decoder.stored, self.folder / "trained", config=config, command="examples/merge.py")
        folded = tlt.fold(self.folder / "trained", self.folder / "folded", quiet=True)

        best_part = min(range(QUARTERS), key=lambda number: self.measured(parts[number], self.texts.choosing))
        steps = ceil(options.steps * whole / one)
        slower = [rate / 3 for rate in options.rates]
        alone = self.best(f"part{best_part}", slower, steps)
        same = self.best(f"part{best_part}", slower, options.steps)
        everything = self.best("merged", slower, options.steps)
        merged = tlt.load(self.folder / "merged", quiet=True)
        width = sum(site.inputs + sum(site.outputs) for site in sites(merged))
        rank = ceil(size / width)
        lora = self.best("merged", options.rates, options.steps, rank)
        return {
            "losses": {
                "single": statistics.mean(singles), "average": self.measured(average), "ensemble": ensemble,
                "glue": self.measured(glued.decoder),
                "folded": self.measured(tlt.load(self.folder / "folded", quiet=True)),
                "same": self.measured(same.decoder), "one": self.measured(alone.decoder),
                "lora": self.measured(lora.decoder), "all": self.measured(everything.decoder),
            },
            "singles": singles,
            "trained": {"glue": size, "same": one, "one": one, "lora": rank * width, "all": whole - size},
            "steps": {"glue": options.steps, "same": options.steps, "one": steps, "lora": options.steps,
                      "all": options.steps},
            "rates": {way: {"best": best.rate, "nats": best.chosen_by} for way, best in
                      (("glue", glued), ("same", same), ("one", alone), ("lora", lora), ("all", everything))},
            "parameters": {"one": one, "glued": whole},
            "fold": {key: folded["verification"][key] for key in ("relative", "kl")},
        }  # fmt: skip


def table(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and deviation of every way, and what it is below the ensemble, seed by seed."""
    found = {}
    for way in WAYS:
        losses = [result["losses"][way] for result in results]
        gains = [result["losses"]["ensemble"] - result["losses"][way] for result in results]
        found[way] = {
            "mean": statistics.mean(losses), "deviation": statistics.stdev(losses) if len(losses) > 1 else 0.0,
            "below_ensemble": statistics.mean(gains), "least_below_ensemble": min(gains),
        }  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT", type=Path)
    for name, default in (
        ("seeds", 3),
        ("steps", 200),
        ("part-steps", 300),
        ("batch", 16),
        ("context", 64),
        ("rank", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--part-lr", type=float, default=3e-3)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-3, 5e-3, 1e-2], help="a third of these for all weights"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    results: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            texts_ = texts(options.text, Path(folder), options.context)
            results.append(Comparison(texts_, options, seed, Path(folder)).run())
        print(f"seed {seed}: {json.dumps(results[-1])}", flush=True)
    rows, first = table(results), results[0]
    print(f"\n{'':32}  held-out nats    below the merged  trained  steps")
    for way, name in WAYS.items():
        row, trained = rows[way], first["trained"].get(way)
        effort = f"  {trained:7,}  {first['steps'][way]:5}" if trained else ""
        print(f"{name:32}  {row['mean']:.4f} ± {row['deviation']:.4f}  {row['below_ensemble']:+16.4f}{effort}")
    winner = min((way for way in rows if way != "folded"), key=lambda way: rows[way]["mean"])
    print(f"\nlowest: {WAYS[winner]}; folding moves logits by at most "
          f"{max(result['fold']['relative'] for result in results):.1e} deviations")  # fmt: skip
    if options.json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "seeds": results, "table": rows}, indent=1))


if __name__ == "__main__":
    main()
