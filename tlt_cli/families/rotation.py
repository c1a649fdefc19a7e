"""The rotary base in config.json, wherever a config states it, and what else changes frequencies."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tlt_cli.errors import TltError

if TYPE_CHECKING:
    from tlt_cli.families.fit import Fit


def with_power(fit: Fit, config: Mapping[str, Any], power: float) -> dict[str, Any]:
    """A copy with every rotary base that config.json states, or that the table gives by default, to this power."""
    edited: dict[str, Any] = copy.deepcopy(dict(config))
    local = fit.family.rules.get("sliding_rope_theta")
    keys = ["rope_theta"] if local is None else ["rope_theta", local]
    stated = False
    for name in ("rope_parameters", "rope_scaling"):
        given = edited.get(name)
        if not isinstance(given, dict):
            continue
        for part in (given, *(value for value in given.values() if isinstance(value, dict))):
            if "rope_theta" in part:
                part["rope_theta"] = float(part["rope_theta"]) ** power
                stated = True
    for key in keys:
        if key in edited or not stated:
            edited[key] = float(fit.setting(key) or fit.family.defaults[key]) ** power
    return edited


def with_factor(fit: Fit, config: Mapping[str, Any], power: float) -> dict[str, Any]:
    """A copy under which every pair turns slower by its rotary base to this power: linear scaling (arXiv:2306.15595).

    Raises TltError where config.json scales its rotation already, or has no place to say it for all layers.
    """
    edited: dict[str, Any] = copy.deepcopy(dict(config))
    given = edited.get("rope_parameters") or {}
    parts = {key: part for key, part in given.items() if isinstance(part, dict)} or ({"": given} if given else {})
    scaled = [part for part in parts.values() if part.get("rope_type", "default") != "default"]
    scaled += [edited["rope_scaling"]] if edited.get("rope_scaling") else []
    if scaled:
        raise TltError("config.json scales its rotation already; keep all rotary pairs, or those from the first on")
    local = fit.family.rules.get("sliding_rope_theta")
    if not parts and local is not None:
        raise TltError("config.json has no rope_parameters to scale for each kind of layer; keep all rotary pairs")

    def base(key: str) -> float:
        return float(fit.setting(key) or fit.family.defaults[key])

    if not parts:
        edited["rope_scaling"] = {"rope_type": "linear", "factor": base("rope_theta") ** power}
    for kind, part in parts.items():
        own = local if local is not None and kind == "sliding_attention" else "rope_theta"
        part.update(rope_type="linear", factor=float(part.get("rope_theta") or base(own)) ** power)
    return edited
