"""A family table: what the tensors of one model family are called, which axes they are made of, who feeds whom.

Families are data. A table is one TOML file; every key is checked, because data that no code checks rots.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlt_cli.axes import Arrow, LayoutError, parse
from tlt_cli.errors import TltError, nearest
from tlt_cli.families.expression import Expression, parse_expression

FOLDER = Path(__file__).parent

_SECTIONS = {
    "architectures", "model_type", "prefix", "axes", "derived", "multiples", "defaults", "tensors", "tied", "wiring",
    "rules",
}  # fmt: skip
_AXES = {"vocab", "position", "hidden", "ffn", "layer", "kv", "group", "rotary", "channel"}
_STEM = {"embedding", "positions", "final_norm", "head"}
_ATTENTION = {
    "attention_norm", "query", "key", "value", "output", "query_norm", "key_norm", "attention_post_norm",
}  # fmt: skip
_FFN = {"ffn_norm", "gate", "up", "down", "ffn_post_norm"}
_RULES = {
    "norm", "epsilon", "activation", "gain_offset", "embedding_scale", "softmax_scalar", "softmax_switch",
    "softmax_layer_switch", "attention_softcap", "final_softcap", "window", "window_switch", "layer_types",
    "full_every", "full_before", "rotary_layers", "unrotated_every", "sliding_rope_theta", "unsupported",
}  # fmt: skip
_OPTIONAL_ROLES = {"positions", "head", "query_norm", "key_norm", "attention_post_norm", "gate", "ffn_post_norm"}


@dataclass(frozen=True)
class Module:
    """Where a role lives: a module name with `{layer}` left in, and the slice of it when several roles are fused."""

    name: str
    part: int | None = None


@dataclass(frozen=True)
class Family:
    """One model family. `rows` maps tensor-name patterns (with `{layer}`) to arrows; `roles` maps roles to modules."""

    name: str
    architectures: tuple[str, ...]
    model_type: str
    prefix: str
    axes: Mapping[str, Expression]
    derived: Mapping[str, Expression]
    multiples: Mapping[str, str]
    defaults: Mapping[str, Any]
    rows: Mapping[str, Arrow]
    tied: Mapping[str, str]
    roles: Mapping[str, Module]
    buffers: tuple[str, ...]
    rules: Mapping[str, Any]
    text: str

    @property
    def head_axes(self) -> tuple[str, ...]:
        """The axes whose product is the number of query heads."""
        return tuple(axis for axis in ("kv", "group") if axis in self.axes)

    @property
    def head_size_axis(self) -> str:
        """The axis that head_dim grows along: half of it where positions rotate, all of it elsewhere."""
        return "rotary" if "rotary" in self.axes else "channel"


def known_families() -> tuple[str, ...]:
    """Names of the tables that tlt carries, the plainest first: it is the one taken where a bare file fits several."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return tuple(sorted(names, key=lambda name: (name != "llama", name)))


def load_family(name_or_file: str) -> Family:
    """A family by the name of a carried table or by the path of the user's own. Raises TltError naming the defect."""
    path = Path(name_or_file)
    if path.suffix != ".toml":
        if name_or_file not in known_families():
            hint = nearest(name_or_file, known_families())
            raise TltError(
                f"no family is called '{name_or_file}'{hint}; known: {', '.join(known_families())}; "
                "a table of your own is given by its .toml file"
            )
        path = FOLDER / f"{name_or_file}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TltError(f"cannot read the family table {path}: {error}") from error
    return parse_family(text, path.stem)


def parse_family(text: str, name: str) -> Family:
    """Read a table. Raises TltError that names the table, the key and the rule it breaks."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TltError(f"family table {name}: not valid TOML: {error}") from error
    _only(name, "section", data, _SECTIONS)
    for section in ("axes", "tensors"):
        if not isinstance(data.get(section), dict) or not data[section]:
            raise TltError(f"family table {name}: the section [{section}] is missing or empty")
    _only(name, "axis", data["axes"], _AXES)
    wiring = data.get("wiring", {})
    _only(name, "wiring key", wiring, _STEM | {"block", "buffers", "attention", "ffn"})
    _only(name, "attention role", wiring.get("attention", {}), _ATTENTION)
    _only(name, "ffn role", wiring.get("ffn", {}), _FFN)
    _only(name, "rule", data.get("rules", {}), _RULES)
    rows = {pattern: _row(name, pattern, layout, data["axes"]) for pattern, layout in data["tensors"].items()}
    return Family(
        name=name,
        architectures=tuple(data.get("architectures", ())),
        model_type=data.get("model_type", ""),
        prefix=data.get("prefix", ""),
        axes={axis: parse_expression(str(value)) for axis, value in data["axes"].items()},
        derived={key: parse_expression(str(value)) for key, value in data.get("derived", {}).items()},
        multiples=data.get("multiples", {}),
        defaults=data.get("defaults", {}),
        rows=rows,
        tied=data.get("tied", {}),
        roles=_roles(name, wiring, rows),
        buffers=tuple(wiring.get("block", "") + buffer for buffer in wiring.get("buffers", ())),
        rules=data.get("rules", {}),
        text=text,
    )


def _only(name: str, kind: str, given: Mapping[str, Any], allowed: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise TltError(f"family table {name}: expected a section of keys for {kind}, found {given!r}")
    for key in given:
        if key not in allowed:
            raise TltError(f"family table {name}: unknown {kind} '{key}'{nearest(key, allowed)}")


def _row(name: str, pattern: str, layout: Any, axes: Mapping[str, Any]) -> Arrow:
    try:
        arrow = parse(str(layout))
    except LayoutError as error:
        raise TltError(f"family table {name}: row {pattern}: {error}") from error
    for axis in sorted(arrow.axes):
        if axis not in axes:
            raise TltError(f"family table {name}: row {pattern}: the axis {axis} is not in [axes]{nearest(axis, axes)}")
    return arrow


def _roles(name: str, wiring: Mapping[str, Any], rows: Mapping[str, Arrow]) -> dict[str, Module]:
    if not wiring:
        return {}
    block = wiring.get("block", "")
    found = {role: wiring[role] for role in _STEM if role in wiring}
    for half in ("attention", "ffn"):
        found.update({role: block + module for role, module in wiring.get(half, {}).items()})
    modules = {}
    for role, text in found.items():
        match = re.fullmatch(r"(.+?)(?:\[(\d+)\])?", text)
        assert match is not None
        module = Module(match[1], None if match[2] is None else int(match[2]))
        if f"{module.name}.weight" not in rows:
            raise TltError(f"family table {name}: {role} = '{text}', but [tensors] has no row {module.name}.weight")
        modules[role] = module
    for role in sorted((_STEM | _ATTENTION | _FFN) - _OPTIONAL_ROLES - modules.keys()):
        raise TltError(f"family table {name}: [wiring] does not say which module is the {role}")
    return modules
