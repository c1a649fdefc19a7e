"""A family table fitted to one checkpoint: every tensor checked against its row, every axis size known.

The file decides what exists; the table annotates it. Only names, shapes and config.json are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlt_cli.axes import Arrow, LayoutError, bindings, shape, solve
from tlt_cli.errors import TltError, nearest
from tlt_cli.families.sizes import edit_config, read_sizes
from tlt_cli.families.table import Family, known_families, load_family

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor stands: its arrow, its layer, and the role it plays (several where roles are fused)."""

    name: str
    pattern: str
    arrow: Arrow
    layer: int | None
    roles: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Fit:
    """A family table solved for one checkpoint. `places` covers every tensor but the `dropped` ones."""

    family: Family
    config: dict[str, Any]
    sizes: dict[str, int]
    places: dict[str, Place]
    dropped: tuple[str, ...]
    tied: bool
    notes: tuple[str, ...] = ()

    def setting(self, key: str) -> Any:
        """A key of config.json, else the table's default, else None. An explicit null stays None."""
        return self.config[key] if key in self.config else self.family.defaults.get(key)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.sizes["kv"]

    @property
    def heads(self) -> int:
        """Number of query heads: groups times key/value heads."""
        return self.sizes["kv"] * self.sizes.get("group", 1)

    @property
    def head_dim(self) -> int:
        """Entries of one head."""
        return 2 * self.sizes["rotary"] if "rotary" in self.sizes else self.sizes["channel"]


def fit(
    shapes: Shapes,
    config: Mapping[str, Any] | None,
    *,
    family: str | None = None,
    axes: Mapping[str, int] | None = None,
) -> Fit:
    """Fit a table to tensor shapes.

    `family` names a table or a .toml file; without it config.json's architecture, or else the tensors' names, choose.
    `axes` gives sizes that shapes cannot tell, such as the number of key/value heads of a bare file.
    Raises TltError that names the first tensor that does not fit, the shape found and the shape wanted.
    """
    notes: list[str] = []
    table = _choose(shapes, config, family, notes)
    places, dropped = _place(shapes, table)
    layers = 1 + max((place.layer for place in places.values() if place.layer is not None), default=-1)
    if config is None:
        sizes = _solve_bare(shapes, table, places, dict(axes or {}), layers)
        tied = not any(place.roles == ("head",) for place in places.values()) or not _stored(places, "embedding")
        made_up = {"architectures": list(table.architectures[:1]), "model_type": table.model_type}
        config = {**made_up, **table.defaults, **({"tie_word_embeddings": tied} if table.tied else {})}
        config = edit_config(table, config, sizes)
        notes.append(
            f"no config.json: read as {table.name} with its defaults "
            f"({', '.join(f'{key}={value}' for key, value in table.defaults.items())})"
        )
    else:
        sizes = read_sizes(table, config)
        for axis, size in (axes or {}).items():
            if axis not in sizes:
                raise TltError(f"--axis {axis}: {table.name} has no such axis; it has {bindings(sizes)}")
            if sizes[axis] != size:
                raise TltError(f"--axis {axis}={size}, but config.json says {axis}={sizes[axis]}")
    solved = Fit(table, dict(config), sizes, places, tuple(dropped), tied=False, notes=tuple(notes))
    tied = bool(table.tied) and bool(solved.setting("tie_word_embeddings"))
    places, also_dropped = _tie(table, places, tied)
    _check_shapes(shapes, table, places, sizes)
    _check_presence(table, places, sizes, tied)
    return Fit(table, dict(config), sizes, places, (*dropped, *also_dropped), tied, tuple(notes))


def _choose(shapes: Shapes, config: Mapping[str, Any] | None, family: str | None, notes: list[str]) -> Family:
    if family is not None:
        return load_family(family)
    tables = [load_family(name) for name in known_families()]
    architectures = (config or {}).get("architectures") or []
    model_type = (config or {}).get("model_type")
    if config is not None:
        for table in tables:
            if table.architectures[:1] == tuple(architectures[:1]) or (
                not architectures and table.model_type == model_type
            ):
                return table
        named = architectures[0] if architectures else f"model_type {model_type!r}"
        known = [architecture for table in tables for architecture in table.architectures]
        raise TltError(
            f"no family table for {named}{nearest(str(named), known)}; tables: {', '.join(t.name for t in tables)}; "
            "write one with `tlt inspect SRC --toml > my.toml` and pass --family my.toml"
        )
    fitting = []
    for table in tables:
        unknown = [name for name in shapes if _match(table, name) is None and not _is_buffer(table, name)]
        if not unknown:
            places, _ = _place(shapes, table)
            missing = [role for role in table.roles if role != "head" and not _stored(places, role)]
            if not missing or missing == ["embedding"]:
                fitting.append((table, sum(f"{module.name}.bias" in table.rows for module in table.roles.values())))
    if not fitting:
        counts = {
            table.name: [n for n in shapes if _match(table, n) is None and not _is_buffer(table, n)] for table in tables
        }
        closest = min(counts, key=lambda name: len(counts[name]))
        if counts[closest]:
            first = counts[closest][0]
            raise TltError(
                f"no family matches (nearest {closest}; first unknown tensor: {first} {list(shapes[first])}); write a "
                "table with `tlt inspect SRC --toml > my.toml` and pass --family my.toml"
            )
        raise TltError("no family matches: tensors that every family has are missing (an adapter or a shard alone?)")
    has_bias = any(name.endswith("q_proj.bias") for name in shapes)
    has_output_bias = any(name.endswith("o_proj.bias") for name in shapes)
    if has_bias and not has_output_bias:
        fitting = [f for f in fitting if not any(p.endswith("o_proj.bias") for p in f[0].rows)] or fitting
    if len(fitting) > 1:
        others = ", ".join(table.name for table, _ in fitting[1:])
        notes.append(f"the tensor names fit {fitting[0][0].name}, and also {others}; pass --family to choose")
    return fitting[0][0]


def _match(table: Family, name: str) -> tuple[str, int | None] | None:
    """The row's pattern and the layer, for a tensor's name with or without the family's prefix."""
    numbers = re.findall(r"\.(\d+)\.", f".{name}")
    for candidate in (name, table.prefix + name):
        if candidate in table.rows:
            return candidate, None
        if numbers:
            pattern = re.sub(r"(^|\.)\d+\.", r"\1{layer}.", candidate, count=1)
            if pattern in table.rows:
                return pattern, int(numbers[0])
    return None


def _is_buffer(table: Family, name: str) -> bool:
    pattern = re.sub(r"(^|\.)\d+\.", r"\1{layer}.", name, count=1)
    return pattern in table.buffers or table.prefix + pattern in table.buffers


def _roles_of(table: Family, pattern: str) -> tuple[str, ...]:
    module, _, _ = pattern.rpartition(".")
    found = [(spot.part or 0, role) for role, spot in table.roles.items() if spot.name == module]
    return tuple(role for _, role in sorted(found))


def _place(shapes: Shapes, table: Family) -> tuple[dict[str, Place], list[str]]:
    places: dict[str, Place] = {}
    dropped = []
    for name in shapes:
        if _is_buffer(table, name):
            dropped.append(name)
            continue
        match = _match(table, name)
        if match is None:
            raise TltError(
                f"{name} {list(shapes[name])} is in the file but in no row of the {table.name} table; write a table "
                "with `tlt inspect SRC --toml > my.toml`, add the row and pass --family my.toml"
            )
        pattern, layer = match
        kind = pattern.rpartition(".")[2]
        places[name] = Place(name, pattern, table.rows[pattern], layer, _roles_of(table, pattern), kind)
    return places, dropped


def _stored(places: Mapping[str, Place], role: str) -> bool:
    return any(role in place.roles for place in places.values())


def _tie(table: Family, places: dict[str, Place], tied: bool) -> tuple[dict[str, Place], list[str]]:
    """Where head and embedding are tied one tensor is enough, under either name: it is the embedding."""
    if not tied:
        return places, []
    heads = [name for name, place in places.items() if place.roles == ("head",)]
    if not heads:
        return places, []
    if _stored(places, "embedding"):
        return {name: place for name, place in places.items() if name not in heads}, heads
    embedding = table.rows[table.roles["embedding"].name + ".weight"]
    old = places[heads[0]]
    new = Place(old.name, old.pattern, embedding, None, ("embedding",), old.kind)
    return {name: new if name == heads[0] else place for name, place in places.items()}, []


def _solve_bare(
    shapes: Shapes, table: Family, places: Mapping[str, Place], given: dict[str, int], layers: int
) -> dict[str, int]:
    for axis in given:
        if axis not in table.axes:
            raise TltError(f"--axis {axis}: {table.name} has no such axis{nearest(axis, table.axes)}")
    sizes = {"layer": layers, **given}
    for _ in range(len(table.axes)):
        for name, place in places.items():
            try:
                sizes.update(solve(place.arrow, tuple(shapes[name]), sizes))
            except LayoutError as error:
                raise TltError(f"{name} {list(shapes[name])}: {error}") from error
    missing = [axis for axis in table.axes if axis not in sizes]
    if missing:
        ask = next(axis for axis in ("kv", *missing) if axis in missing)
        raise TltError(
            f"cannot tell {'how many key/value heads' if ask == 'kv' else ask} from shapes alone; pass --axis {ask}=N "
            f"(known: {bindings(sizes)})"
        )
    return {axis: sizes[axis] for axis in table.axes}


def _check_shapes(shapes: Shapes, table: Family, places: Mapping[str, Place], sizes: Mapping[str, int]) -> None:
    for name, place in places.items():
        wanted = shape(place.arrow, sizes)
        if tuple(shapes[name]) != wanted:
            raise TltError(
                f"{name} is {list(shapes[name])}, but the {table.name} table says '{place.arrow}' = {list(wanted)} "
                f"with {bindings({axis: size for axis, size in sizes.items() if axis in place.arrow.axes})}"
            )


def _check_presence(table: Family, places: Mapping[str, Place], sizes: Mapping[str, int], tied: bool) -> None:
    """Every module the wiring names is there, in every layer; a bias is there in all layers or in none."""
    have: dict[str, set[int | None]] = {}
    for place in places.values():
        have.setdefault(place.pattern, set()).add(place.layer)
    layers: set[int | None] = set(range(sizes.get("layer", 0)))
    embedded = _stored(places, "embedding")
    for pattern in table.rows:
        roles = _roles_of(table, pattern)
        if not roles or (tied and "head" in roles) or ("embedding" in roles and embedded):
            continue
        wanted = layers if "{layer}" in pattern else {None}
        found = have.get(pattern, set())
        if pattern.endswith(".bias") and not found:
            continue
        if found - wanted:
            extra = sorted(str(layer) for layer in found - wanted)
            raise TltError(f"{pattern} has layers {', '.join(extra)}, but config.json says layer={sizes.get('layer')}")
        if wanted - found:
            layer = min(wanted - found, key=str)
            raise TltError(
                f"{pattern.replace('{layer}', str(layer))} is missing; the {table.name} table expects it "
                f"{'in every layer (layer=' + str(sizes.get('layer')) + ')' if '{layer}' in pattern else ''}".rstrip()
            )
