"""Growing along layers: which old layer each new one comes from, and which new ones start as the identity."""

from __future__ import annotations

from dataclasses import dataclass

DEPTHS = ("identity", "stack", "interpose")


@dataclass(frozen=True)
class Layers:
    """`source[j]` is the old layer that new layer j copies; where `silent[j]` it writes nothing to the stream yet."""

    source: tuple[int, ...]
    silent: tuple[bool, ...]


def layers(old: int, new: int, depth: str) -> Layers:
    """Where each layer comes from.

    - identity   silent copies of a layer right after it, spread evenly: the function is kept (LLaMA Pro, 2401.02415)
    - stack      the whole stack again from the first layer (G_stack, arXiv:2405.15319); not function-preserving
    - interpose  each layer repeated in place (arXiv:2510.08008); not function-preserving

    >>> layers(2, 5, "identity")
    Layers(source=(0, 0, 0, 1, 1), silent=(False, True, True, False, True))
    """
    if depth == "stack":
        return Layers(tuple(layer % old for layer in range(new)), (False,) * new)
    # ceil keeps the layers that get one copy more at the front
    bounds = [-(-layer * new // old) for layer in range(old + 1)]
    source = tuple(layer for layer in range(old) for _ in range(bounds[layer], bounds[layer + 1]))
    first = tuple(position == 0 or source[position] != source[position - 1] for position in range(new))
    return Layers(source, tuple(depth == "identity" and not is_first for is_first in first))
