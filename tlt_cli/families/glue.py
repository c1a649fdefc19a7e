"""Glue between models side by side: what config.json's "groups" says of it, and of linears that it was folded into.

A *site* is a linear that reads, the head included. Glue G stands in front of it and mixes what all parts read there:
the arrow `part hidden <- part hidden`. Stored is G - I, which starts at zero: as two factors (lowrank), whole (full),
or as one number for each pair of parts (blocks, the Kronecker product with the identity). A linear that glue was folded
into is *dense*: one matrix across all parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tlt_cli.axes import Arrow, Dim
from tlt_cli.checkpoint.strict_json import shortened
from tlt_cli.errors import TltError
from tlt_cli.families.place import Place, Shapes, match, roles_of
from tlt_cli.families.table import Family

LOWRANK, FULL, BLOCKS = KINDS = ("lowrank", "full", "blocks")
RIGHT, LEFT, WHOLE = "glue_a", "glue_b", "glue"  # G = I + b a, or I + glue
TENSORS = {LOWRANK: (RIGHT, LEFT), FULL: (WHOLE,), BLOCKS: (WHOLE,)}
PART = "part"  # the axis of the parts, in arrows that reach across them


@dataclass(frozen=True)
class Glue:
    """The kind, the rank of `lowrank`, and the modules that it stands in front of, with {layer} left in."""

    kind: str
    rank: int | None
    sites: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """As config.json says it."""
        return {
            "kind": self.kind, **({} if self.rank is None else {"rank": self.rank}), "sites": list(self.sites)
        }  # fmt: skip


def read_glue(given: Any, where: str) -> Glue | None:
    """What config.json says at `where`, checked; None where it says nothing. Raises TltError naming the key."""
    if given is None:
        return None

    def check(holds: bool, key: str, wanted: str, found: Any) -> None:
        if not holds:
            raise TltError(f"config.json: {where}{key} must be {wanted}, not {shortened(found)}")

    check(isinstance(given, dict), "", "an object", given)
    kind, rank, sites = given.get("kind"), given.get("rank"), given.get("sites")
    check(kind in KINDS, ".kind", f"one of {', '.join(KINDS)}", kind)
    positive = type(rank) is int and rank > 0
    check(positive if kind == LOWRANK else rank is None, ".rank", "a whole number, with lowrank alone", rank)
    check(modules(sites) and bool(sites), ".sites", "a list of modules' names", sites)
    return Glue(kind, rank, tuple(sites))


def modules(value: Any) -> bool:
    """Whether it is a list of different names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len({*value}) == len(value)


def at_layer(sites: Iterable[str], layer: int | None) -> list[str]:
    """The names of the sites' modules in a layer; where that is None the one outside of all layers."""
    return [site.replace("{layer}", str(layer)) for site in sites if ("{layer}" in site) == (layer is not None)]


def glue_places(table: Family, glue: Glue | None, shapes: Shapes) -> dict[str, Place]:
    """The places of all tensors of glue, by name. Raises TltError for one that stands where config.json has none."""
    found: dict[str, Place] = {}
    for name in shapes:
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind not in (RIGHT, LEFT, WHOLE) or not name.endswith(".weight"):
            continue
        row = match(table, f"{module}.weight")
        known = glue is not None and row is not None and module in at_layer(glue.sites, row[1])
        if not known or glue is None or row is None or kind not in TENSORS[glue.kind]:
            raise TltError(f"{name} is in the file, but config.json's groups has no such glue")
        pattern, layer = row
        found[name] = Place(
            name, f"{pattern.removesuffix('.weight')}.{kind}.weight", glue_arrow(table.rows[pattern], kind, glue.kind),
            layer, (), kind,
        )  # fmt: skip
    return found


def glue_arrow(reader: Arrow, tensor: str, kind: str) -> Arrow:
    """What a tensor of glue maps, in front of a matrix that maps `reader`."""
    across: Dim = (PART,) if kind == BLOCKS else (PART, *reader.dims[reader.inputs[0]])
    dims = {RIGHT: (("rank",), across), LEFT: (across, ("rank",)), WHOLE: (across, across)}[tensor]
    return Arrow(dims, "<-", 1)


def dense_places(table: Family, dense: Iterable[str], places: Mapping[str, Place]) -> dict[str, Place]:
    """The places with the arrows of dense linears across all parts."""
    sites = tuple(dense)
    return {
        name: replace(spot, arrow=dense_arrow(table, spot))
        if spot.kind == "weight" and name.removesuffix(".weight") in at_layer(sites, spot.layer)
        else spot
        for name, spot in places.items()
    }


def dense_arrow(table: Family, spot: Place) -> Arrow:
    """A linear's arrow across all parts: of fused ones each is, and the head writes what all parts say together."""
    arrow = table.rows[spot.pattern]
    fused, dims = len(roles_of(table, spot.pattern)) > 1, list(arrow.dims)
    for index in arrow.inputs:
        dims[index] = (PART, *dims[index])
    for index in arrow.outputs if spot.roles != ("head",) else ():
        dims[index] = (dims[index][0], PART, *dims[index][1:]) if fused else (PART, *dims[index])
    return replace(arrow, dims=tuple(dims))


def check_joint(glue: Glue | None, dense: Iterable[str], layers: int, places: Mapping[str, Place]) -> None:
    """Raises TltError naming the first tensor across all parts that is missing, or one too many."""
    wanted = [(site, kind) for site in (() if glue is None else glue.sites) for kind in TENSORS[glue.kind]]  # type: ignore[union-attr]
    names = [f"{site}.{kind}.weight" for site, kind in wanted] + [f"{site}.weight" for site in dense]
    for name in names:
        for layer in range(layers) if "{layer}" in name else (None,):
            one = name.replace("{layer}", str(layer))
            if one not in places:
                raise TltError(f"{one} is missing: config.json's groups says that it is there")
    for name, spot in places.items():
        if spot.layer is not None and spot.layer >= layers and PART in spot.arrow.axes:
            raise TltError(f"{name} is in the file, but config.json says {layers} layers")
