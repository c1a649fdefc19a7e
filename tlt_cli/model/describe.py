"""From a fitted family table to the plain data that the decoder runs on. No family is named here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tlt_cli.axes import Arrow
from tlt_cli.errors import TltError
from tlt_cli.families.factors import LEFT, dense_config, find_slot
from tlt_cli.families.fit import Fit, Place
from tlt_cli.families.groups import Groups
from tlt_cli.families.layers import rotating_layers, sliding_layers
from tlt_cli.families.place import roles_of
from tlt_cli.model.decoder import ACTIVATIONS

FULL, SLIDING = "full", "sliding"
_NESTED = {FULL: "full_attention", SLIDING: "sliding_attention"}
_RULE_KEYS = ("rotary_layers", "layer_types")
# What models that lie side by side need not have in common, beside the sizes that are stored.
OF_ONE_PART = (
    "hidden", "layers", "heads", "kv_heads", "head_dim", "positions", "epsilon", "embedding_scale", "softmax_scale",
    "ropes",
)  # fmt: skip

JOINT = ("glue", "dense")  # of what config.json says of groups, what the decoder takes as it is


def describe(fit: Fit) -> dict[str, Any]:
    """The decoder's description: JSON-able. Raises TltError for what the decoder would compute wrongly."""
    if fit.groups is not None:
        return _side_by_side(fit, fit.groups)
    rules = fit.family.rules
    _refuse(fit)
    slides, turns = sliding_layers(fit), rotating_layers(fit)
    window = fit.setting(rules["window"]) if "window" in rules else None
    ropes = _ropes(fit) if any(turns) else {}
    kinds = [SLIDING if slide and SLIDING in ropes else FULL for slide in slides]
    return {
        "vocab": fit.sizes["vocab"],
        "positions": fit.sizes.get("position"),
        "hidden": fit.sizes["hidden"],
        "ffn": fit.sizes["ffn"],
        "layers": fit.sizes["layer"],
        "heads": fit.heads,
        "kv_heads": fit.kv_heads,
        "head_dim": fit.head_dim,
        "norm": rules["norm"],
        "gain_offset": float(rules.get("gain_offset", 0.0)),
        "epsilon": _number(fit, rules["epsilon"]),
        "activation": _activation(fit),
        "embedding_scale": embedding_scale(fit),
        "softmax_scale": softmax_scales(fit),
        "window": [window if slide else None for slide in slides],
        "rotary": [kind if turn else None for kind, turn in zip(kinds, turns, strict=True)],
        "ropes": ropes,
        "attention_softcap": _rule(fit, "attention_softcap"),
        "final_softcap": _rule(fit, "final_softcap"),
        "tied": fit.tied,
        "roles": _roles(fit),
        "lowrank": None if fit.lowrank is None else fit.lowrank.data(),
        "groups": None,
    }


def _side_by_side(fit: Fit, groups: Groups) -> dict[str, Any]:
    """One part at the sizes that are stored, and what differs from it in each part."""
    whole = describe(replace(fit, config=dense_config(fit.config, groups.stock), groups=None))
    parts = []
    for own in map(describe, fit.parts):
        own["softmax_scale"] += whole["softmax_scale"][len(own["softmax_scale"]) :]
        parts.append({key: own[key] for key in (*OF_ONE_PART, "ffn", "lowrank") if own[key] != whole[key]})
    joint = {key: groups.data()[key] for key in JOINT if key in groups.data()}
    return {**whole, "groups": {"weights": list(groups.weights), "parts": parts, **joint}}


def _rule(fit: Fit, rule: str) -> Any:
    """The config value that a rule points at; None where the table has no such rule."""
    return fit.setting(fit.family.rules[rule]) if rule in fit.family.rules else None


def _number(fit: Fit, key: str) -> float:
    value = fit.setting(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TltError(f"config.json: {key} must be a number, not {value!r}")
    return float(value)


def _refuse(fit: Fit) -> None:
    for key in ("quantization_config", *fit.family.rules.get("unsupported", ())):
        if fit.setting(key):
            raise TltError(f"config.json sets {key}, which tlt cannot compute")
    for rule in _RULE_KEYS:
        listed = _rule(fit, rule)
        if listed is not None and (not isinstance(listed, list) or len(listed) < fit.sizes["layer"]):
            key = fit.family.rules[rule]
            raise TltError(f"config.json: {key} must list one entry per layer ({fit.sizes['layer']}), not {listed!r}")
    for kind in set(_rule(fit, "layer_types") or ()) - set(_NESTED.values()):
        raise TltError(f"config.json: layer type {kind!r} is not known (known: {', '.join(_NESTED.values())})")


def _activation(fit: Fit) -> str:
    name = fit.setting(fit.family.rules["activation"])
    if name not in ACTIVATIONS:
        raise TltError(f"activation {name!r} is not known (known: {', '.join(sorted(ACTIVATIONS))})")
    return str(name)


def embedding_scale(fit: Fit) -> float | None:
    """What embeddings are multiplied with; None where they are taken as they are."""
    scaled = _rule(fit, "embedding_scale")
    return None if scaled is None else math.sqrt(scaled)


def softmax_scales(fit: Fit) -> list[float]:
    """What each layer's scores are multiplied with."""
    rules = fit.family.rules
    divisor = _number(fit, rules["softmax_scalar"]) if "softmax_scalar" in rules else float(fit.head_dim)
    scale = divisor**-0.5
    if "softmax_switch" in rules and not fit.setting(rules["softmax_switch"]):
        scale = 1.0
    falling = bool(_rule(fit, "softmax_layer_switch"))
    return [scale / (layer + 1) if falling else scale for layer in range(fit.sizes["layer"])]


def _ropes(fit: Fit) -> dict[str, dict[str, Any]]:
    """The frequency sets: one for all layers, or one for full and one for sliding layers.

    Checkpoints say it in three ways: `rope_parameters` per layer type, `rope_parameters` flat, or `rope_theta` with an
    optional `rope_scaling`; where both are there, `rope_scaling` wins, as in transformers.
    """
    local = fit.family.rules.get("sliding_rope_theta")
    parameters, scaling = fit.setting("rope_parameters") or {}, fit.setting("rope_scaling") or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if nested and local is None:
        raise TltError(f"config.json: rope_parameters per layer type ({', '.join(nested)}) do not fit this family")
    if parameters and not nested and local is not None:
        raise TltError("config.json: rope_parameters of this family must be given per layer type")
    if local is None:
        return {FULL: _rope(fit, {**(scaling or parameters)}, "rope_theta")}
    full = {**nested.get(_NESTED[FULL], {}), **scaling}
    return {FULL: _rope(fit, full, "rope_theta"), SLIDING: _rope(fit, nested.get(_NESTED[SLIDING], {}), local)}


def _rope(fit: Fit, given: dict[str, Any], theta_key: str) -> dict[str, Any]:
    theta = given.get("rope_theta") or fit.setting(theta_key) or fit.family.defaults.get(theta_key)
    kind = given.get("rope_type") or given.get("type") or "default"
    part = given.get("partial_rotary_factor", fit.setting("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        raise TltError(f"config.json: partial_rotary_factor={part}: tlt rotates whole heads only")
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise TltError(f"config.json: {theta_key} must be a positive number, not {theta!r}")

    def need(key: str) -> float:
        if not isinstance(given.get(key), (int, float)):
            raise TltError(f"config.json: rotary scaling {kind!r} needs the number {key}, found {given.get(key)!r}")
        return float(given[key])

    if kind == "default":
        return {"type": "default", "theta": float(theta)}
    if kind == "linear":
        return {"type": "linear", "theta": float(theta), "factor": need("factor")}
    if kind == "dynamic":  # plain rotation up to the length it was trained on; beyond it the decoder refuses
        return {"type": "default", "theta": float(theta), "limit": int(_number(fit, "max_position_embeddings"))}
    if kind == "llama3":
        outside = fit.setting("original_max_position_embeddings")
        original = outside or given.get("original_max_position_embeddings") or fit.setting("max_position_embeddings")
        if not isinstance(original, (int, float)):
            raise TltError("config.json: rotary scaling 'llama3' needs original_max_position_embeddings")
        return {
            "type": "llama3",
            "theta": float(theta),
            "factor": need("factor"),
            "low_turns": need("low_freq_factor"),
            "high_turns": need("high_freq_factor"),
            "original_positions": int(original),
        }
    raise TltError(f"rotary scaling {kind!r} is not known (known: default, linear, dynamic, llama3)")


def _roles(fit: Fit) -> dict[str, dict[str, Any]]:
    """Where each role's tensors are: module name with {layer}, part of a fused one, storage order, bias."""
    biased = {role for place in fit.places.values() if place.kind == "bias" for role in place.roles}
    table, found = fit.family, dict[str, dict[str, Any]]()
    for place in fit.places.values():
        if place.kind not in ("weight", LEFT):
            continue
        row = place.pattern if place.slot is None else find_slot(table, place.slot).pattern
        arrow, fused = table.rows[row], len(roles_of(table, row)) > 1
        if fused:
            _check_fused(row, arrow, roles_of(table, row))
        for part, role in enumerate(place.roles, start=place.part or 0):
            found.setdefault(
                role,
                {
                    "name": _module(place, row.rpartition(".")[0], table.prefix),
                    "part": part if fused else None,
                    "parts": len(roles_of(table, row)) if fused else None,
                    "transposed": arrow.sign == "->" and role not in ("embedding", "positions"),
                    "bias": role in biased,
                },
            )
    return found


def _module(place: Place, module: str, prefix: str) -> str:
    """The module's name as the file has it, with {layer} where the layer's number stands."""
    for candidate in (module, module.removeprefix(prefix)):
        if place.name.startswith(candidate.replace("{layer}", str(place.layer)) + "."):
            return candidate
    raise TltError(f"{place.name} does not fit the name pattern {place.pattern}")


def _check_fused(row: str, arrow: Arrow, roles: tuple[str, ...]) -> None:
    dims = [arrow.dims[index] for index in arrow.outputs]
    if len(dims) != 1 or dims[0][0] != len(roles):
        raise TltError(
            f"{row} holds {', '.join(roles)}: its layout '{arrow}' must start its outputs with the factor {len(roles)}"
        )
