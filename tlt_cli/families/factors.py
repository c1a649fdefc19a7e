"""Matrices stored as two factors, and layers with a narrower feed-forward: what config.json's "lowrank" says of them.

A *slot* names one matrix: its module, with ".0", ".1", ... behind it where the module holds several fused. A slot of
rank r is stored as `<slot>.lowrank_a.weight` [r, in] and `<slot>.lowrank_b.weight` [out, r], their product the matrix:
its arrow `out <- in` is split into `out <- rank <- in`. A slot may use another one's `lowrank_a`. Where rows of the
matrix are rows of `lowrank_a` themselves, `lowrank_b` lacks them and `<slot>.lowrank_rows` lists them, ascending.
With "bits" factors are int8, and row i counts in units of entry i of `<slot>.lowrank_a.scale` or `lowrank_b.scale`.
A fused module of which some part is factored is stored as its parts, the dense ones as `<slot>.weight` [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tlt_cli.axes import Arrow, Dim, dim_size
from tlt_cli.checkpoint.strict_json import shortened
from tlt_cli.errors import TltError, nearest
from tlt_cli.families.place import Place, Shapes, match, roles_of
from tlt_cli.families.table import Family

KEY, DESCRIPTION, VERSION = "lowrank", "tlt_description", 1
ROPE_SCALING = "rope_scaling"  # kept under KEY: where transformers knows not the type, reading it fails
MODEL_TYPE = "tlt"  # no type that transformers knows: it must refuse, not take the file for the dense model
RIGHT, LEFT, ROWS = "lowrank_a", "lowrank_b", "lowrank_rows"
SCALE = "scale"
KINDS = (RIGHT, LEFT, ROWS)
BITS = 8  # of the codes that factors may be stored as


@dataclass(frozen=True)
class Stock:
    """What config.json keeps of the stock model that an off-family checkpoint was made of, where it said them."""

    architectures: tuple[str, ...] = ()
    model_type: str | None = None
    rope_scaling: Mapping[str, Any] | None = None

    def data(self) -> dict[str, Any]:
        """As config.json says it."""
        # Not "model_type": transformers takes an object with that key for the whole config of such a model.
        return {
            **({"architectures": list(self.architectures)} if self.architectures else {}),
            **({} if self.model_type is None else {"dense_model_type": self.model_type}),
            **({ROPE_SCALING: dict(self.rope_scaling)} if self.rope_scaling else {}),
        }


def stock_of(config: Mapping[str, Any]) -> Stock:
    """What there is to keep of a stock model's config.json."""
    scaling = config.get(ROPE_SCALING)
    kept = scaling if isinstance(scaling, dict) and scaling else None
    return Stock(tuple(config.get("architectures") or ()), config.get("model_type"), kept)


def read_stock(given: Mapping[str, Any], key: str) -> Stock:
    """What config.json has kept under `key`, checked. Raises TltError naming what is wrong."""
    names, model_type, scaling = given.get("architectures", []), given.get("dense_model_type"), given.get(ROPE_SCALING)
    for where, value, holds, wanted in (
        ("architectures", names, isinstance(names, list) and all(isinstance(name, str) for name in names),
         "a list of names"),
        ("dense_model_type", model_type, model_type is None or isinstance(model_type, str), "a name"),
        (ROPE_SCALING, scaling, scaling is None or isinstance(scaling, dict), "an object"),
    ):  # fmt: skip
        if not holds:
            raise TltError(f"config.json: {key}.{where} must be {wanted}, not {shortened(value)}")
    return Stock(tuple(names), model_type, scaling)


@dataclass(frozen=True)
class LowRank:
    """Ranks by slot; whose right factor a slot shares; which entries of its rank are rows as they are (from, to); the
    size of the feed-forward in layers where it is not the model's; the dense model's `stock`. With `bits` factors are
    codes and scales."""

    ranks: Mapping[str, int]
    shared: Mapping[str, str] = field(default_factory=dict)
    pivoted: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    ffn: Mapping[int, int] = field(default_factory=dict)
    stock: Stock = field(default_factory=Stock)
    bits: int | None = None

    def data(self) -> dict[str, Any]:
        """As config.json says it."""
        return {
            "version": VERSION,
            **self.stock.data(),
            **({} if self.bits is None else {"bits": self.bits}),
            "ranks": dict(self.ranks),
            "shared": dict(self.shared),
            "pivoted": {slot: list(span) for slot, span in self.pivoted.items()},
            "ffn": {str(layer): size for layer, size in self.ffn.items()},
        }


def read_lowrank(config: Mapping[str, Any] | None, where: str = KEY) -> LowRank | None:
    """What config.json says, checked; None where it says nothing. Raises TltError naming the key: `where` is what the
    object `config` has under "lowrank" in all of config.json."""
    given = (config or {}).get(KEY)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise TltError(f"config.json: {where} must be an object, not {shortened(given)}")
    if given.get("version") != VERSION:
        raise TltError(
            f"config.json: {where} has the version {shortened(given.get('version'))}; this tlt reads version {VERSION}"
        )

    def entries(key: str) -> dict[str, Any]:
        value = given.get(key, {})
        if not isinstance(value, dict):
            raise TltError(f"config.json: {where}.{key} must be an object, not {shortened(value)}")
        return value

    def whole(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TltError(f"config.json: {where}.{key} must be a whole number of at least 1, not {shortened(value)}")
        return value

    ranks = {slot: whole(f"ranks.{slot}", rank) for slot, rank in entries("ranks").items()}
    for key in ("shared", "pivoted"):
        for slot in entries(key):
            if slot not in ranks:
                raise TltError(f"config.json: {where}.{key} names {slot}, which has no rank{nearest(slot, ranks)}")
    shared = entries("shared")
    for slot, owner in shared.items():
        if not isinstance(owner, str) or owner not in ranks or owner in shared or ranks[owner] != ranks[slot]:
            raise TltError(
                f"config.json: {where}.shared.{slot} must name a slot of the same rank that has its {RIGHT} to itself, "
                f"not {shortened(owner)}"
            )
    pivoted = {}
    for slot, span in entries("pivoted").items():
        numbers = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        if not numbers or not 0 <= span[0] < span[1] <= ranks[slot]:
            raise TltError(
                f"config.json: {where}.pivoted.{slot} must be two ends within its rank {ranks[slot]}, such as "
                f"[0, {ranks[slot]}], not {shortened(span)}"
            )
        pivoted[slot] = (span[0], span[1])
    ffn = {}
    for layer, size in entries("ffn").items():
        if not layer.isascii() or not layer.isdigit() or str(int(layer)) != layer:
            raise TltError(f"config.json: {where}.ffn must have the numbers of layers as its keys, not {layer!r}")
        ffn[int(layer)] = whole(f"ffn.{layer}", size)
    stock = read_stock(given, where)
    bits = given.get("bits")
    if bits is not None and (type(bits) is not int or bits != BITS):
        raise TltError(f"config.json: {where}.bits must be {BITS}, or not be there, not {shortened(bits)}")
    return LowRank(ranks, dict(shared), pivoted, ffn, stock, bits)


def dense_config(config: Mapping[str, Any], stock: Stock) -> dict[str, Any]:
    """The config with the stock model's own architectures, model_type and rope_scaling, without factors, parts and
    code.

    >>> dense_config({"model_type": "tlt", "vocab_size": 9, "lowrank": {}}, Stock(model_type="llama"))
    {'model_type': 'llama', 'vocab_size': 9}
    """
    own: dict[str, Any] = {"architectures": list(stock.architectures) or None}
    if config.get("model_type") == MODEL_TYPE:
        own["model_type"] = stock.model_type
    if stock.rope_scaling:
        own[ROPE_SCALING] = dict(stock.rope_scaling)
    whole = {**config, **own}
    gone = {KEY, "groups", DESCRIPTION, "auto_map", *(key for key, value in own.items() if value is None)}
    return {key: value for key, value in whole.items() if key not in gone}


@dataclass(frozen=True)
class Slot:
    """One matrix of a family, by its slot's name: the row that it belongs to, and where in it."""

    name: str
    pattern: str
    layer: int | None
    role: str
    part: int | None
    arrow: Arrow

    @property
    def module(self) -> str:
        """The module's name as the file has it."""
        return self.name if self.part is None else self.name.rpartition(".")[0]

    def dims(self) -> tuple[Dim, Dim]:
        """Outputs and inputs of this matrix alone; of a table of embeddings the stored rows and columns."""
        outputs, inputs = (self.arrow.dims[index] for index in (self.arrow.outputs[0], self.arrow.inputs[0]))
        if self.role in ("embedding", "positions") and self.arrow.sign == "->":
            outputs, inputs = inputs, outputs
        return (outputs if self.part is None else outputs[1:]), inputs


def find_slot(table: Family, name: str) -> Slot:
    """The matrix that a slot names. Raises TltError where the family has none of that name."""
    module, _, last = name.rpartition(".")
    candidates: list[tuple[str, int | None]] = [(name, None)]
    if module and last.isascii() and last.isdigit():
        candidates.append((module, int(last)))
    for candidate, part in candidates:
        row = match(table, f"{candidate}.weight")
        if row is None or len(table.rows[row[0]].dims) != 2 or not table.rows[row[0]].sign:
            continue
        roles = roles_of(table, row[0])
        if (part is None and len(roles) == 1) or (part is not None and 1 < len(roles) > part):
            return Slot(name, row[0], row[1], roles[part or 0], part, table.rows[row[0]])
    raise TltError(f"config.json: {KEY} names {name}, but the {table.name} table has no such matrix")


def factor_places(table: Family, lowrank: LowRank) -> dict[str, Place]:
    """The places of all tensors that factored slots are stored as, by name."""
    found: dict[str, Place] = {}
    for name in lowrank.ranks:
        slot = find_slot(table, name)
        outputs, inputs = slot.dims()
        pivoted = name in lowrank.pivoted
        arrows = {LEFT: Arrow((("rest",) if pivoted else outputs, ("rank",)), "<-", 1)}
        if name not in lowrank.shared:
            arrows = {RIGHT: Arrow((("rank",), inputs), "<-", 1), **arrows}
        if pivoted:
            arrows[ROWS] = Arrow((("kept",),), "", 1)
        for kind, arrow in arrows.items():
            tail = kind if kind == ROWS else f"{kind}.weight"
            found[f"{name}.{tail}"] = _place(slot, f"{name}.{tail}", arrow, kind)
            if lowrank.bits is not None and kind != ROWS:
                scale = f"{name}.{kind}.{SCALE}"
                found[scale] = _place(slot, scale, Arrow((arrow.dims[0],), "", 1), SCALE)
        for part in range(len(roles_of(table, slot.pattern)) if slot.part is not None else 0):
            peer = find_slot(table, f"{slot.module}.{part}")
            if peer.name not in lowrank.ranks:
                outputs, inputs = peer.dims()
                weight = f"{peer.name}.weight"
                found[weight] = _place(peer, weight, Arrow((outputs, inputs), "<-", 1), "weight")
    return found


def _place(slot: Slot, name: str, arrow: Arrow, kind: str) -> Place:
    pattern = slot.pattern.removesuffix(".weight") + name.removeprefix(slot.module)
    return Place(name, pattern, arrow, slot.layer, (slot.role,), kind, slot.name, slot.part)


def check_complete(table: Family, shapes: Shapes, wanted: Mapping[str, Place]) -> None:
    """Raises TltError naming the first factor that is missing, or in the file with no rank to it."""
    for name, place in wanted.items():
        if name not in shapes:
            raise TltError(f"{name} is missing: config.json says that {place.slot} is factored or stored apart")
        dense = f"{find_slot(table, place.slot or '').module}.weight"
        if dense in shapes:
            raise TltError(f"{dense} is in the file, but config.json says that {place.slot} is stored as factors")
    for name in shapes:
        if name not in wanted and is_factor(name):
            raise TltError(f"{name} is in the file, but config.json's {KEY} has no such factor{nearest(name, wanted)}")


def is_factor(name: str) -> bool:
    """Whether a tensor's name is that of a factor."""
    return any(name.endswith((f".{kind}.weight", f".{kind}.{SCALE}", f".{kind}")) for kind in KINDS)


def own_sizes(sizes: Mapping[str, int], table: Family, lowrank: LowRank, place: Place) -> dict[str, int]:
    """The sizes of the axes as they are for this tensor: its layer's feed-forward, its slot's rank."""
    own = _in_layer(sizes, lowrank, place.layer)
    if place.slot is not None and place.slot in lowrank.ranks:
        start, stop = lowrank.pivoted.get(place.slot, (0, 0))
        outputs, _ = find_slot(table, place.slot).dims()
        rest = dim_size(outputs, own) - (stop - start)
        own |= {"rank": lowrank.ranks[place.slot], "kept": stop - start, "rest": rest}
    return own


def _in_layer(sizes: Mapping[str, int], lowrank: LowRank, layer: int | None) -> dict[str, int]:
    own = {} if layer is None or layer not in lowrank.ffn else {"ffn": lowrank.ffn[layer]}
    return {**sizes, **own}


def slot_shape(sizes: Mapping[str, int], table: Family, lowrank: LowRank, slot: Slot) -> tuple[int, int]:
    """Rows and columns of a slot's matrix."""
    own = _in_layer(sizes, lowrank, slot.layer)
    outputs, inputs = slot.dims()
    return dim_size(outputs, own), dim_size(inputs, own)


def check_ranks(sizes: Mapping[str, int], table: Family, lowrank: LowRank) -> None:
    """Raises TltError for ranks, pivots and layers that the matrices cannot have, before shapes are compared."""
    for layer, size in lowrank.ffn.items():
        if layer >= sizes["layer"] or size > sizes["ffn"]:
            raise TltError(
                f"config.json: {KEY}.ffn says {size} for layer {layer}; the model has {sizes['layer']} layers of "
                f"{sizes['ffn']}"
            )
    for name, rank in lowrank.ranks.items():
        slot = find_slot(table, name)
        if slot.layer is not None and slot.layer >= sizes["layer"]:
            raise TltError(f"config.json: {KEY} names {name}, but the model has {sizes['layer']} layers")
        rows, columns = slot_shape(sizes, table, lowrank, slot)
        start, stop = lowrank.pivoted.get(name, (0, 0))
        if rank > columns or stop - start > rows or (stop and slot.layer is None):
            raise TltError(
                f"config.json: {KEY} gives {name} the rank {rank}"
                + (f" with {stop - start} rows kept" if stop else "")
                + f", but it is {rows} x {columns}"
            )
        owner = lowrank.shared.get(name)
        if owner is not None:
            width = slot_shape(sizes, table, lowrank, find_slot(table, owner))[1]
            if width != columns:
                raise TltError(f"config.json: {KEY}.shared.{name} reads {columns} entries, but {owner} reads {width}")


def parameters_of(rows: int, columns: int, rank: int, kept: int = 0, *, shares: bool = False) -> int:
    """Numbers that a factored matrix is stored as; the row numbers of pivots are not counted.

    >>> parameters_of(100, 60, 10), parameters_of(100, 60, 10, kept=10)
    (1600, 1500)
    """
    return math.prod((rows - kept, rank)) + (0 if shares else rank * columns)


def refuse_factored(lowrank: LowRank | None, what: str) -> None:
    """Raises TltError where a checkpoint holds factors and `what` needs plain matrices."""
    if lowrank is not None:
        raise TltError(f"this checkpoint holds low-rank factors; {what} needs plain matrices: `tlt fold SRC` first")
