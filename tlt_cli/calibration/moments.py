"""Second moments of what each linear reads and of the loss's gradient at what it writes, block by block.

H = E[x xT] over tokens, shared by the linears that read the same; G = E[g gT], g the gradient of the summed
cross-entropy at an output. K-FAC's model of the loss is tr(G dW H dWT) / 2 (arXiv:1503.05671).

With gradients the blocks come last to first: the streams in front of every block are kept, on disk, and each block is
run again while the gradient passes through it. Memory holds one block, its moments, and a few copies of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.calibration.blocks import Blocks, check_finite, tapped
from tlt_cli.calibration.shelf import Shelf
from tlt_cli.surgery.metrics import Seen, needs_entries

# the roles that read one and the same input, by the one that stands for all
SAME_INPUT = {"query": "query", "key": "query", "value": "query", "output": "output", "gate": "up", "up": "up",
              "down": "down"}  # fmt: skip
_ROWS = 1024  # that are widened to float64 at a time
Progress = Callable[[int, int], None]
Spot = tuple[int, str]  # layer and role


@dataclass(frozen=True)
class Moments:
    """Moments of one block or of all, by (layer, role). `tokens` counts what they are means over."""

    reads: MutableMapping[Spot, Tensor]
    sizes: MutableMapping[Spot, Tensor]
    feels: MutableMapping[Spot, Tensor]
    tokens: int
    squares: MutableMapping[Spot, Tensor] = field(default_factory=dict)

    def seen(self, layer: int, role: str, method: str) -> Seen:
        """What a method weighs this matrix by, and the second moment of what it reads in any case."""
        at = (layer, role)
        return Seen(
            inputs=self.inputs(*at),
            absolute=self.absolute(*at) if method == "activation" else None,
            outputs=self.outputs(*at) if method == "kfac" else None,
            importance=self.importance(*at) if needs_entries(method) else None,
        )

    def take(self, other: Moments) -> None:
        """Those of another block too."""
        for part in _PARTS:
            getattr(self, part).update(getattr(other, part))

    def inputs(self, layer: int, role: str) -> Tensor:
        """H [in, in], float64."""
        return self.reads[layer, SAME_INPUT[role]]

    def absolute(self, layer: int, role: str) -> Tensor:
        """E|x| [in], float64."""
        return self.sizes[layer, SAME_INPUT[role]]

    def outputs(self, layer: int, role: str) -> Tensor | None:
        """G [out, out], float64; None where no gradients were asked for."""
        return self.feels.get((layer, role))

    def importance(self, layer: int, role: str) -> Tensor | None:
        """E[(g_i x_j)^2] [out, in], float64: the squared gradients of the matrix's entries, token by token.

        The empirical Fisher's diagonal is the mean of squared gradients per sample. Taken per token it leaves out what
        the gradients of one text's tokens have in common; FWSVD (arXiv:2207.00112) squares those of whole batches,
        which mixes in what different texts have in common instead. None where it was not asked for.
        """
        return self.squares.get((layer, role))


_PARTS = ("reads", "sizes", "feels", "squares")


class Sums:
    """Running sums of one block."""

    def __init__(self, *, entries: bool = False) -> None:
        self.sums: dict[str, dict[Spot, Tensor]] = {part: {} for part in _PARTS}
        self._entries = entries

    def tap(self, role: str, layer: int, x: Tensor, y: Tensor) -> None:
        """Count what a linear reads [..., in], and the gradient of what it writes once that is known."""
        if SAME_INPUT[role] == role:
            flat = x.detach().flatten(0, -2)
            self._add("reads", (layer, role), outer(flat))
            self._add("sizes", (layer, role), flat.abs().sum(0).double())
        if y.requires_grad:
            read = x.detach() if self._entries else None
            y.register_hook(lambda grad: self._felt((layer, role), grad, read))  # type: ignore[no-untyped-call]

    def _felt(self, spot: Spot, grad: Tensor, read: Tensor | None) -> None:
        flat = grad.flatten(0, -2)
        self._add("feels", spot, outer(flat))
        if read is not None:
            self._add("squares", spot, (flat.double().square().T @ read.flatten(0, -2).double().square()))

    def _add(self, part: str, spot: Spot, value: Tensor) -> None:
        sums = self.sums[part]
        sums[spot] = sums[spot] + value if spot in sums else value

    def means(self, tokens: int) -> Moments:
        """What it all comes to; the sums are gone then."""
        reads, sizes, feels, squares = (
            {spot: value / tokens for spot, value in self.sums.pop(part).items()} for part in _PARTS
        )
        return Moments(reads, sizes, feels, tokens, squares)


def outer(flat: Tensor) -> Tensor:
    """The sum of x xT over the rows of flat [k, n]: [n, n] in float64, where products of float32 are exact. Of fewer
    rows than n this is singular, and summed in float32 its rounding would pass for directions that are read."""
    total = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=flat.device)
    for some in torch.split(flat, _ROWS):
        wide = some.double()
        total.addmm_(wide.T, wide)
    return total


def streams(
    blocks: Blocks, ids: Tensor, *, batch: int = 16, progress: Progress | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(layer, the residual stream in front of it [N, T, H]) for every block, and at last the one behind all."""
    stream = blocks.embed(ids)
    for layer in range(blocks.layers):
        yield layer, stream
        with torch.no_grad():
            stream = torch.cat([blocks.run(layer, some) for some in torch.split(stream, batch)])
        check_finite(stream, layer)
        blocks.release()
        if progress is not None:
            progress(layer + 1, blocks.layers)
    yield blocks.layers, stream


def block_moments(
    blocks: Blocks,
    ids: Tensor,
    *,
    gradients: bool,
    entries: bool = False,
    batch: int = 16,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Moments]]:
    """(layer, moments) of each block: first to last, or last to first with `gradients`. ids [N, T].

    With `entries` those of every entry's gradient too, which takes gradients."""
    assert gradients or not entries
    total = blocks.layers * (2 if gradients else 1)
    if not gradients:
        stream = blocks.embed(ids)
        for layer in range(blocks.layers):
            sums, after = Sums(), []
            with torch.no_grad(), tapped(blocks.decoder, sums.tap):
                for some in torch.split(stream, batch):
                    after.append(blocks.run(layer, some))
            stream = torch.cat(after)
            check_finite(stream, layer)
            yield layer, sums.means(ids.numel())
            blocks.release()
            if progress is not None:
                progress(layer + 1, total)
        return
    kept = Shelf[int]()
    for layer, stream in streams(blocks, ids, batch=batch, progress=_halfway(progress, total)):
        kept[layer] = stream
    last = zip(torch.split(kept.pop(blocks.layers), batch), torch.split(ids, batch), strict=True)
    grads = torch.cat([_loss_gradient(blocks, some, words) for some, words in last])
    blocks.release()
    for layer in reversed(range(blocks.layers)):
        sums, before = Sums(entries=entries), []
        with tapped(blocks.decoder, sums.tap):
            for some, grad in zip(torch.split(kept.pop(layer), batch), torch.split(grads, batch), strict=True):
                leaf = some.requires_grad_(True)
                torch.autograd.backward(blocks.run(layer, leaf), grad)
                assert leaf.grad is not None
                before.append(leaf.grad)
        grads = torch.cat(before)
        check_finite(grads, layer)
        yield layer, sums.means(ids.numel())
        blocks.release()
        if progress is not None:
            progress(total - layer, total)


def _halfway(progress: Progress | None, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(done, total)


def moments(
    blocks: Blocks,
    ids: Tensor,
    *,
    gradients: bool,
    entries: bool = False,
    batch: int = 16,
    progress: Progress | None = None,
) -> Moments:
    """The moments of all blocks at once, on disk: each is read when it is asked for."""
    kept = shelved(ids.numel())
    for _, each in block_moments(blocks, ids, gradients=gradients, entries=entries, batch=batch, progress=progress):
        kept.take(each)
    return kept


def shelved(tokens: int) -> Moments:
    """No moments yet, and a place on disk for those of all blocks."""
    return Moments(Shelf(), Shelf(), Shelf(), tokens, Shelf())


def _loss_gradient(blocks: Blocks, stream: Tensor, ids: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy at the stream behind the last block [n, T, H]."""
    leaf = stream.detach().requires_grad_(True)
    logits = blocks.decoder.logits(leaf)[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]
