"""What [rules] of a family table may say, and what config.json may say under the keys that they name.

A rule is either a value of its own or the name of a config key. Both are checked once, here, so that no code that
computes by them meets a text where a number is due.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlt_cli.checkpoint.strict_json import shortened
from tlt_cli.errors import TltError


@dataclass(frozen=True)
class Kind:
    """A kind of value: what to call it in an error, and whether a value is one."""

    expected: str
    holds: Callable[[Any], bool]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.holds(value))


NUMBER = Kind("a number", _finite)
POSITIVE = Kind("a positive number", lambda value: _finite(value) and value > 0)
NATURAL = Kind("a whole number from 0 up", lambda value: _whole(value, 0))
COUNT = Kind("a whole number of at least 1", lambda value: _whole(value, 1))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a name", lambda value: isinstance(value, str) and value != "")
TEXTS = Kind("a list of names", lambda value: isinstance(value, list) and all(map(TEXT.holds, value)))
FLAGS = Kind("a list of 0 and 1", lambda value: isinstance(value, list) and all(flag in (0, 1) for flag in value))

# Rules whose value stands in the table itself.
OWN: dict[str, Kind] = {
    "norm": Kind("'rms' or 'layer'", lambda value: value in ("rms", "layer")),
    "gain_offset": NUMBER,
    "unsupported": TEXTS,
}
# Rules that name a key of config.json: the kind of that key's value.
CONFIG: dict[str, Kind] = {
    "epsilon": POSITIVE,
    "activation": TEXT,
    "embedding_scale": POSITIVE,
    "softmax_scalar": POSITIVE,
    "softmax_switch": SWITCH,
    "softmax_layer_switch": SWITCH,
    "attention_softcap": _or_null(POSITIVE),
    "final_softcap": _or_null(POSITIVE),
    "window": _or_null(COUNT),
    "window_switch": _or_null(SWITCH),
    "layer_types": _or_null(TEXTS),
    "full_every": COUNT,
    "full_before": NATURAL,
    "rotary_layers": _or_null(FLAGS),
    "unrotated_every": _or_null(NATURAL),
    "sliding_rope_theta": POSITIVE,
}
NEEDED = ("norm", "epsilon", "activation")

_POSITIONS = ("rope_theta", "max_position_embeddings", "original_max_position_embeddings")
_ROPES = ("rope_parameters", "rope_scaling")


def check_config(
    rules: Mapping[str, Any], switches: Sequence[str], setting: Callable[[str], Any], *, layers: int
) -> None:
    """Raises TltError naming the first key of config.json whose value is not of the kind that a rule needs.

    `switches` are further keys that must be true or false; lists must have an entry for each of the `layers`.
    """
    listed = "layer_types" in rules and setting(rules["layer_types"]) is not None
    for rule, kind in CONFIG.items():
        if rule in rules and not (rule == "full_every" and listed):
            _check(rules[rule], setting(rules[rule]), kind)
    for rule in ("layer_types", "rotary_layers"):
        entries = setting(rules[rule]) if rule in rules else None
        if entries is not None and len(entries) < layers:
            raise TltError(f"config.json: {rules[rule]} has {len(entries)} entries for {layers} layers")
    for key in switches:
        _check(key, setting(key), _or_null(SWITCH))
    for key in _POSITIONS:
        _check(key, setting(key), _or_null(POSITIVE))
    for key in _ROPES:
        _check_rope(key, setting(key))


def _check(key: str, value: Any, kind: Kind) -> None:
    if not kind.holds(value):
        raise TltError(f"config.json: {key} must be {kind.expected}, not {shortened(value)}")


def _check_rope(where: str, value: Any) -> None:
    """A set of rotary parameters, or one such set per layer type."""
    _check(where, value, Kind("an object, or null", lambda given: given is None or isinstance(given, dict)))
    for key, inner in (value or {}).items():
        if isinstance(inner, dict):
            _check_rope(f"{where}.{key}", inner)
        elif key in ("rope_type", "type"):
            _check(f"{where}.{key}", inner, TEXT)
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool):
            _check(f"{where}.{key}", inner, NUMBER)
