"""A training loop of a few lines for the tests, and what the ranks of `test_world` do with it.

Run as a script, this file is one rank: `small_loop.py FOLDER` reads what the test left there and writes what it found.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from tlt_cli.checkpoint.ranks import joined
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.families.fit import fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.training.state import load_state, save_state
from tlt_cli.training.world import (
    World,
    average,
    clip,
    loss_share,
    portion,
    replicate,
    shard,
    start_world,
    summed,
    synchronize,
    whole,
)

VOCABULARY, LENGTH, ROWS, MICRO = 97, 17, 4, 2  # a step is MICRO times ROWS rows, over all ranks
STOP, MIDDLE = 4, 2
RATE, CLIP = 1e-2, 0.5  # a bound that every norm is above, so that norms must be right
EPSILON = 1e-5  # the bias of a key has no gradient but rounding, which Adam would blow up to whole steps at 1e-8
SPLITS = torch.__version__ >= "2.8"  # compared as versions: older ones do not shard over CPU processes
CASES = ["adapter", *(["llama", "gpt2"] if SPLITS else []), *(["muon"] if hasattr(torch.optim, "Muon") else [])]


class SmallAdapter(nn.Module):
    """B A x beside every "up", and a parameter that nothing uses."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        hidden, ffn = decoder.description["hidden"], decoder.description["ffn"]
        layers = range(decoder.description["layers"])
        self.a = nn.ParameterList(0.2 * torch.randn(4, hidden, generator=generator) for _ in layers)
        self.b = nn.ParameterList(0.2 * torch.randn(ffn, 4, generator=generator) for _ in layers)
        self.never = nn.Parameter(torch.ones(3))

    def begin(self, x: Tensor, step: Any) -> None:
        """Nothing depends on the stream."""

    def add(self, y: Tensor, x: Tensor, role: str, layer: int) -> Tensor:
        return y + x @ self.a[layer].T @ self.b[layer].T if role == "up" else y


@dataclass
class Run:
    """What is trained: all weights of a decoder, split over the ranks, or an adapter beside one that is frozen."""

    decoder: Decoder
    trained: dict[str, Tensor]
    optimizers: list[Optimizer]
    world: World


def model_of(folder: Path, case: str) -> Path:
    return folder / ("gpt2" if case == "gpt2" else "llama")


def start(model: Path, case: str, world: World) -> Run:
    checkpoint = open_checkpoint(model)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    decoder = load_checkpoint(checkpoint, fit(shapes, checkpoint.config))
    if case == "adapter":
        decoder.requires_grad_(False)
        adapter = SmallAdapter(decoder)
        if world.rank:
            nn.init.zeros_(adapter.a[0])  # what rank 0 has must come to hold everywhere
        decoder.adapter = adapter
        trained: dict[str, Tensor] = dict(adapter.named_parameters())
        replicate(trained.values(), world)
    else:
        trained = dict(shard(decoder, world))
    return Run(decoder, trained, make_optimizers(trained, muon=case == "muon"), world)


def make_optimizers(trained: Mapping[str, Tensor], *, muon: bool) -> list[Optimizer]:
    if not muon:
        return [torch.optim.AdamW(list(trained.values()), lr=RATE, eps=EPSILON, fused=True)]
    matrices = [p for name, p in trained.items() if p.dim() == 2 and ".layers." in name]
    others = [p for p in trained.values() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=RATE), torch.optim.AdamW(others, lr=RATE, eps=EPSILON, fused=True)]


def some_rows(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Windows number first .. first + count - 1: inputs and targets [count, T], ever more of which do not count."""
    rows = [torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(n)) for n in range(100)]
    chosen = torch.stack(rows[first : first + count])
    targets = chosen[:, 1:].clone()
    for row in range(count):
        targets[row, : 5 * ((first + row) % ROWS)] = -100
    return chosen[:, :-1], targets


def train(run: Run, first: int, last: int, *, own_mean: bool = False) -> list[float]:
    """Steps `first` to `last` - 1; returns their losses. `own_mean`: each rank divides by its own targets, wrongly."""
    losses = []
    for step in range(first, last):
        batches = []
        for micro in range(MICRO):
            rows = portion(ROWS, run.world)
            batches.append(some_rows((step * MICRO + micro) * ROWS + rows.start, len(rows)))
        mine = sum(int((targets != -100).sum()) for _, targets in batches)
        (count,) = summed(run.world, mine)
        total = 0.0
        for number, (ids, targets) in enumerate(batches):
            synchronize(run.decoder, number == MICRO - 1)

            def read(stream: Tensor, targets: Tensor = targets) -> Tensor:
                logits = run.decoder.logits(stream)
                return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

            loss = run.decoder(ids, read=read)
            total += loss.item()
            (loss / mine if own_mean else loss_share(loss, count, run.world)).backward()
        if run.decoder.adapter is not None:
            average(run.trained.values(), run.world)
        clip(run.trained.values(), CLIP)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        (everyones,) = summed(run.world, total)
        losses.append(everyones / count)
    return losses


def everything(run: Run) -> dict[str, Tensor]:
    """Weights and optimizer state by name, put together: what must be equal to be the same state."""
    names = {id(tensor): name for name, tensor in run.trained.items()}
    held: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in run.trained.items()}
    for optimizer in run.optimizers:
        for parameter, state in optimizer.state.items():
            held.update({f"{slot}.{names[id(parameter)]}": value for slot, value in state.items()})
    return {key: whole(value.detach()).contiguous().clone() for key, value in held.items()}


def rank(folder: Path) -> None:
    """What every rank does, for each case; rank 0 writes what was found to `<case>-<what>.safetensors`."""
    with start_world(torch.device("cpu")) as world:
        for case in CASES:
            model = model_of(folder, case)

            def note(what: str, run: Run, losses: Sequence[float] = (), case: str = case) -> None:
                tensors = {**everything(run), "losses": torch.tensor(losses, dtype=torch.float64)}
                if world.rank == 0:
                    save_file(tensors, folder / f"{case}-{what}.safetensors")

            run = start(model, case, world)
            assert run.decoder.longest == (64 if case == "gpt2" else None) and run.decoder.device == world.device
            losses = train(run, 0, MIDDLE)
            with torch.no_grad():
                run.decoder(some_rows(0, 1)[0])  # a pass without backward leaves weights gathered in the modules
            save_state(folder / f"{case}-two", MIDDLE, run.trained, run.optimizers, {"recipe": {}}, world=world)
            note("middle", run)
            note("end", run, losses + train(run, MIDDLE, STOP))

            run = start(model, case, world)
            load_state(folder / f"{case}-two" / f"step-{MIDDLE:08d}", run.trained, run.optimizers, world=world)
            note("resumed", run, train(run, MIDDLE, STOP))

            run = start(model, case, world)
            load_state(folder / f"{case}-one" / f"step-{MIDDLE:08d}", run.trained, run.optimizers, world=world)
            note("loaded", run)

            run = start(model, case, world)
            note("wrong", run, train(run, 0, STOP, own_mean=True))
        used = torch.nn.ParameterList(torch.zeros(2) for _ in range(3))
        used[0].grad, used[world.rank].grad = torch.ones(2), torch.tensor([1.0, 3.0])
        average(used, world)
        assert used[0].grad.tolist() == [1.0, 2.0] and used[1].grad.tolist() == [0.5, 1.5] and used[2].grad is None
        with joined() as team:
            assert (team.rank, team.size) == (world.rank, world.size)
        assert torch.distributed.is_initialized()


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
