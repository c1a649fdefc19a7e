"""Second moments of what each linear reads and of the loss's gradient at what it writes, block by block.

H = E[x xT] over tokens, shared by the linears that read the same; G = E[g gT], g the gradient of the summed
cross-entropy at an output. K-FAC's model of the loss is tr(G dW H dWT) / 2 (arXiv:1503.05671).

With gradients the blocks come last to first: the streams in front of every block are kept, and each block is run again
while the gradient passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.calibration.blocks import Blocks, check_finite, tapped

# the roles that read one and the same input, by the one that stands for all
SAME_INPUT = {"query": "query", "key": "query", "value": "query", "output": "output", "gate": "up", "up": "up",
              "down": "down"}  # fmt: skip
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Moments:
    """Moments of one block or of all, by (layer, role). `tokens` counts what they are means over."""

    reads: Mapping[tuple[int, str], Tensor]
    sizes: Mapping[tuple[int, str], Tensor]
    feels: Mapping[tuple[int, str], Tensor]
    tokens: int

    def inputs(self, layer: int, role: str) -> Tensor:
        """H [in, in], float64."""
        return self.reads[layer, SAME_INPUT[role]]

    def absolute(self, layer: int, role: str) -> Tensor:
        """E|x| [in], float64."""
        return self.sizes[layer, SAME_INPUT[role]]

    def outputs(self, layer: int, role: str) -> Tensor | None:
        """G [out, out], float64; None where no gradients were asked for."""
        return self.feels.get((layer, role))


class _Sums:
    """Running sums of one block."""

    def __init__(self) -> None:
        self.reads: dict[tuple[int, str], Tensor] = {}
        self.sizes: dict[tuple[int, str], Tensor] = {}
        self.feels: dict[tuple[int, str], Tensor] = {}
        self.tokens = 0

    def tap(self, role: str, layer: int, x: Tensor, y: Tensor) -> None:
        if SAME_INPUT[role] == role:
            flat = x.detach().flatten(0, -2)
            _add(self.reads, (layer, role), (flat.T @ flat).double())
            _add(self.sizes, (layer, role), flat.abs().sum(0).double())
        if y.requires_grad:
            y.register_hook(lambda grad: self._felt(layer, role, grad))  # type: ignore[no-untyped-call]

    def _felt(self, layer: int, role: str, grad: Tensor) -> None:
        flat = grad.flatten(0, -2)
        _add(self.feels, (layer, role), (flat.T @ flat).double())

    def means(self) -> Moments:
        scaled = [
            {key: value / self.tokens for key, value in sums.items()} for sums in (self.reads, self.sizes, self.feels)
        ]
        return Moments(scaled[0], scaled[1], scaled[2], self.tokens)


def _add(sums: dict[tuple[int, str], Tensor], key: tuple[int, str], value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def streams(blocks: Blocks, ids: Tensor, *, batch: int = 16, progress: Progress | None = None) -> list[Tensor]:
    """The residual stream in front of every block and behind the last: L + 1 tensors [N, T, H]."""
    found = [blocks.embed(ids)]
    for layer in range(blocks.layers):
        with torch.no_grad():
            after = torch.cat([blocks.run(layer, some) for some in torch.split(found[-1], batch)])
        check_finite(after, layer)
        found.append(after)
        blocks.release()
        if progress is not None:
            progress(layer + 1, blocks.layers)
    return found


def block_moments(
    blocks: Blocks,
    ids: Tensor,
    *,
    gradients: bool,
    batch: int = 16,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Moments]]:
    """(layer, moments) of each block: first to last, or last to first with `gradients`. ids [N, T]."""
    total = blocks.layers * (2 if gradients else 1)
    if not gradients:
        stream = blocks.embed(ids)
        for layer in range(blocks.layers):
            sums, after = _Sums(), []
            with torch.no_grad(), tapped(blocks.decoder, sums.tap):
                for some in torch.split(stream, batch):
                    after.append(blocks.run(layer, some))
            stream = torch.cat(after)
            check_finite(stream, layer)
            sums.tokens = ids.numel()
            yield layer, sums.means()
            blocks.release()
            if progress is not None:
                progress(layer + 1, total)
        return
    kept = streams(blocks, ids, batch=batch, progress=lambda done, _: progress(done, total) if progress else None)
    last = zip(torch.split(kept.pop(), batch), torch.split(ids, batch), strict=True)
    grads = torch.cat([_loss_gradient(blocks, some, words) for some, words in last])
    blocks.release()
    for layer in reversed(range(blocks.layers)):
        sums, before = _Sums(), []
        with tapped(blocks.decoder, sums.tap):
            for some, grad in zip(torch.split(kept.pop(), batch), torch.split(grads, batch), strict=True):
                leaf = some.requires_grad_(True)
                torch.autograd.backward(blocks.run(layer, leaf), grad)
                assert leaf.grad is not None
                before.append(leaf.grad)
        grads = torch.cat(before)
        check_finite(grads, layer)
        sums.tokens = ids.numel()
        yield layer, sums.means()
        blocks.release()
        if progress is not None:
            progress(total - layer, total)


def moments(
    blocks: Blocks, ids: Tensor, *, gradients: bool, batch: int = 16, progress: Progress | None = None
) -> Moments:
    """The moments of all blocks at once, for models that are small."""
    found = [each for _, each in block_moments(blocks, ids, gradients=gradients, batch=batch, progress=progress)]
    merged = [
        {key: value for each in found for key, value in getattr(each, part).items()}
        for part in ("reads", "sizes", "feels")
    ]
    return Moments(merged[0], merged[1], merged[2], found[0].tokens)


def _loss_gradient(blocks: Blocks, stream: Tensor, ids: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy at the stream behind the last block [n, T, H]."""
    leaf = stream.detach().requires_grad_(True)
    logits = blocks.decoder.logits(leaf)[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]
