"""From the maps of axes to the maps of an arrow's dims: what a role does with an axis decides what fresh entries hold.

- hidden  the residual stream, P with PT P = (D/d) I: RMSNorm is kept for any D (reference: grow, section 3.0). Under
          LayerNorm whole copies, and the rest written as the mean, so that mean and variance survive.
- ffn     copies whose readers share the old weight, or fresh rows that nothing reads yet.
- heads   slots in which every query head stays with its own key/value head.
- head_dim  fresh query, key and value entries: keys write zero there, so queries may hold anything; values hold
          anything and the output reads zero there. Behind a query or key norm both are isometric copies instead, so
          that the norm sees the same mean square, and the key's fresh gains are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tlt_cli.axes import Dim
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place
from tlt_cli.surgery import maps
from tlt_cli.surgery.maps import COPY, FREE, MEAN, ZERO, AxisMap
from tlt_cli.surgery.rotary import pair_sources
from tlt_cli.surgery.spectrum import DenseMap, random_isometry
from tlt_cli.surgery.widen import Side

METHODS = ("identity", "duplicate", "spectral", "rotate")


@dataclass(frozen=True, eq=False)
class AxisMaps:
    """The map of every axis. `heads` maps query heads, `kv` key/value heads; `entries` maps one head's entries by role
    (half of them where positions rotate)."""

    hidden: AxisMap | DenseMap
    ffn: AxisMap
    vocab: AxisMap
    kv: AxisMap
    heads: AxisMap
    entries: Mapping[str, AxisMap]
    others: Mapping[str, AxisMap]


def axis_maps(fit: Fit, sizes: Mapping[str, int], *, method: str, split: float, seed: int) -> AxisMaps:
    """The maps from the fit's sizes to these, by one of METHODS. Raises TltError where the method cannot be exact."""
    copy = method != "identity"
    old = fit.sizes
    slots = maps.head_slots(old["kv"], old.get("group", 1), sizes["kv"], sizes.get("group", 1), copy=copy)
    assert slots is not None, "targets checked that the heads have slots"
    return AxisMaps(
        hidden=_stream(fit, old["hidden"], sizes["hidden"], method, split, seed),
        ffn=maps.repeat(old["ffn"], sizes["ffn"], split=split) if copy else maps.pad(old["ffn"], sizes["ffn"], FREE),
        vocab=maps.pad(old["vocab"], sizes["vocab"], MEAN),
        kv=maps.shared(old["kv"], slots[0]),
        heads=maps.shared(fit.heads, slots[1], split=split),
        entries=_entries(fit, sizes[fit.family.head_size_axis]),
        others={axis: maps.same(size) for axis, size in old.items() if axis in ("position",)},
    )


def _stream(fit: Fit, old: int, new: int, method: str, split: float, seed: int) -> AxisMap | DenseMap:
    layer_norm = fit.family.rules["norm"] == "layer"
    if layer_norm and any(role.endswith("post_norm") for role in fit.family.roles):
        raise TltError(
            f"{fit.family.name} writes through LayerNorms, whose output no wider model can keep; tlt grows RMSNorms"
        )
    if method == "rotate":
        if any(role.endswith("post_norm") for role in fit.family.roles):
            raise TltError(
                f"--method rotate: {fit.family.name} norms what its blocks write, and the gains of those norms cannot "
                "be folded through a rotation; take --method identity or duplicate"
            )
        if layer_norm and new == old:
            raise TltError(
                f"--method rotate: {fit.family.name}'s norms have biases, which need one spare direction; "
                f"say --to-dim with more than {old}"
            )
        return random_isometry(old, new, keep_mean=layer_norm, seed=seed)
    if not layer_norm:
        return maps.isometric(maps.repeat(old, new, split=split) if method != "identity" else maps.pad(old, new, ZERO))
    position, whole = np.arange(new), old * (new // old if method != "identity" else 1)
    copies = maps.shared(old, np.where(position < whole, position % old, -1), split=split, fresh=MEAN)
    # variance is kept when the copied entries weigh sqrt(new / copied): the mean fills the rest without adding any
    return copies.scaled(np.sqrt(new / whole))


def _entries(fit: Fit, new: int) -> dict[str, AxisMap]:
    rotates = fit.family.head_size_axis == "rotary"
    old = fit.sizes[fit.family.head_size_axis]
    source = pair_sources(old, new) if rotates else np.where(np.arange(new) < old, np.arange(new), -1)
    found = {role: maps.shared(old, source, fresh=FREE) for role in ("query", "value", "output")}
    found["key"] = maps.shared(old, source, fresh=ZERO)
    filled = np.where(source >= 0, source, np.arange(new) % old)
    copied = maps.isometric(maps.shared(old, filled))
    for role, fresh in (("query", MEAN), ("key", ZERO)):
        if f"{role}_norm" in fit.family.roles:
            found[role] = copied
            # the norm's output is write * old, so these gains give the old product back, and only where it was
            gains = maps.shared(old, source, fresh=fresh)
            found[f"{role}_norm"] = gains.scaled(np.where(source >= 0, 1 / copied.write, 1.0))
    return found


def freed(axes: AxisMaps) -> AxisMaps:
    """The maps of a block that writes nothing yet: fresh keys may hold anything too, and so learn at once."""
    twin = ("key_norm", "query_norm") if "key_norm" in axes.entries else ("key", "query")
    return replace(axes, entries={**axes.entries, twin[0]: axes.entries[twin[1]]})


def sides(
    fit: Fit,
    axes: AxisMaps,
    place: Place,
    *,
    temperature: float = 1.0,
    embedding_scale: float = 1.0,
    silent: bool = False,
) -> tuple[Side, ...]:
    """The sides of one tensor's widening, in storage order.

    `temperature` multiplies attention scores, `embedding_scale` what the embedding writes: both make up for what
    config.json makes of the new sizes. In a `silent` block, which writes nothing yet, nothing fresh need be zero.
    """
    axes = freed(axes) if silent else axes
    role = place.roles[0] if place.roles else ""
    if role.endswith("_norm"):
        return (Side(_norm(fit, axes, place, role, temperature, embedding_scale)),)
    found = []
    for position, dim in enumerate(place.arrow.dims):
        reads = position in place.arrow.inputs and role not in ("embedding", "positions")
        mapped = _dim(fit, axes, place, dim, temperature)
        if role == "embedding" and dim == ("hidden",) and embedding_scale != 1.0:
            mapped = mapped.scaled(embedding_scale)
        if silent and role in ("output", "down") and isinstance(mapped, AxisMap):
            mapped = mapped.fresh(ZERO if reads else FREE)
        found.append(Side(mapped, reads))
    return tuple(found)


def _dim(fit: Fit, axes: AxisMaps, place: Place, dim: Dim, temperature: float) -> AxisMap | DenseMap:
    if dim == ("hidden",):
        return axes.hidden
    if dim == ("ffn",):
        return axes.ffn
    if dim == ("vocab",):
        return axes.vocab
    if len(place.roles) > 1:  # fused: one after the other in this dim
        return maps.concatenate([_head(fit, axes, role, dim[1:], temperature) for role in place.roles])
    if "kv" in dim:
        return _head(fit, axes, place.roles[0], dim, temperature)
    if len(dim) == 1 and str(dim[0]) in axes.others:
        return axes.others[str(dim[0])]
    raise TltError(f"{place.name}: tlt does not know how to grow the dim '{dim}' of '{place.arrow}'")


def _head(fit: Fit, axes: AxisMaps, role: str, dim: Dim, temperature: float) -> AxisMap:
    """The map of a dim made of heads and their entries, for one role."""
    parts: list[AxisMap] = []
    for position, factor in enumerate(dim):
        if factor == "kv":
            parts.append(axes.heads if role in ("query", "output") else axes.kv)
        elif factor == "group":
            assert dim[position - 1] == "kv", "query heads of one key/value head are consecutive"
        elif isinstance(factor, int):
            parts.append(maps.same(factor))
        else:
            parts.append(axes.entries[role])  # rotary or channel
    mapped = maps.product(parts)
    if role == "query" and temperature != 1.0 and "query_norm" not in fit.family.roles:
        return _rescaled(mapped, temperature)
    return mapped


def _rescaled(mapped: AxisMap, factor: float) -> AxisMap:
    """Multiply what copied entries write; fresh ones keep their weight."""
    return mapped.scaled(np.where(mapped.kind == COPY, factor, 1.0))


def _norm(fit: Fit, axes: AxisMaps, place: Place, role: str, temperature: float, embedding_scale: float) -> AxisMap:
    """The map of a norm's gain or bias: the norm's output must be P times the old output."""
    if role in ("query_norm", "key_norm"):
        entries = _rescaled(axes.entries[role], temperature) if role == "query_norm" else axes.entries[role]
        factors = [maps.same(factor) if isinstance(factor, int) else entries for factor in place.arrow.dims[0]]
        return maps.product(factors)
    hidden = axes.hidden
    assert isinstance(hidden, AxisMap), "a rotation folds its gains and has no map for them"
    read = np.where(hidden.kind == COPY, hidden.read, 0.0)
    # A tied head reads with the embedding's own write, not with P+: the final norm makes up for the difference.
    tied = role == "final_norm" and fit.tied
    reader = hidden.write * embedding_scale if tied else read
    if place.kind == "bias":
        # write * b is read by `read`; a tied reader wants b * read / its own weight
        write = read / np.where(reader > 0, embedding_scale, 1.0) if tied else hidden.write
        return replace(hidden.fresh(ZERO), write=np.where(hidden.kind == COPY, write, 1.0), read=reader)
    write = read / (hidden.write * embedding_scale) if tied else np.ones(hidden.new)
    return replace(
        hidden.fresh(MEAN),
        write=np.where(hidden.kind == COPY, write, 1.0),
        read=np.where(hidden.kind == COPY, hidden.write * reader, 0.0),
    )
