"""What differs from layer to layer: which layers slide their attention window, which rotate positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tlt_cli.errors import TltError

if TYPE_CHECKING:
    from tlt_cli.families.fit import Fit


def rotating_layers(fit: Fit) -> list[bool]:
    """Per layer, whether its positions rotate: an explicit list, or all but every n-th."""
    rules, layers = fit.family.rules, fit.sizes["layer"]
    if "rotary" not in fit.sizes:
        return [False] * layers
    listed = fit.setting(rules["rotary_layers"]) if "rotary_layers" in rules else None
    if listed is not None:
        return [bool(value) for value in listed[:layers]]
    every = fit.setting(rules["unrotated_every"]) if "unrotated_every" in rules else None
    return [not every or (layer + 1) % every != 0 for layer in range(layers)]


def sliding_layers(fit: Fit) -> list[bool]:
    """Per layer, whether it looks back through the sliding window only."""
    rules, layers = fit.family.rules, fit.sizes["layer"]
    window = fit.setting(rules["window"]) if "window" in rules else None
    if window is None or ("window_switch" in rules and not fit.setting(rules["window_switch"])):
        return [False] * layers
    listed = fit.setting(rules["layer_types"]) if "layer_types" in rules else None
    if listed is not None:
        return [value == "sliding_attention" for value in listed[:layers]]
    if "full_every" in rules:
        every = fit.setting(rules["full_every"])
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if "full_before" in rules:
        before = fit.setting(rules["full_before"])
        return [layer >= before for layer in range(layers)]
    if "unrotated_every" in rules:
        return [not rotates for rotates in rotating_layers(fit)]
    return [True] * layers


def move_patterns(fit: Fit, config: Mapping[str, Any], source: Sequence[int]) -> dict[str, Any]:
    """config.json under which new layer j slides its window and rotates as layer `source[j]` does.

    Raises TltError where the config cannot say so.
    """
    edited = dict(config)
    rules = fit.family.rules
    known = [rules[rule] for rule in ("layer_types", "rotary_layers") if rule in rules]
    for key, value in config.items():
        per_layer = isinstance(value, list) and len(value) == fit.sizes["layer"] and "layer" in key
        if per_layer and key not in known:
            raise TltError(
                f"cannot change the layers: config.json lists {key} layer by layer, and the {fit.family.name} table "
                "does not say what it means"
            )
        if per_layer:
            edited[key] = [value[old] for old in source]
    slides, turns = sliding_layers(fit), rotating_layers(fit)
    wanted = [slides[old] for old in source], [turns[old] for old in source]

    def stated() -> tuple[list[bool], list[bool]]:
        new = replace(fit, config=edited, sizes={**fit.sizes, "layer": len(source)})
        return sliding_layers(new), rotating_layers(new)

    if stated()[1] != wanted[1] and "rotary_layers" in rules:
        edited[rules["rotary_layers"]] = [int(turn) for turn in wanted[1]]
    if stated()[0] != wanted[0] and "layer_types" in rules:
        edited[rules["layer_types"]] = ["sliding_attention" if slide else "full_attention" for slide in wanted[0]]
    if stated() != wanted:
        raise TltError(
            f"cannot go from {fit.sizes['layer']} layers to {len(source)}: layers of {fit.family.name} differ "
            "by their position, and config.json has no list to say which is which"
        )
    return edited
