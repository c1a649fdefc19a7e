"""Which family table a checkpoint is read with: the one asked for, the config's architecture's, or the names' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlt_cli.checkpoint.strict_json import shortened
from tlt_cli.errors import TltError, nearest
from tlt_cli.families.place import Shapes, place, stored, unknown_names
from tlt_cli.families.table import Family, known_families, load_family


def choose(
    shapes: Shapes, config: Mapping[str, Any] | None, family: str | Family | None
) -> tuple[Family, tuple[str, ...]]:
    """The table, and notes on what else would have fitted.

    `family` names a table or a .toml file; without it config.json's architecture or, where there is no config.json, the
    tensors' names choose. Raises TltError naming the architecture, or the first tensor that no table knows.
    """
    if family is not None:
        return (family if isinstance(family, Family) else load_family(family)), ()
    tables = [load_family(name) for name in known_families()]
    if config is not None:
        return _by_architecture(tables, config), ()
    fitting = [table for table in tables if _fits(table, shapes)]
    if not fitting:
        raise TltError(_why_none_fits(tables, shapes))
    others = ", ".join(table.name for table in fitting[1:])
    note = f"the tensor names fit {fitting[0].name}, and also {others}; pass --family to choose"
    return fitting[0], (note,) if others else ()


def _by_architecture(tables: list[Family], config: Mapping[str, Any]) -> Family:
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise TltError(f"config.json: architectures must be a list of names, not {shortened(architectures)}")
    for table in tables:
        if set(architectures) & set(table.architectures) or (not architectures and table.model_type == model_type):
            return table
    if not architectures and model_type is None:
        raise TltError("config.json has neither architectures nor model_type: pass --family to say what the model is")
    named = architectures[0] if architectures else str(model_type)
    known = [name for table in tables for name in (table.architectures if architectures else [table.model_type])]
    raise TltError(
        f"no family table for {shortened(named)}{nearest(named, known)}; tables: {', '.join(t.name for t in tables)}; "
        "write one with `tlt inspect SRC --toml > my.toml` and pass --family my.toml"
    )


def _fits(table: Family, shapes: Shapes) -> bool:
    """Whether the table knows every name, and the file lacks nothing but what may be tied or switched off."""
    if unknown_names(table, shapes):
        return False
    places, _ = place(shapes, table)
    missing = [role for role in table.roles if role != "head" and not stored(places, role)]
    if missing not in ([], ["embedding"]):
        return False
    biased = {role for spot in places.values() if spot.kind == "bias" for role in spot.roles}
    switched = {role for roles in table.biases.values() for role in roles}
    always = {role for role, module in table.roles.items() if f"{module.name}.bias" in table.rows} - switched
    return biased >= always and all(
        len(biased.intersection(roles)) in (0, len(roles)) for roles in table.biases.values()
    )


def _why_none_fits(tables: list[Family], shapes: Shapes) -> str:
    unknown = {table.name: unknown_names(table, shapes) for table in tables}
    closest = min(unknown, key=lambda name: len(unknown[name]))
    if not unknown[closest]:
        return "no family matches: tensors that every family has are missing (an adapter or a shard alone?)"
    first = unknown[closest][0]
    return (
        f"no family matches (nearest {closest}; first unknown tensor: {first} {list(shapes[first])}); write a "
        "table with `tlt inspect SRC --toml > my.toml` and pass --family my.toml"
    )
