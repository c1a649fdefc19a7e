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
    config = copy.deepcopy(dict(config))
    local = fit.family.rules.get("sliding_rope_theta")
    keys = ["rope_theta"] if local is None else ["rope_theta", local]
    stated = False
    for name in ("rope_parameters", "rope_scaling"):
        given = config.get(name)
        if not isinstance(given, dict):
            continue
        for part in (given, *(value for value in given.values() if isinstance(value, dict))):
            if "rope_theta" in part:
                part["rope_theta"] = float(part["rope_theta"]) ** power
                stated = True
    for key in keys:
        if key in config or not stated:
            config[key] = float(fit.setting(key) or fit.family.defaults[key]) ** power
    return config


def with_factor(fit: Fit, config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A copy under which every pair turns `factor` times slower: linear scaling (arXiv:2306.15595).

    Raises TltError where config.json scales its rotation already, or has no place to say it for all layers.
    """
    config = copy.deepcopy(dict(config))
    given = config.get("rope_parameters") or {}
    parts = [value for value in given.values() if isinstance(value, dict)] or ([given] if given else [])
    scaled = [config.get("rope_scaling"), *(part for part in parts if part.get("rope_type", "default") != "default")]
    if any(scaled):
        raise TltError("config.json scales its rotation already; keep all rotary pairs, or those from the first on")
    if not parts and "sliding_rope_theta" in fit.family.rules:
        raise TltError("config.json has no rope_parameters to scale for each kind of layer; keep all rotary pairs")
    if not parts:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    for part in parts:
        part.update(rope_type="linear", factor=factor)
    return config
