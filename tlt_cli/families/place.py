"""Tensor names against a family's rows: which row a stored tensor belongs to, in which layer, in which role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tlt_cli.axes import Arrow
from tlt_cli.errors import TltError
from tlt_cli.families.table import Family

Shapes = Mapping[str, Sequence[int]]

# The first whole number between dots. No leading zeros: two names must never be the same layer of one row.
_LAYER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?=\.)", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Where a stored tensor stands: its arrow, its layer, and the role it plays (several where roles are fused).

    `slot` names the matrix that it is a factor or a part of, where it is not the row's whole tensor, and `part` which
    one of the row's fused parts that is.
    """

    name: str
    pattern: str
    arrow: Arrow
    layer: int | None
    roles: tuple[str, ...]
    kind: str
    slot: str | None = None
    part: int | None = None


def match(table: Family, name: str) -> tuple[str, int | None] | None:
    """The row's pattern and the layer, for a tensor's name with or without the family's prefix."""
    for candidate in (name, table.prefix + name):
        if candidate in table.rows:
            return candidate, None
        number = _LAYER.search(candidate)
        if number:
            pattern = f"{candidate[: number.start()]}{{layer}}{candidate[number.end() :]}"
            if pattern in table.rows:
                return pattern, int(number[0])
    return None


def is_buffer(table: Family, name: str) -> bool:
    """Whether the tensor is one that is computed anew and never written."""
    pattern = _LAYER.sub("{layer}", name, count=1)
    return pattern in table.buffers or table.prefix + pattern in table.buffers


def unknown_names(table: Family, shapes: Shapes) -> list[str]:
    """The tensors that stand in no row of the table."""
    return [name for name in shapes if match(table, name) is None and not is_buffer(table, name)]


def roles_of(table: Family, pattern: str) -> tuple[str, ...]:
    """The roles that a row plays, in the order in which they are fused."""
    module, _, _ = pattern.rpartition(".")
    found = [(spot.part or 0, role) for role, spot in table.roles.items() if spot.name == module]
    return tuple(role for _, role in sorted(found))


def place(
    shapes: Shapes, table: Family, apart: Mapping[str, Place] = MappingProxyType({})
) -> tuple[dict[str, Place], list[str]]:
    """Every tensor in its place, and the names of the buffers. Raises TltError that names the first unknown tensor.

    `apart` are the places of tensors that no row describes as it stands: factors, and parts of fused ones.
    """
    places: dict[str, Place] = {}
    taken: dict[tuple[str, int | None], str] = {}
    buffers = []
    for name in shapes:
        if name in apart:
            places[name] = apart[name]
            continue
        if is_buffer(table, name):
            buffers.append(name)
            continue
        row = match(table, name)
        if row is None:
            raise TltError(
                f"{name} {list(shapes[name])} is in the file but in no row of the {table.name} table; write a table "
                "with `tlt inspect SRC --toml > my.toml`, add the row and pass --family my.toml"
            )
        if row in taken:
            raise TltError(f"{taken[row]} and {name} are one tensor under two names; the file may hold one of them")
        taken[row] = name
        pattern, layer = row
        kind = pattern.rpartition(".")[2]
        places[name] = Place(name, pattern, table.rows[pattern], layer, roles_of(table, pattern), kind)
    return places, buffers


def renamed(spot: Place, layer: int) -> str:
    """The tensor's name with another layer number."""
    tail = spot.pattern.partition("{layer}")[2]
    return f"{spot.name.removesuffix(f'{spot.layer}{tail}')}{layer}{tail}"


def stored(places: Mapping[str, Place], role: str) -> bool:
    """Whether any tensor plays the role."""
    return any(role in spot.roles for spot in places.values())


def named(places: Mapping[str, Place], role: str, kind: str = "weight", layer: int | None = None) -> str | None:
    """The stored tensor that plays this role alone, in this layer; None where there is none."""
    fitting = (spot for spot in places.values() if (spot.roles, spot.kind, spot.layer) == ((role,), kind, layer))
    return next((spot.name for spot in fitting), None)
