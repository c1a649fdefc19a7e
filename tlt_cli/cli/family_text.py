"""A family table as TOML text, as it was solved for one checkpoint: what --family reads, to be edited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.cli.console import printable
from tlt_cli.families.family import Family, Module
from tlt_cli.families.fit import Fit

STEM = ("embedding", "positions", "final_norm", "head")
ATTENTION = ("attention_norm", "query", "key", "value", "output", "query_norm", "key_norm", "attention_post_norm")
FFN = ("ffn_norm", "gate", "up", "down", "ffn_post_norm")


def solved_table(checkpoint: Checkpoint, fitted: Fit) -> str:
    """The family's table with the rows that this checkpoint has, and the sizes found as comments."""
    return "".join(f"{line}\n" for line in _solved(checkpoint, fitted))


def _solved(checkpoint: Checkpoint, fitted: Fit) -> Iterator[str]:
    family = fitted.family
    shapes = {place.pattern: checkpoint.tensors[name].shape for name, place in fitted.places.items()}
    needed = {f"{module.name}.weight" for module in family.roles.values()}  # the wiring names them, tied or not
    needed |= family.tied.keys() | set(family.tied.values())
    needed |= {f"{family.roles[role].name}.bias" for roles in family.biases.values() for role in roles}
    yield f"# {printable(checkpoint.source)}: the {family.name} table as solved"
    yield f"architectures = {spelled(list(family.architectures))}"
    if family.model_type:
        yield f"model_type = {spelled(family.model_type)}"
    if family.prefix:
        yield f"prefix = {spelled(family.prefix)}"
    yield f"precedence = {family.precedence}"
    yield from section("axes", {axis: str(e) for axis, e in family.axes.items()}, fitted.sizes)
    yield from section("derived", {key: str(e) for key, e in family.derived.items()})
    yield from section("multiples", family.multiples)
    yield from section("defaults", family.defaults)
    rows = {row: str(arrow) for row, arrow in family.rows.items() if row in shapes or row in needed}
    yield from section("tensors", rows, {row: list(shape) for row, shape in shapes.items()})
    yield from section("biases", {key: list(roles) for key, roles in family.biases.items()})
    yield from section("tied", family.tied)
    yield from _wiring(family)
    yield from section("rules", family.rules)


def _wiring(family: Family) -> Iterator[str]:
    block = family.roles["query"].name.partition("{layer}.")[0] + "{layer}."

    def within(roles: tuple[str, ...], inside: str) -> dict[str, str]:
        return {role: _spot(family.roles[role]).removeprefix(inside) for role in roles if role in family.roles}

    buffers = {"buffers": [name.removeprefix(block) for name in family.buffers]} if family.buffers else {}
    yield from section("wiring", {**within(STEM, ""), "block": block, **buffers})
    yield from section("wiring.attention", within(ATTENTION, block))
    yield from section("wiring.ffn", within(FFN, block))


def _spot(module: Module) -> str:
    return module.name if module.part is None else f"{module.name}[{module.part}]"


def section(name: str, entries: Mapping[str, Any], comments: Mapping[str, Any] | None = None) -> Iterator[str]:
    """The lines of a TOML section, some of them with a comment; an empty one has none."""
    if not entries:
        return
    yield f"\n[{name}]"
    for key, value in entries.items():
        line = f"{key if re.fullmatch(r'[A-Za-z0-9_]+', key) else spelled(key)} = {spelled(value)}"
        yield f"{line}  # {comments[key]}" if comments and key in comments else line


def spelled(value: Any) -> str:
    """A TOML value. Strings, numbers, booleans and lists of them are spelled alike in JSON and in TOML, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
