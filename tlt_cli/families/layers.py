"""What differs from layer to layer: which layers slide their attention window, which rotate positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
