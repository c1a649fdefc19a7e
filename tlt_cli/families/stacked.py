"""Models that lie side by side and store some matrices as factors: which tensors each has, and what a stack holds.

What parts have under one name is stacked, [n, ...] for the n of them that have it, in their order, each filled up with
zeros to the largest. A part's own "lowrank" says what it has; one without it, and one that lacks the layer, has the
family's own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tlt_cli.errors import TltError
from tlt_cli.families.factors import (
    LowRank,
    check_complete,
    check_ranks,
    factor_places,
    find_slot,
    is_factor,
    own_sizes,
)
from tlt_cli.families.glue import PART
from tlt_cli.families.groups import KEY, Groups
from tlt_cli.families.place import Place, Shapes
from tlt_cli.families.table import Family

if TYPE_CHECKING:
    from tlt_cli.families.fit import Fit

REST = "rest"  # the axis of a matrix's rows that pivots do not keep


def stacked_places(table: Family, groups: Groups, shapes: Shapes) -> dict[str, Place]:
    """The places of all parts' factors, and of fused matrices that a part stores one by one, by name. Raises TltError
    naming the first that is missing or left over."""
    found: dict[str, Place] = {}
    for part in groups.parts:
        for name, place in own_places(table, part.lowrank).items():
            if name not in found or REST in place.arrow.axes:
                found[name] = place
    check_complete(table, {name: shapes[name] for name in shapes if name in found or is_factor(name)}, found)
    return found


def own_places(table: Family, lowrank: LowRank | None) -> dict[str, Place]:
    """The places of a part's factors and of what it stores beside them, by name."""
    return {} if lowrank is None else factor_places(table, lowrank)


def own_rows(table: Family, lowrank: LowRank | None) -> set[tuple[str, int | None]]:
    """The family's own tensors, as pattern and layer, in whose place a part stores something else."""
    slots = [] if lowrank is None else [find_slot(table, name) for name in lowrank.ranks]
    return {(slot.pattern, slot.layer) for slot in slots}


def places_of_part(
    table: Family, places: Mapping[str, Place], lowrank: LowRank | None, layers: int
) -> dict[str, Place]:
    """Those of the places of all parts that one of so many layers has, as if it were alone: without glue."""
    factors, rows = own_places(table, lowrank), own_rows(table, lowrank)
    found = {}
    for name, spot in places.items():
        across = PART in spot.arrow.axes
        if (spot.layer is not None and spot.layer >= layers) or (across and not spot.roles):
            continue
        if spot.slot is not None:
            if name in factors:
                found[name] = replace(spot, arrow=factors[name].arrow)
        elif (spot.pattern, spot.layer) not in rows:
            found[name] = replace(spot, arrow=table.rows[spot.pattern]) if across else spot
    return found


def holders(table: Family, places: Mapping[str, Place], parts: Sequence[Fit]) -> dict[str, tuple[int, ...]]:
    """By name the parts, counted from 0, that a tensor's stack has: all, but of a matrix that some store as factors."""
    names = [own_places(table, part.lowrank) for part in parts]
    rows = [own_rows(table, part.lowrank) for part in parts]
    touched = set().union(*rows)

    def has(number: int, place: Place) -> bool:
        if place.slot is not None:
            return place.name in names[number]
        row = place.pattern, place.layer
        return row not in touched or (
            row not in rows[number] and (place.layer is None or place.layer < parts[number].sizes["layer"])
        )

    return {name: tuple(number for number in range(len(parts)) if has(number, place)) for name, place in places.items()}


def stack_sizes(whole: Fit, place: Place) -> dict[str, int]:
    """The sizes of the axes that a stack's slices are stored at: ranks and neurons are those of the largest in it."""
    each = [
        own_sizes({**whole.sizes, "ffn": one.sizes["ffn"]}, whole.family, one.lowrank or LowRank({}), place)
        for one in (whole.parts[number] for number in whole.holders[place.name])
    ]
    return {axis: max(own[axis] for own in each) for axis in each[0]} if each else dict(whole.sizes)


def renamed(lowrank: LowRank, names: Mapping[str, str]) -> LowRank:
    """The same with slots by other names."""
    return replace(
        lowrank,
        ranks={names[slot]: rank for slot, rank in lowrank.ranks.items()},
        shared={names[slot]: names[owner] for slot, owner in lowrank.shared.items()},
        pivoted={names[slot]: span for slot, span in lowrank.pivoted.items()},
    )


def check_stacks(whole: Fit) -> None:
    """Raises TltError naming what parts with factors cannot have side by side."""
    assert whole.groups is not None
    for number, (part, own) in enumerate(zip(whole.parts, whole.groups.parts, strict=True)):
        if part.lowrank is not None:
            try:
                check_ranks(part.sizes, whole.family, part.lowrank)
            except TltError as error:
                raise TltError(f"part {number + 1} of {KEY} ({own.name}): {error}") from error
    coded = [  # several may have one name
        (own.name, own.lowrank.bits is not None) for own in whole.groups.parts if own.lowrank and own.lowrank.ranks
    ]
    if len({kind for _, kind in coded}) > 1:
        codes, numbers = (next(name for name, kind in coded if kind is wanted) for wanted in (True, False))
        raise TltError(
            f"the factors of {codes} are 8-bit codes and those of {numbers} are not; `tlt fold` one of them first"
        )
    if coded and whole.groups.dense:
        raise TltError(f"config.json: {KEY}.dense names linears across all parts, but {coded[0][0]} has factors")
    narrow = next((own.name for own in whole.groups.parts if own.lowrank is not None and own.lowrank.ffn), None)
    if narrow is not None and whole.groups.glue is not None:
        raise TltError(f"layers of {narrow} lack neurons, and glue is as wide in all layers; `tlt fold` {narrow} first")
    for name, place in whole.places.items():
        if not whole.holders[name]:
            raise TltError(f"{name} is in the file, but every part of config.json's {KEY} stores that as factors")
        if REST not in place.arrow.axes:
            continue
        outputs, _ = find_slot(whole.family, place.slot or "").dims()
        for number in whole.holders[name] if len(outputs) > 1 else ():
            for axis in (factor for factor in outputs if isinstance(factor, str)):
                size, own_size = whole.sizes[axis], whole.parts[number].sizes[axis]
                if size != own_size:
                    raise TltError(
                        f"{place.slot} is factored with rows kept as they are, and models side by side have "
                        f"{axis}={own_size} and {axis}={size}: such rows are counted one way only; `tlt fold` what is "
                        "factored first"
                    )
