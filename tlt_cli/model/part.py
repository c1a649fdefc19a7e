"""A part of a model: which entries of every axis it keeps, and the rules that it runs by.

The part's tensors are the parent's, cut: W' = P_out+ W P_in with maps P that only choose entries. A part is run or
trained inside its parent (`inside`), or written to a file of its own, and both read every tensor through the same
`Cut`. The factors are closed forms (reference: slice and merge, section 3.1):

- norm    "sliced": the part's norms see the entries that it keeps. "masked": they divide as the parent's would if all
          other entries were zero, by d instead of m, which gains times sqrt(d/m) and epsilon times d/m do too.
- rules   "own": rotation, temperature and embedding scale are those of a model of the part's sizes. "parent": they are
          the parent's, written into config.json and weights, so that kept entries compute what they did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tlt_cli.axes import Dim, shape
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place
from tlt_cli.families.factors import refuse_factored
from tlt_cli.families.groups import refuse_grouped
from tlt_cli.families.layers import move_patterns
from tlt_cli.families.place import renamed
from tlt_cli.families.rotation import with_factor, with_power
from tlt_cli.families.sizes import edit_config
from tlt_cli.model.cut import Cut, Index
from tlt_cli.model.decoder import HEAD_NORMS, Decoder
from tlt_cli.model.describe import describe, embedding_scale, softmax_scales


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Kept entries of each axis, in their new order; per kept layer where layers choose for themselves.

    `layers` are the parent's layers. `heads` are query heads, as many for each key/value head of `kv`. `entries` are
    those of a head: rotary pairs where positions rotate. `gains` multiply norms, by role and the parent's layer.
    """

    vocab: Index
    hidden: Index
    layers: tuple[int, ...]
    ffn: tuple[Index, ...]
    kv: tuple[Index, ...]
    heads: tuple[Index, ...]
    entries: Index
    norm: str = "sliced"
    rules: str = "parent"
    gains: Mapping[tuple[str, int | None], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.norm in ("sliced", "masked") and self.rules in ("own", "parent")
        assert len(self.ffn) == len(self.kv) == len(self.heads) == len(self.layers) > 0


def whole(fit: Fit) -> Part:
    """The part that keeps everything."""
    layers = range(fit.sizes["layer"])
    return Part(
        vocab=np.arange(fit.sizes["vocab"]), hidden=np.arange(fit.sizes["hidden"]), layers=tuple(layers),
        ffn=tuple(np.arange(fit.sizes["ffn"]) for _ in layers), kv=tuple(np.arange(fit.kv_heads) for _ in layers),
        heads=tuple(np.arange(fit.heads) for _ in layers), entries=np.arange(fit.sizes[fit.family.head_size_axis]),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Child:
    """A part as a model of its own: its fit (config.json, sizes, places) and the cut of every tensor by name."""

    fit: Fit
    cuts: Mapping[str, Cut]


def child(fit: Fit, part: Part) -> Child:
    """What the part is as a checkpoint. Raises TltError for what the family cannot have or cannot be kept exactly."""
    refuse_factored(fit.lowrank, "slicing")
    refuse_grouped(fit.groups, "slicing by size")
    bare = [place.name for place in fit.places.values() if not place.roles]
    if bare or not fit.family.roles:
        raise TltError(
            f"the {fit.family.name} table does not say what {bare[0] if bare else 'its tensors'} does in the model; "
            "slice needs it: name it in [wiring]"
        )
    describe(fit)  # refuses whatever the decoder could not compute
    sizes = _sizes(fit, part)
    config = edit_config(fit.family, fit.config, sizes)
    if part.layers != tuple(range(fit.sizes["layer"])):
        config = move_patterns(fit, config, part.layers)
    factors = _Factors.of(fit, part)
    if factors.epsilon != 1.0:
        key = fit.family.rules["epsilon"]
        config = {**config, key: float(fit.setting(key)) * factors.epsilon}
    if part.rules == "parent" and len(part.entries) != fit.sizes[fit.family.head_size_axis]:
        config = _rotation(fit, config, part.entries)
    places: dict[str, Place] = {}
    found: list[tuple[str, Place, int | None]] = []
    for place in fit.places.values():
        layers = [None] if place.layer is None else [at for at, old in enumerate(part.layers) if old == place.layer]
        for layer in layers:
            name = place.name if layer is None else renamed(place, layer)
            places[name] = replace(place, name=name, layer=layer)
            found.append((name, place, layer))
    made = replace(fit, config=config, sizes=sizes, places=places, dropped=())
    cuts = {name: _cut(fit, part, made, factors, place, layer) for name, place, layer in found}
    return Child(made, cuts)


def inside(decoder: Decoder, part: Child) -> Decoder:
    """The part run in its parent: a decoder without weights that reads the parent's through the part's cuts.

    Gradients reach the parent's weights, unless it streams too. It makes caches of its own, for generating.
    """

    def fetch(name: str) -> Tensor:
        cut = part.cuts[name]
        return cut.of(decoder.weight(cut.source))

    return Decoder.stream(describe(part.fit), fetch, device=decoder.device, dtype=decoder.dtype)


def _sizes(fit: Fit, part: Part) -> dict[str, int]:
    kv, heads = len(part.kv[0]), len(part.heads[0])
    assert heads % kv == 0, "as many query heads for every key/value head"
    group = fit.sizes.get("group", 1)
    for keys, queries in zip(part.kv, part.heads, strict=True):
        assert np.array_equal(queries.reshape(kv, -1) // group, np.repeat(keys[:, None], heads // kv, 1))
    new = {
        **fit.sizes, "vocab": len(part.vocab), "hidden": len(part.hidden), "layer": len(part.layers),
        "ffn": len(part.ffn[0]), "kv": kv, fit.family.head_size_axis: len(part.entries),
    }  # fmt: skip
    return {**new, "group": heads // kv} if "group" in new else new


@dataclass(frozen=True)
class _Factors:
    """What a part multiplies: epsilon, gains of norms over the stream, and of norms over a head's entries.

    `scores` is by what the inputs of the head's norms are multiplied, so that the one epsilon of config.json is the
    right one for them too: their outputs do not depend on the size of their inputs otherwise.
    """

    epsilon: float
    gain: float
    head_gain: float
    scores: float

    @classmethod
    def of(cls, fit: Fit, part: Part) -> _Factors:
        ratio = fit.sizes["hidden"] / len(part.hidden)
        inner = fit.sizes[fit.family.head_size_axis] / len(part.entries)
        if part.norm == "sliced":
            ratio = inner = 1.0
        elif fit.family.rules["norm"] == "layer" and ratio != 1.0:
            raise TltError(
                f"--norm masked: {fit.family.name}'s norms take off the mean of all entries, which no smaller norm can "
                "do; take --norm sliced"
            )
        return cls(ratio, math.sqrt(ratio), math.sqrt(inner), math.sqrt(ratio / inner))


def _rotation(fit: Fit, config: Mapping[str, Any], pairs: Index) -> dict[str, Any]:
    """config.json under which the kept pairs turn at the parent's frequencies: pair i of P turns at theta^(-i/P)."""
    if "rotary" not in fit.sizes:
        return dict(config)
    old, new = fit.sizes["rotary"], len(pairs)
    steps = np.diff(pairs) if new > 1 else np.array([old // new])
    first, step = int(pairs[0]), int(steps[0])
    even = bool(np.all(steps == step)) and (step == 1 or step * new == old)
    if not even:
        raise TltError(f"rotary pairs {pairs.tolist()} of {old}: keep neighbours, or every {old // max(1, new)}th")
    for rope in describe(fit)["ropes"].values():
        if rope["type"] == "llama3" and step * new != old:
            raise TltError(
                "config.json scales each frequency by its own wavelength; keep whole heads, or every nth pair"
            )
        if rope["type"] != "default" and first:
            raise TltError("config.json scales its rotation already; keep the first rotary pairs, or all of them")
        if "limit" in rope:
            raise TltError(
                "config.json scales its rotation dynamically, which beyond the trained length depends on head_dim; "
                "keep whole heads"
            )
    made = with_factor(fit, config, first / old) if first else dict(config)
    return made if step * new == old else with_power(fit, made, new / old)


def _cut(fit: Fit, part: Part, made: Fit, factors: _Factors, place: Place, layer: int | None) -> Cut:
    """How one tensor of the part comes from the parent's."""
    kept = [_kept(fit, part, place, dim, layer) for dim in place.arrow.dims]
    offset = 0.0
    if place.roles[0].endswith("_norm"):
        multiply = {0: np.full(len(kept[0]), _gain(fit, part, made, factors, place, layer))}
        offset = float(fit.family.rules.get("gain_offset", 0.0)) if place.kind == "weight" else 0.0
    else:
        multiply = _written(fit, part, made, factors, place, layer)
    return Cut(
        source=place.name, shape=tuple(len(index) for index in kept),
        kept=tuple(
            None if np.array_equal(index, np.arange(size)) else index
            for index, size in zip(kept, shape(place.arrow, fit.sizes), strict=True)
        ),
        factors={dim: by for dim, by in multiply.items() if not np.all(by == 1.0)}, offset=offset,
        row=math.prod(shape(place.arrow, fit.sizes)[1:]),
    )  # fmt: skip


def _gain(fit: Fit, part: Part, made: Fit, factors: _Factors, place: Place, layer: int | None) -> float:
    """By what a norm's gain, or its bias, is multiplied: a bias by what the output is, whatever the norm's inputs."""
    role, found = place.roles[0], 1.0
    if place.kind == "weight":
        found = part.gains.get((role, place.layer), 1.0) * (factors.head_gain if role in HEAD_NORMS else factors.gain)
    if role == "query_norm":
        return found * _temperature(fit, part, made, layer)
    return found / (_embedded(fit, part, made) if role == "final_norm" and fit.tied else 1.0)


def _written(
    fit: Fit, part: Part, made: Fit, factors: _Factors, place: Place, layer: int | None
) -> dict[int, NDArray[np.float64]]:
    """By what the rows that a matrix, or a bias, writes are multiplied: {dim: factors}."""
    if place.roles == ("embedding",):
        return {place.arrow.dims.index(("hidden",)): np.full(len(part.hidden), _embedded(fit, part, made))}
    if not {"query", "key"} & set(place.roles):
        return {}
    (at,) = [position for position, dim in enumerate(place.arrow.dims) if "kv" in dim]
    found = []
    for role in place.roles:
        normed = f"{role}_norm" in fit.family.roles
        by = factors.scores if normed else _temperature(fit, part, made, layer) if role == "query" else 1.0
        found.append(np.full(len(_head(fit, part, role, _own(place, place.arrow.dims[at]), layer)), by))
    return {at: np.concatenate(found)}


def _embedded(fit: Fit, part: Part, made: Fit) -> float:
    """By what embeddings are multiplied, so that they enter the stream at the parent's scale."""
    return 1.0 if part.rules == "own" else (embedding_scale(fit) or 1.0) / (embedding_scale(made) or 1.0)


def _temperature(fit: Fit, part: Part, made: Fit, layer: int | None) -> float:
    """By what scores are multiplied, so that they have the parent's temperature."""
    assert layer is not None
    return 1.0 if part.rules == "own" else softmax_scales(fit)[part.layers[layer]] / softmax_scales(made)[layer]


def _kept(fit: Fit, part: Part, place: Place, dim: Dim, layer: int | None) -> Index:
    """The parent's entries of one stored dim."""
    if dim == ("hidden",):
        return part.hidden
    if dim == ("vocab",):
        return part.vocab
    if dim == ("ffn",):
        assert layer is not None
        return part.ffn[layer]
    if "kv" in dim:
        size = shape(place.arrow, fit.sizes)[place.arrow.dims.index(dim)] // len(place.roles)
        own = _own(place, dim)
        pieces = [_head(fit, part, role, own, layer) + at * size for at, role in enumerate(place.roles)]
        return np.concatenate(pieces)
    if dim[-1] in ("rotary", "channel"):  # a norm of a head's entries
        return _head(fit, part, place.roles[0], dim, layer)
    return np.arange(shape(place.arrow, fit.sizes)[place.arrow.dims.index(dim)])


def _own(place: Place, dim: Dim) -> Dim:
    """The factors of a dim that belong to one role: fused roles lie one after the other."""
    return dim[1:] if len(place.roles) > 1 else dim


def _head(fit: Fit, part: Part, role: str, dim: Dim, layer: int | None) -> Index:
    """The parent's entries of a dim made of heads and their entries, for one role."""
    found = np.zeros(1, dtype=np.int64)
    for factor in dim:
        if factor == "group":
            continue  # counted with kv
        if factor == "kv":
            assert layer is not None
            index, size = part.heads[layer] if role in ("query", "output") else part.kv[layer], 0  # outermost
        elif isinstance(factor, int):
            index, size = np.arange(factor), factor
        else:
            index, size = part.entries, fit.sizes[factor]
        found = (found[:, None] * size + index[None]).ravel()
    return found
