#!/usr/bin/env python3
"""Low-rank regularizers on MNIST: what a small network still knows once its matrices are cut to rank r by plain SVD.

    python examples/low_rank_mnist.py FOLDER [--plot accuracy.png] [--json accuracy.json]

FOLDER holds MNIST's ten thousand test images and labels as they are published, t10k-images-idx3-ubyte.gz and
t10k-labels-idx1-ubyte.gz: 8000 of them are trained on and 2000 are held out. Every form of regularizer at every
strength trains the same networks (784-128-128-10) from the same starting weights on the same batches; then both hidden
matrices are cut to each rank. The table has the mean accuracy over the starting weights, in percent, and a star where
every one of them beats its own twin trained without. "decay" is plain weight decay of the same strength, the control:
what a regularizer is worth beyond that. About five minutes on one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlt_cli.training.regularize import Regularizer, Target, regularize, spectra

STRENGTHS = (0.1, 0.5, 1.0, 2.0, 3.0, 10.0)
RATE, BATCH, HIDDEN, EVERY = 2e-3, 100, 128, 8
RANKS = (1, 2, 4, 6, 8, 12, 16, 32, HIDDEN)
NONE, DECAY = "none", "decay"
FORMS = {  # as shown: the form and its target rank
    "concentration": ("concentration", None),
    "participation": ("participation", None),  # the log form of concentration
    "participation to 8": ("participation", 8),
    "nuclear": ("nuclear", None),
    "nuclear beyond 8": ("nuclear", 8),
}


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """An IDX file of bytes: a magic number that ends in the count of dims, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    dims = content[3]
    shape = np.frombuffer(content, ">i4", dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_mnist(folder: Path) -> tuple[Tensor, Tensor, int]:
    """Images [N, 784] from 0 to 1 and labels [N], shuffled once and for all, and how many of them are for training."""
    images, labels = read_idx(folder / "t10k-images-idx3-ubyte.gz"), read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
    return pixels[order], torch.from_numpy(labels.astype(np.int64))[order], len(images) * 4 // 5


def new_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def hidden(network: nn.Sequential) -> list[Target]:
    return [Target(str(index), network[index].weight) for index in (0, 2)]


def train(
    images: Tensor, labels: Tensor, *, seed: int, epochs: int, regularizer: Regularizer | None, decay: float
) -> nn.Sequential:
    """AdamW at a rate that falls to zero in a line; the regularizer acts behind its steps."""
    network = new_network(seed)
    matrices = [target.parameter for target in hidden(network)]
    others = [p for p in network.parameters() if all(p is not matrix for matrix in matrices)]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0}])
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // BATCH)
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images), generator=generator).split(BATCH)
        rate = RATE * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        some = order[step % (len(images) // BATCH)]
        optimizer.zero_grad()
        functional.cross_entropy(network(images[some]), labels[some]).backward()
        optimizer.step()
        if regularizer is not None:
            regularize(hidden(network), regularizer, rate=rate, step=step)
    return network


@torch.no_grad()
def accuracies(network: nn.Sequential, images: Tensor, labels: Tensor) -> list[float]:
    """The share that is right, by rank of the hidden matrices."""
    parts = [torch.linalg.svd(target.parameter, full_matrices=False) for target in hidden(network)]
    found = []
    for rank in RANKS:
        for target, (left, singular, right) in zip(hidden(network), parts, strict=True):
            target.parameter.copy_(left[:, :rank] * singular[:rank] @ right[:rank])
        found.append(float((network(images).argmax(1) == labels).float().mean()))
    return found


def settings(forms: list[str], strengths: list[float]) -> Iterator[tuple[str, float]]:
    yield NONE, 0.0
    for form in forms:
        for strength in strengths:
            yield form, strength


def measure(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per form and strength: accuracies by starting weights and rank, and the ranks that training came to."""
    images, labels, count = read_mnist(folder)
    for form, strength in settings(options.forms, options.strengths):
        name, target = FORMS.get(form, (form, None))
        regularizer = Regularizer(name, strength, target, every=EVERY) if form in FORMS else None
        row: dict[str, Any] = {"form": form, "strength": strength, "accuracy": [], "participation": []}
        for seed in range(options.seeds):
            network = train(
                images[:count], labels[:count], seed=seed, epochs=options.epochs,
                regularizer=regularizer, decay=strength if form == DECAY else 0.0,
            )  # fmt: skip
            row["participation"].append(spectra(hidden(network))["participation"])
            row["accuracy"].append(accuracies(network, images[count:], labels[count:]))
        yield row


def show(row: dict[str, Any], plain: dict[str, Any]) -> None:
    """A line of the table. A star: better than the plain network from every starting weight."""
    found = torch.tensor(row["accuracy"])
    wins = (found > torch.tensor(plain["accuracy"])).all(0).tolist()
    means = found.mean(0).tolist()
    cells = "".join(f"{100 * mean:7.1f}{'*' if win else ' '}" for mean, win in zip(means, wins, strict=True))
    ratio = sum(row["participation"]) / len(row["participation"])
    print(f"{row['form']:20} {row['strength']:8g} {ratio:6.1f}{cells}", flush=True)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against rank: a panel per form, a line per strength, the dashed one trained without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    forms = list(dict.fromkeys(row["form"] for row in rows[1:]))
    figure, grid = pyplot.subplots(
        -(-len(forms) // 3),
        3,
        figsize=(11, 3.2 * -(-len(forms) // 3)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel in grid.flat[len(forms) :]:
        panel.remove()
    plain = torch.tensor(rows[0]["accuracy"]).mean(0).tolist()
    for panel, form in zip(grid.flat, forms, strict=False):
        lines = [row for row in rows if row["form"] == form]
        for index, row in enumerate(lines):
            shade = pyplot.get_cmap("viridis")(0.9 * index / max(1, len(lines) - 1))
            mean = torch.tensor(row["accuracy"]).mean(0).tolist()
            panel.plot(RANKS, mean, color=shade, marker=".", label=f"{row['strength']:g}")
        panel.plot(RANKS, plain, color="black", linestyle="--", label="without")
        panel.set(title=form, xlabel="rank", xscale="log")
        panel.set_xticks(RANKS, [str(rank) for rank in RANKS], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_ylabel("accuracy held out")
    grid[0][0].legend(title="strength", fontsize=7, title_fontsize=7)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="starting weights")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--forms", nargs="+", default=[DECAY, *FORMS], choices=[DECAY, *FORMS])
    parser.add_argument("--strengths", nargs="+", type=float, default=list(STRENGTHS))
    parser.add_argument("--plot", type=Path, help="draw accuracy against rank (matplotlib: pip install 'tlt[plot]')")
    parser.add_argument("--json", type=Path, help="write every number")
    options = parser.parse_args()
    print(f"{'form':20} {'strength':>8} {'PR':>6}" + "".join(f"{f'r={rank}':>7} " for rank in RANKS))
    rows: list[dict[str, Any]] = []
    for row in measure(options.folder, options):
        rows.append(row)
        show(row, rows[0])
    if options.json:
        options.json.write_text(json.dumps({"ranks": RANKS, "rows": rows}))
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
