"""Each matrix refit to what the compressed model before it really passes on, anchored to the original's output.

For a linear that read x and now reads z, the best matrix is M = E[t zT] E[z zT]^-1 with t = W x, what it wrote before
(AA-SVD, arXiv:2604.02119, anchored form). For the two that write to the stream the target also takes the drift of the
stream with it: t = W x + (s - s').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks, tapped
from tlt_cli.calibration.moments import SAME_INPUT

_DAMPING = 1e-5


@dataclass(frozen=True)
class Crossed:
    """Over the same tokens: E[z zT] [in, in] of what is read now, E[t zT] [out, in] with the targets, per role."""

    inputs: Tensor
    targets: Mapping[str, Tensor]

    def refit(self, role: str) -> Tensor:
        """The matrix [out, in] that reaches the target best, by least squares."""
        ridge = _DAMPING * float(self.inputs.diagonal().mean()) or 1.0  # inputs of zeros: any matrix does, so zeros
        damped = self.inputs + ridge * torch.eye(len(self.inputs))
        found: Tensor = torch.linalg.solve(damped, self.targets[role].T).T
        return found


# What is refit together, in the order of a block, and whether it writes to the stream.
STAGES: tuple[tuple[tuple[str, ...], bool], ...] = (
    (("query", "key", "value"), False),
    (("output",), True),
    (("gate", "up"), False),
    (("down",), True),
)


def cross(
    source: Blocks, made: Blocks, layer: int, roles: Sequence[str], writes: bool, before: Tensor, after: Tensor, *,
    batch: int = 16,
) -> Crossed:  # fmt: skip
    """Moments of one stage of a block: `before` [N, T, H] is the original stream in front of it, `after` the
    compressed model's. What comes before the stage inside the block is taken as `made` has it now."""
    inputs: Tensor | None = None
    targets: dict[str, Tensor] = {}
    seen: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def tap(which: str) -> object:
        def see(role: str, _: int, x: Tensor, y: Tensor) -> None:
            seen[which][role] = x, y

        return see

    for some, other in zip(torch.split(before, batch), torch.split(after, batch), strict=True):
        seen = {"source": {}, "made": {}}
        with torch.no_grad():
            with tapped(source.decoder, tap("source")):  # type: ignore[arg-type]
                source.run(layer, some)
            with tapped(made.decoder, tap("made")):  # type: ignore[arg-type]
                made.run(layer, other)
        now = seen["made"][_read(roles)][0].flatten(0, -2)
        gram = (now.T @ now).double()
        inputs = gram if inputs is None else inputs + gram
        for role in roles:
            target = seen["source"][role][1].flatten(0, -2)
            if writes:
                target = target + _drift(role, some, other, seen).flatten(0, -2)
            product = (target.T @ now).double()
            targets[role] = targets[role] + product if role in targets else product
    assert inputs is not None
    tokens = before.shape[0] * before.shape[1]
    return Crossed(inputs / tokens, {role: value / tokens for role, value in targets.items()})


def _read(roles: Sequence[str]) -> str:
    """A role among these that every family has."""
    return SAME_INPUT[roles[0]] if SAME_INPUT[roles[0]] in roles else roles[0]


def _drift(role: str, some: Tensor, other: Tensor, seen: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> Tensor:
    """How far the original stream is from the compressed one where this role adds to it."""
    drift = some - other
    if role == "down":  # by then attention has written to both
        drift = drift + seen["source"]["output"][1] - seen["made"]["output"][1]
    return drift
