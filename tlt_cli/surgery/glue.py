"""Glue put between models that lie side by side, starting as the identity, as a Plan.

G stands in front of every linear that reads, so W' = W G folds (reference: slice and merge, section 3.3). One module
has one glue, whatever it holds fused: query, key and value that are modules of their own may each see another mixture.
In front of the head there is none where logits are capped: the cap is each part's own, and no matrix is behind it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tlt_cli.axes import dim_size
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import UsageError
from tlt_cli.families import Fit, fit
from tlt_cli.families.glue import FULL, KINDS, LEFT, LOWRANK, RIGHT, TENSORS, WHOLE, Glue, glue_arrow
from tlt_cli.families.groups import KEY
from tlt_cli.families.place import Place, match
from tlt_cli.model.describe import describe
from tlt_cli.model.modeling import shipped
from tlt_cli.model.sites import READERS
from tlt_cli.surgery.plan import Plan

NONE, RANK = "none", 8
CHOICES = (NONE, *KINDS)
CAPPED = "logits are capped part by part, behind the head: no glue in front of it folds"
Starts = Mapping[str, Mapping[str, Tensor]]  # by module, each of its tensors; what is not there starts as the identity


@dataclass(frozen=True)
class Site:
    """One linear that glue stands in front of: its module with {layer} left in, the roles it plays, and the width of
    what all parts read there."""

    name: str
    roles: tuple[str, ...]
    width: int


def sites(fitted: Fit) -> list[Site]:
    """All linears of a merged checkpoint that read, in the order in which they are used."""
    assert fitted.groups is not None
    spots, count = describe(fitted)["roles"], len(fitted.groups.parts)
    found: dict[str, tuple[str, ...]] = {}
    for role in (role for together in READERS for role in together if role in spots):
        name = spots[role]["name"]
        found[name] = (*found.get(name, ()), role)
    sized = [Site(name, roles, count * _inputs(fitted, name)) for name, roles in found.items()]
    head = head_module(fitted)
    return sized if head is None else [*sized, Site(head, ("head",), count * fitted.sizes["hidden"])]


def head_module(fitted: Fit) -> str | None:
    """What glue in front of the head is called, and what the head is once that is folded; None where none folds."""
    if describe(fitted)["final_softcap"] is not None or "head" not in fitted.family.roles:
        return None
    stored = next((name for name, place in fitted.places.items() if place.roles == ("head",)), None)
    return fitted.family.roles["head"].name if stored is None else stored.removesuffix(".weight")


def _inputs(fitted: Fit, site: str) -> int:
    row = match(fitted.family, f"{site.replace('{layer}', '0')}.weight")
    assert row is not None
    arrow = fitted.family.rows[row[0]]
    return dim_size(arrow.dims[arrow.inputs[0]], fitted.sizes)


def check_kind(kind: str, rank: int | None) -> None:
    """UsageError for a kind that is not known, or a rank with a kind that has none."""
    if kind not in CHOICES:
        raise UsageError(f"--glue {kind} is not known; take one of {', '.join(CHOICES)}")
    if rank is not None and kind != LOWRANK:
        raise UsageError(f"--glue-rank goes with --glue {LOWRANK}")


def glued(plan: Plan, kind: str, *, rank: int | None = None, seed: int = 0, starts: Starts | None = None) -> Plan:
    """The Plan of a merge with glue between the models; `starts` are what it begins as, the identity where there is
    none. `seed` is that of the right factors, which nothing reads until the left ones move.

    Raises UsageError for a kind or a rank that cannot be.
    """
    check_kind(kind, rank)
    if kind == NONE:
        return plan
    whole = fit(plan.shapes, plan.config)
    found = sites(whole)
    narrow = min(site.width for site in found)
    rank = (rank or min(RANK, narrow)) if kind == LOWRANK else None
    if rank is not None and rank > narrow:
        raise UsageError(f"--glue-rank {rank} is more than the {narrow} entries that the narrowest linear reads")
    assert whole.groups is not None
    glue = Glue(kind, rank, tuple(site.name for site in found))
    planned = {tensor.name: tensor for tensor in plan.tensors}
    added = [
        tensor
        for site in found
        for layer in (range(whole.sizes["layer"]) if "{layer}" in site.name else [None])
        for tensor in _tensors(site, layer, glue, whole, planned, seed, starts or {})
    ]
    config = {**plan.config, KEY: replace(whole.groups, glue=glue).data()}
    tensors = (*plan.tensors, *added)
    written = fit({tensor.name: tensor.shape for tensor in tensors}, config, family=whole.family)
    size = sum(tensor.parameters for tensor in added)
    capped = [CAPPED] if describe(whole)["final_softcap"] is not None else []
    return replace(
        plan, tensors=tensors, config=shipped(config, describe(written)), exact=not starts,
        details={**plan.details, "glue": {**glue.data(), "parameters": size}}, notes=(*plan.notes, *capped),
    )  # fmt: skip


def _tensors(
    site: Site, layer: int | None, glue: Glue, whole: Fit, planned: Mapping[str, PlannedTensor], seed: int,
    starts: Starts,
) -> Iterator[PlannedTensor]:  # fmt: skip
    module = site.name.replace("{layer}", str(layer))
    row = match(whole.family, f"{module}.weight")
    assert row is not None
    reader, sizes = whole.family.rows[row[0]], {**whole.sizes, "part": _count(whole), "rank": glue.rank or 0}
    beside = planned.get(f"{module}.weight") or next(  # of a tied head that is the embedding
        planned[name] for name, place in whole.places.items() if "embedding" in place.roles
    )
    for kind in TENSORS[glue.kind]:
        arrow, name = glue_arrow(reader, kind, glue.kind), f"{module}.{kind}.weight"
        size = (dim_size(arrow.dims[0], sizes), dim_size(arrow.dims[1], sizes))
        value = starts.get(module, {}).get(kind)
        start = partial(_start, size, value, kind == RIGHT, seed ^ zlib.crc32(name.encode()))
        yield PlannedTensor(name, size, beside.dtype, beside.source, start, 8 * math.prod(size))


def _count(fitted: Fit) -> int:
    assert fitted.groups is not None
    return len(fitted.groups.parts)


def _start(size: tuple[int, int], value: Tensor | None, drawn: bool, seed: int, _: Tensors) -> Iterable[Tensor]:
    """What is given; else zeros, and for a right factor entries that give every unit input an output of unit size."""
    if value is not None:
        yield value
    elif drawn:
        yield torch.randn(size, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size[1])
    else:
        yield torch.zeros(size)


def difference(read: Callable[[str], Tensor], kind: str, module: str, count: int, width: int) -> tuple[Tensor, ...]:
    """G - I of one module in float64, as what is multiplied: (b [K in, r], a [r, K in]), or (D [K in, K in],)."""
    if kind == LOWRANK:
        return tuple(read(f"{module}.{tensor}.weight").double() for tensor in (LEFT, RIGHT))
    whole = read(f"{module}.{WHOLE}.weight").double()
    return (whole if kind == FULL else torch.kron(whole, torch.eye(width // count, dtype=torch.float64)),)


def idle(read: Callable[[str], Tensor], names: Iterable[str]) -> bool:
    """Whether all glue is still the identity. `names` are those of a checkpoint's tensors."""
    return not any(
        bool(read(name).any()) for name in names if name.endswith((f".{LEFT}.weight", f".{WHOLE}.weight"))
    )  # fmt: skip


def described(fitted: Fit) -> list[dict[str, Any]]:
    """What `tlt inspect` says of every site, and of places where glue cannot be: name, whether it folds, and how."""
    assert fitted.groups is not None
    glue, data = fitted.groups.glue, describe(fitted)
    spots, found = data["roles"], list[dict[str, Any]]()
    for site in () if glue is None else sites(fitted):
        first = site.roles[0]
        reads = {
            "query": "attention_norm", "output": "the heads", "gate": "ffn_norm", "up": "ffn_norm",
            "down": "the neurons", "head": "final_norm",
        }.get(first, "attention_norm")  # fmt: skip
        into, why = f"{site.name}.weight", "W' = W G"
        if first == "head" and fitted.tied:
            why = "W' = [a_k E_k] G; the embedding stays as it is, so the head is untied"
        elif first == "head":
            why = "W' = [a_k W_k] G, the weights of the parts in it"
        present = site.name in glue.sites  # type: ignore[union-attr]
        found.append(
            {
                "module": site.name, "roles": list(site.roles), "kind": glue.kind if present else None,  # type: ignore[union-attr]
                "rank": glue.rank if present else None, "width": site.width,  # type: ignore[union-attr]
                "reads": spots[reads]["name"] if reads in spots else reads, "folds": True, "into": into, "how": why,
            }
        )  # fmt: skip
    return found + [{"module": where, "folds": False, "how": why} for where, why in _nowhere(fitted, data)]


def _nowhere(fitted: Fit, data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where no glue stands, and why not."""
    spots = data["roles"]
    yield "the residual stream", "a norm of each part is behind it, and n(x G) is not n(x) G"
    if data["final_softcap"] is not None:
        yield "the head", CAPPED
    for role in ("query_norm", "key_norm"):
        if role in spots:
            linear = spots[role.removesuffix("_norm")]["name"]
            yield f"behind {linear}", f"{spots[role]['name']} is there; glue in front of the linear folds all the same"
    for role in ("attention_post_norm", "ffn_post_norm"):
        if role in spots:
            yield f"behind {spots[role]['name']}", "a gain is all that could take it up, and that is diagonal"
    yield "behind an activation, scores, or the cache", "what is not linear lies between it and the next matrix"


def spread(place: Place) -> bool:
    """Whether a tensor is glue."""
    return place.kind in (RIGHT, LEFT, WHOLE)
