"""A family table: what the tensors of one model family are called, which axes they are made of, who feeds whom.

Families are data. A table is one TOML file; every key is checked, because data that no code checks rots.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tlt_cli.axes import Arrow, LayoutError, parse
from tlt_cli.errors import TltError, nearest
from tlt_cli.families.expression import Expression, parse_expression
from tlt_cli.families.family import Family, Module
from tlt_cli.families.rules import CONFIG, NATURAL, NEEDED, OWN, TEXT, TEXTS, Kind

__all__ = ["Family", "Module", "known_families", "load_family", "parse_family"]

FOLDER = Path(__file__).parent

_SECTIONS = {
    "architectures", "model_type", "prefix", "precedence", "axes", "derived", "multiples", "defaults", "tensors",
    "biases", "tied", "wiring", "rules",
}  # fmt: skip
_AXES = {"vocab", "position", "hidden", "ffn", "layer", "kv", "group", "rotary", "channel"}
_STEM = {"embedding", "positions", "final_norm", "head"}
_ATTENTION = {
    "attention_norm", "query", "key", "value", "output", "query_norm", "key_norm", "attention_post_norm",
}  # fmt: skip
_FFN = {"ffn_norm", "gate", "up", "down", "ffn_post_norm"}
_OPTIONAL_ROLES = {"positions", "head", "query_norm", "key_norm", "attention_post_norm", "gate", "ffn_post_norm"}
_PATTERN = re.compile(r"([\w-]+|\{layer\})(\.([\w-]+|\{layer\}))+\Z")
_NEEDED_AXES = ("vocab", "hidden", "ffn", "layer", "kv")


def known_families() -> tuple[str, ...]:
    """Names of the tables that tlt carries, in the order in which they are tried on a bare file."""
    families = [load_family(path.stem) for path in FOLDER.glob("*.toml")]
    return tuple(family.name for family in sorted(families, key=lambda family: (family.precedence, family.name)))


def load_family(name_or_file: str) -> Family:
    """A family by the name of a carried table or by the path of the user's own. Raises TltError naming the defect."""
    path = Path(name_or_file)
    if path.suffix != ".toml":
        known = sorted(carried.stem for carried in FOLDER.glob("*.toml"))
        if name_or_file not in known:
            raise TltError(
                f"no family is called {name_or_file!r}{nearest(name_or_file, known)}; known: {', '.join(known)}; "
                "a table of your own is given by its .toml file"
            )
        return _carried(name_or_file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TltError(f"cannot read the family table {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TltError(f"cannot read the family table {path}: it is not UTF-8 text at byte {error.start}") from error
    return parse_family(text, path.stem)


@cache
def _carried(name: str) -> Family:
    return parse_family((FOLDER / f"{name}.toml").read_text(encoding="utf-8"), name)


def parse_family(text: str, name: str) -> Family:
    """Read a table. Raises TltError that names the table, the key and the rule it breaks."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TltError(f"family table {name}: not valid TOML: {error}") from error
    try:
        return _family(data, name, text)
    except TltError as error:
        raise TltError(f"family table {name}: {error}") from error


def _family(data: Mapping[str, Any], name: str, text: str) -> Family:
    _only("section", data, _SECTIONS)
    for section in ("axes", "tensors", "wiring", "rules"):
        if not isinstance(data.get(section), dict) or not data[section]:
            raise TltError(f"the section [{section}] is missing or empty")
    for key, kind in {"architectures": TEXTS, "model_type": TEXT, "prefix": TEXT, "precedence": NATURAL}.items():
        if key in data:
            _typed(key, data[key], kind)
    wiring = data["wiring"]
    _only("axis", data["axes"], _AXES)
    _only("wiring key", wiring, _STEM | {"block", "buffers", "attention", "ffn"})
    _only("attention role", wiring.get("attention", {}), _ATTENTION)
    _only("ffn role", wiring.get("ffn", {}), _FFN)
    rows = {pattern: _row(pattern, layout, data["axes"]) for pattern, layout in data["tensors"].items()}
    roles, axes = _roles(wiring, rows), _sizes(data, "axes")
    for axis in (*_NEEDED_AXES, *(["position"] if "positions" in roles else [])):
        if axis not in axes:
            raise TltError(f"[axes] lacks {axis}")
    if ("rotary" in axes) == ("channel" in axes):
        raise TltError("[axes] must have one of rotary (positions rotate each head) and channel (they do not)")
    return Family(
        name=name,
        architectures=tuple(data.get("architectures", ())),
        model_type=data.get("model_type", ""),
        prefix=data.get("prefix", ""),
        precedence=data.get("precedence", 100),
        axes=axes,
        derived=_acyclic(_sizes(data, "derived")),
        multiples=_section(data, "multiples", TEXT),
        defaults=_section(data, "defaults", _SCALAR),
        rows=rows,
        biases=_biases(_section(data, "biases", TEXTS), roles, rows),
        tied=_tied(_section(data, "tied", TEXT), rows),
        roles=roles,
        buffers=tuple(
            wiring.get("block", "") + buffer for buffer in _typed("buffers", wiring.get("buffers", []), TEXTS)
        ),
        rules=_rules(data["rules"]),
        text=text,
    )


_SCALAR = Kind("a number, a name, true or false", lambda value: isinstance(value, (bool, int, float, str)))


def _only(kind: str, given: Any, allowed: Iterable[str]) -> None:
    if not isinstance(given, Mapping):
        raise TltError(f"expected a section with one line per {kind}, found {given!r}")
    for key in given:
        if key not in allowed:
            raise TltError(f"unknown {kind} {key!r}{nearest(key, allowed)}")


def _typed(key: str, value: Any, kind: Kind) -> Any:
    if not kind.holds(value):
        raise TltError(f"{key} must be {kind.expected}, not {value!r}")
    return value


def _section(data: Mapping[str, Any], section: str, kind: Kind) -> dict[str, Any]:
    given = data.get(section, {})
    if not isinstance(given, dict):
        raise TltError(f"expected a section [{section}], found {given!r}")
    return {key: _typed(f"[{section}] {key}", value, kind) for key, value in given.items()}


def _sizes(data: Mapping[str, Any], section: str) -> dict[str, Expression]:
    found = {}
    for key, value in _section(data, section, Kind("a size in quotes", lambda value: isinstance(value, str))).items():
        try:
            found[key] = parse_expression(value)
        except TltError as error:
            raise TltError(f"[{section}] {key}: {error}") from error
    return found


def _acyclic(derived: dict[str, Expression]) -> dict[str, Expression]:
    for key in derived:
        ahead, seen = [key], set()
        while ahead:
            at = ahead.pop()
            for term in (derived[at].left, derived[at].right):
                if term == key:
                    raise TltError(f"[derived] {key} follows from itself")
                if term in derived and term not in seen:
                    seen.add(term)
                    ahead.append(str(term))
    return derived


def _row(pattern: str, layout: Any, axes: Mapping[str, Any]) -> Arrow:
    if not _PATTERN.match(pattern) or pattern.count("{layer}") > 1:
        raise TltError(f"row {pattern!r} is not a tensor's name, with {{layer}} once where the layer's number stands")
    _typed(f"row {pattern}", layout, Kind("a layout in quotes", lambda value: isinstance(value, str)))
    try:
        arrow = parse(layout)
    except LayoutError as error:
        raise TltError(f"row {pattern}: {error}") from error
    for axis in sorted(arrow.axes):
        if axis not in axes:
            raise TltError(f"row {pattern}: the axis {axis} is not in [axes]{nearest(axis, axes)}")
    return arrow


def _roles(wiring: Mapping[str, Any], rows: Mapping[str, Arrow]) -> dict[str, Module]:
    block = _typed("block", wiring.get("block", ""), Kind("text", lambda value: isinstance(value, str)))
    found = {role: wiring[role] for role in sorted(_STEM) if role in wiring}
    for half in ("attention", "ffn"):
        for role, module in wiring.get(half, {}).items():
            found[role] = block + _typed(role, module, TEXT)
    modules = {}
    for role, text in found.items():
        matched = re.fullmatch(r"(.+?)(?:\[([0-9])\])?", _typed(role, text, TEXT))
        if matched is None or f"{matched[1]}.weight" not in rows:
            raise TltError(f"{role} = {text!r}, but [tensors] has no row {matched[1] if matched else text}.weight")
        modules[role] = Module(matched[1], None if matched[2] is None else int(matched[2]))
    for role in sorted((_STEM | _ATTENTION | _FFN) - _OPTIONAL_ROLES - modules.keys()):
        raise TltError(f"[wiring] does not say which module is the {role}")
    for name in {module.name for module in modules.values()}:
        parts = [(module.part, role) for role, module in modules.items() if module.name == name]
        if len(parts) > 1 and sorted(part for part, _ in parts if part is not None) != list(range(len(parts))):
            raise TltError(
                f"{', '.join(role for _, role in parts)} are all in {name}: number them [0] to [{len(parts) - 1}]"
            )
    return modules


def _rules(rules: Mapping[str, Any]) -> dict[str, Any]:
    _only("rule", rules, (*OWN, *CONFIG))
    for rule in NEEDED:
        if rule not in rules:
            raise TltError(f"[rules] does not say the {rule}")
    for rule, value in rules.items():
        _typed(f"[rules] {rule}", value, OWN.get(rule, Kind("the name of a config key", TEXT.holds)))
    return dict(rules)


def _biases(
    biases: Mapping[str, list[str]], roles: Mapping[str, Module], rows: Mapping[str, Arrow]
) -> dict[str, tuple[str, ...]]:
    for key, named in biases.items():
        for role in named:
            if role not in roles:
                raise TltError(f"[biases] {key}: no module in [wiring] is the {role}{nearest(role, roles)}")
            if f"{roles[role].name}.bias" not in rows:
                raise TltError(f"[biases] {key}: [tensors] has no row {roles[role].name}.bias")
    return {key: tuple(named) for key, named in biases.items()}


def _tied(tied: Mapping[str, str], rows: Mapping[str, Arrow]) -> dict[str, str]:
    for name in (*tied, *tied.values()):
        if name not in rows:
            raise TltError(f"[tied] names {name}, but [tensors] has no such row{nearest(name, rows)}")
    return dict(tied)
