"""A family table fitted to one checkpoint: every tensor checked against its row, every axis size known.

The file decides what exists; the table annotates it. Only names, shapes and config.json are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

from tlt_cli.axes import LayoutError, bindings, shape, solve
from tlt_cli.errors import TltError, nearest
from tlt_cli.families.choose import choose
from tlt_cli.families.factors import (
    ROPE_SCALING,
    LowRank,
    check_complete,
    check_ranks,
    dense_config,
    factor_places,
    find_slot,
    own_sizes,
    read_lowrank,
)
from tlt_cli.families.family import Family
from tlt_cli.families.glue import PART, check_joint, dense_places, glue_places
from tlt_cli.families.groups import Groups, check_sizes, part_config, read_groups, stored_sizes
from tlt_cli.families.place import Place, Shapes, place, roles_of, stored
from tlt_cli.families.rules import check_config
from tlt_cli.families.sizes import edit_config, read_sizes
from tlt_cli.families.stacked import check_stacks, holders, places_of_part, stack_sizes, stacked_places

__all__ = ["Fit", "Place", "fit"]

_TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Fit:
    """A family table solved for one checkpoint. `places` covers every tensor but the `dropped` ones.

    `lowrank` says which matrices are stored as factors; None where all are plain. `groups` says which models lie side
    by side, every tensor [K, ...]: arrows, sizes and places are then those of one slice, but for tensors with the axis
    `part`, which reach across all of them. None where it is one model.
    """

    family: Family
    config: dict[str, Any]
    sizes: dict[str, int]
    places: dict[str, Place]
    dropped: tuple[str, ...]
    tied: bool
    notes: tuple[str, ...] = ()
    lowrank: LowRank | None = None
    groups: Groups | None = None

    def setting(self, key: str) -> Any:
        """A key of config.json, else the table's default, else None. An explicit null stays None."""
        return self.config[key] if key in self.config else self.family.defaults.get(key)

    def sizes_of(self, place: Place) -> dict[str, int]:
        """The sizes of all axes as they are for one tensor: with its rank, and its layer's own feed-forward."""
        if self.groups is not None and PART in place.arrow.axes:
            glue = self.groups.glue
            rank = {} if glue is None or glue.rank is None else {"rank": glue.rank}
            return {**self.sizes, PART: len(self.groups.parts), **rank}
        if self.groups is not None and self.groups.factored:
            return stack_sizes(self, place)
        return dict(self.sizes) if self.lowrank is None else own_sizes(self.sizes, self.family, self.lowrank, place)

    def part(self, number: int) -> Fit:
        """One of the models that lie side by side, counted from 0, as if it were alone: without glue."""
        assert self.groups is not None
        return self.parts[number]

    @cached_property
    def parts(self) -> tuple[Fit, ...]:
        """Each of the models that lie side by side, as if it were alone; of one model that one."""
        return (self,) if self.groups is None else tuple(map(self._part, range(len(self.groups.parts))))

    def _part(self, number: int) -> Fit:
        assert self.groups is not None
        config, lowrank = part_config(self.config, self.groups, number), self.groups.parts[number].lowrank
        sizes = read_sizes(self.family, config)
        places = places_of_part(self.family, self.places, lowrank, sizes["layer"])
        return replace(
            self, config=config, sizes=sizes, places=places, dropped=(), notes=(), groups=None, lowrank=lowrank
        )  # fmt: skip

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """By a tensor's name the parts, counted from 0, that it has a slice of: those that store a tensor so."""
        return holders(self.family, self.places, self.parts)

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
    family: str | Family | None = None,
    axes: Mapping[str, int] | None = None,
) -> Fit:
    """Fit a table to tensor shapes.

    `family` names a table or a .toml file; without it config.json's architecture, or else the tensors' names, choose.
    `axes` gives sizes that shapes cannot tell, such as the number of key/value heads of a bare file.
    Raises TltError that names the first tensor that does not fit, the shape found and the shape wanted.
    """
    lowrank, groups = read_lowrank(config), read_groups(config)
    if lowrank is not None and groups is not None:
        raise TltError("config.json has both groups and lowrank; of models side by side each has a lowrank of its own")
    origin, apart = lowrank or groups, dict[str, Place]()
    if origin is None:
        table, notes = choose(shapes, config, family)
    else:  # its own architecture is that of the code it ships; the table is the dense model's
        dense = dense_config(config or {}, origin.stock)
        config = {**(config or {}), **{key: dense[key] for key in dense if key == ROPE_SCALING}}
        table, notes = choose(shapes, dense, family)
    if lowrank is not None:
        apart = factor_places(table, lowrank)
        check_complete(table, shapes, apart)
    if groups is not None:
        apart = {**stacked_places(table, groups, shapes), **glue_places(table, groups.glue, shapes)}
    places, buffers = place(shapes, table, apart)
    if config is None:
        sizes = _solve_bare(shapes, table, places, axes or {})
        config, note = _made_up_config(table, places, sizes)
        notes = (*notes, note)
    else:
        sizes = read_sizes(table, config)
        if groups is not None:
            sizes = stored_sizes(table, groups, sizes)
            places = dense_places(table, groups.dense, places)
            check_joint(groups.glue, groups.dense, sizes["layer"], places)
        for axis, size in (axes or {}).items():
            if axis not in sizes:
                raise TltError(f"--axis {axis}: {table.name} has no such axis; it has {bindings(sizes)}")
            if sizes[axis] != size:
                raise TltError(f"--axis {axis}={size}, but config.json says {axis}={sizes[axis]}")
    solved = Fit(
        table, dict(config), sizes, places, tuple(buffers), tied=False, notes=notes, lowrank=lowrank, groups=groups
    )  # fmt: skip
    parts = solved.parts
    for one in (solved, *(parts if groups is not None else ())):
        check_config(table.rules, (*table.biases, _TIE), one.setting, layers=one.sizes["layer"])
    tied = bool(table.tied) and bool(solved.setting(_TIE))
    places, aliases = _tie(table, places, tied)
    solved = replace(solved, places=places, dropped=(*buffers, *aliases), tied=tied)
    if lowrank is not None:
        check_ranks(sizes, table, lowrank)
    if groups is not None:
        for number, one in enumerate(parts):
            check_sizes(sizes, one.sizes, number)
    if groups is not None and groups.factored:
        check_stacks(solved)
    _check_shapes(shapes, solved)
    for one in (solved, *(solved.parts if groups is not None and groups.factored else ())):
        _check_presence(one)
    return solved


def _tie(table: Family, places: dict[str, Place], tied: bool) -> tuple[dict[str, Place], list[str]]:
    """Where head and embedding are tied one tensor is enough, under either name: it is the embedding."""
    heads = [name for name, spot in places.items() if spot.roles == ("head",)]
    if not tied or not heads:
        return places, []
    if stored(places, "embedding"):
        return {name: spot for name, spot in places.items() if name not in heads}, heads
    embedding = table.rows[table.roles["embedding"].name + ".weight"]
    for name in heads:
        arrow = embedding if places[name].slot is None else places[name].arrow
        places = {**places, name: replace(places[name], arrow=arrow, roles=("embedding",))}
    return places, []


def _solve_bare(shapes: Shapes, table: Family, places: Mapping[str, Place], given: Mapping[str, int]) -> dict[str, int]:
    """Axis sizes without a config.json: from shapes, and from what the user gave."""
    for axis in given:
        if axis not in table.axes:
            raise TltError(f"--axis {axis}: {table.name} has no such axis{nearest(axis, table.axes)}")
    layers = 1 + max((spot.layer for spot in places.values() if spot.layer is not None), default=-1)
    sizes = {"layer": layers, **given}
    for _ in table.axes:
        for name, spot in places.items():
            try:
                sizes.update(solve(spot.arrow, tuple(shapes[name]), sizes))
            except LayoutError as error:
                raise TltError(f"{name} {list(shapes[name])}: {error}") from error
    missing = [axis for axis in table.axes if axis not in sizes]
    if missing:
        ask = "kv" if "kv" in missing else missing[0]
        raise TltError(
            f"cannot tell {'how many key/value heads' if ask == 'kv' else ask} from shapes alone; pass --axis {ask}=N "
            f"(known: {bindings(sizes)})"
        )
    return {axis: sizes[axis] for axis in table.axes}


def _made_up_config(table: Family, places: Mapping[str, Place], sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
    """The config.json that a bare file lacks, and a note on what was assumed."""
    biased = {role for spot in places.values() if spot.kind == "bias" for role in spot.roles}
    found = {key: biased.issuperset(roles) for key, roles in table.biases.items()}
    tied = not stored(places, "head") or not stored(places, "embedding")
    named = {"architectures": list(table.architectures[:1]), "model_type": table.model_type}
    unnamed = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # else transformers puts its own
    config = {**named, **unnamed, **table.defaults, **found, **({_TIE: tied} if table.tied else {})}
    solved = {term for expression in table.axes.values() for term in (expression.left, expression.right)}
    assumed = [f"{key}={config[key]}" for key in table.defaults if key not in solved and key != _TIE]
    return edit_config(table, config, sizes), f"no config.json: read as {table.name} with {', '.join(assumed)}"


def _check_shapes(shapes: Shapes, fit: Fit) -> None:
    for name, spot in fit.places.items():
        sizes, count = fit.sizes_of(spot), () if fit.groups is None else (len(fit.holders[name]),)
        wanted = (*(() if PART in spot.arrow.axes else count), *shape(spot.arrow, sizes))
        if tuple(shapes[name]) != wanted:
            own = {axis: size for axis, size in sizes.items() if axis in spot.arrow.axes}
            raise TltError(
                f"{name} is {list(shapes[name])}, but the {fit.family.name} table says '{spot.arrow}' = {list(wanted)} "
                f"with {bindings(own)}" + (f" in {count[0]} groups" if count else "")
            )


def _check_presence(fit: Fit) -> None:
    """Every tensor of every module that the wiring names is there, in every layer.

    Where a switch of config.json governs a bias, the file must agree with it: transformers would ignore the bias, or
    make one up.
    """
    table, layers = fit.family, fit.sizes["layer"]
    have: dict[str, dict[int | None, str]] = {}
    for name, spot in fit.places.items():
        row = spot.pattern if spot.slot is None else find_slot(table, spot.slot).pattern
        have.setdefault(row, {})[spot.layer] = name
    switched = {f"{table.roles[role].name}.bias": key for key, roles in table.biases.items() for role in roles}
    embedded = stored(fit.places, "embedding")
    for pattern in table.rows:
        found, roles = have.get(pattern, {}), roles_of(table, pattern)
        beyond = [layer for layer in found if layer is not None and layer >= layers]
        if beyond:
            raise TltError(f"{found[max(beyond)]} is in the file, but config.json says {layers} layers")
        if pattern in switched and found and not fit.setting(switched[pattern]):
            raise TltError(
                f"{next(iter(found.values()))} is in the file, but config.json says {switched[pattern]}=false; set it "
                "to true"
            )
        if not roles or (fit.tied and "head" in roles) or ("embedding" in roles and embedded):
            continue
        if pattern in switched and not fit.setting(switched[pattern]):
            continue
        if "{layer}" in pattern:
            lacking = next(layer for layer in count() if layer not in found)
            if lacking < layers:
                name = pattern.replace("{layer}", str(lacking))
                raise TltError(f"{name} is missing; the {table.name} table expects it in every layer (layer={layers})")
        elif not found:
            raise TltError(f"{pattern} is missing; the {table.name} table expects it")
