"""Growing along layers: which old layer each new one comes from, and which new ones start as the identity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.families.layers import rotating_layers, sliding_layers

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


def move_patterns(fit: Fit, config: dict[str, Any], plan: Layers) -> dict[str, Any]:
    """config.json under which every new layer slides its window and rotates as the layer it comes from.

    Raises TltError where the config cannot say so.
    """
    edited = dict(config)
    rules = fit.family.rules
    known = [rules[rule] for rule in ("layer_types", "rotary_layers") if rule in rules]
    for key, value in config.items():
        per_layer = isinstance(value, list) and len(value) == fit.sizes["layer"] and "layer" in key
        if per_layer and key not in known:
            raise TltError(
                f"cannot grow layers: config.json lists {key} layer by layer, and the {fit.family.name} table does "
                "not say what it means"
            )
        if per_layer:
            edited[key] = [value[source] for source in plan.source]
    slides, turns = sliding_layers(fit), rotating_layers(fit)
    wanted = [slides[source] for source in plan.source], [turns[source] for source in plan.source]

    def stated() -> tuple[list[bool], list[bool]]:
        new = replace(fit, config=edited, sizes={**fit.sizes, "layer": len(plan.source)})
        return sliding_layers(new), rotating_layers(new)

    if stated()[1] != wanted[1] and "rotary_layers" in rules:
        edited[rules["rotary_layers"]] = [int(turn) for turn in wanted[1]]
    if stated()[0] != wanted[0] and "layer_types" in rules:
        edited[rules["layer_types"]] = ["sliding_attention" if slide else "full_attention" for slide in wanted[0]]
    if stated() != wanted:
        raise TltError(
            f"cannot grow layers from {fit.sizes['layer']} to {len(plan.source)}: layers of {fit.family.name} differ "
            "by their position, and config.json has no list to say which is which"
        )
    return edited
