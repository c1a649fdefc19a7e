"""Models that lie side by side in one checkpoint: what config.json's "groups" says of them.

Every tensor of the family is stored once more in front: [K, ...], one slice for each of the K parts, in the family's
own layout. The model computes the weighted mean of the parts' logits; no part reads another, so the whole is
block-diagonal and takes K times the room of one, not K^2. Where parts are of different sizes, "sizes" are those that
all slices are stored at: a smaller part fills its share of every axis and the rest is zero, as is every layer that it
lacks. Nothing reads those zeros, so a slice without them is the part as it was, bit for bit. Parts may store matrices
as factors, each as its own "lowrank" says (`stacked`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlt_cli.checkpoint.strict_json import shortened
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families.factors import KEY as LOWRANK
from tlt_cli.families.factors import LowRank, Stock, dense_config, read_lowrank, read_stock
from tlt_cli.families.family import Family
from tlt_cli.families.glue import Glue, modules, read_glue

KEY, VERSION = "groups", 1
TOLERANCE = 1e-6  # how far from 1 weights may add up to


@dataclass(frozen=True)
class Part:
    """One of the models: what it was called, the digest of the file that it was merged from, its share of the logits.

    `config` are the keys of its config.json that the checkpoint's own does not say, or says otherwise; `lacks` those
    that it does not say at all. `lowrank` says which of its matrices are stored as factors; None where all are plain.
    """

    name: str
    sha256: str
    weight: float
    config: Mapping[str, Any]
    lacks: tuple[str, ...] = ()
    lowrank: LowRank | None = None


@dataclass(frozen=True)
class Groups:
    """The parts in order, and the sizes of the axes that slices are stored at; None where config.json's own are.

    `stock` is what is kept of a stock model of one part's sizes. `glue` stands between the parts, and the modules
    `dense` are one matrix across all of them, for glue was folded into them.
    """

    parts: tuple[Part, ...]
    sizes: Mapping[str, int] | None = None
    stock: Stock = field(default_factory=Stock)
    glue: Glue | None = None
    dense: tuple[str, ...] = ()

    @property
    def joint(self) -> str | None:
        """What makes the parts more than a mean, in words; None where each is still a model by itself."""
        return "folded into one another" if self.dense else None if self.glue is None else "glued together"

    @property
    def factored(self) -> bool:
        """Whether any part stores matrices as factors."""
        return any(part.lowrank is not None for part in self.parts)

    @property
    def weights(self) -> tuple[float, ...]:
        """Each part's share of the logits."""
        return tuple(part.weight for part in self.parts)

    def data(self) -> dict[str, Any]:
        """As config.json says it."""
        return {
            "version": VERSION,
            "count": len(self.parts),
            "weights": list(self.weights),
            **({} if self.sizes is None else {"sizes": dict(self.sizes)}),
            **self.stock.data(),
            **({} if self.glue is None else {"glue": self.glue.data()}),
            **({"dense": list(self.dense)} if self.dense else {}),
            "parts": [
                {
                    "name": part.name,
                    "sha256": part.sha256,
                    **({"config": dict(part.config)} if part.config else {}),
                    **({"lacks": list(part.lacks)} if part.lacks else {}),
                    **({} if part.lowrank is None else {LOWRANK: part.lowrank.data()}),
                }
                for part in self.parts
            ],
        }


def read_groups(config: Mapping[str, Any] | None) -> Groups | None:
    """What config.json says, checked; None where it says nothing. Raises TltError naming the key."""
    given = (config or {}).get(KEY)
    if given is None:
        return None
    _check(isinstance(given, dict), "", "an object", given)
    if given.get("version") != VERSION:
        raise TltError(
            f"config.json: {KEY} has the version {shortened(given.get('version'))}; this tlt reads version {VERSION}"
        )
    listed, weights, count = given.get("parts"), given.get("weights"), given.get("count")
    _check(isinstance(listed, list) and len(listed) > 0, "parts", "a list of at least one part", listed)
    _check(type(count) is int and count == len(listed), "count", f"{len(listed)}, as many as parts are listed", count)
    numbers = isinstance(weights, list) and all(_number(weight) for weight in weights)
    _check(numbers and len(weights) == len(listed), "weights", f"a list of {len(listed)} numbers", weights)
    whole = all(weights) and abs(sum(weights) - 1) <= TOLERANCE
    _check(whole, "weights", "numbers that add up to 1, none of them 0", weights)
    parts = []
    for number, (one, weight) in enumerate(zip(listed, weights, strict=True)):
        _check(isinstance(one, dict), f"parts[{number}]", "an object", one)
        for key in ("name", "sha256"):
            _check(isinstance(one.get(key), str), f"parts[{number}].{key}", "a text", one.get(key))
        own, lacks = one.get("config", {}), one.get("lacks", [])
        _check(isinstance(own, dict), f"parts[{number}].config", "an object", own)
        _check(_names(lacks), f"parts[{number}].lacks", "a list of names", lacks)
        lowrank = read_lowrank(one, f"{KEY}.parts[{number}].{LOWRANK}")
        parts.append(Part(one["name"], one["sha256"], float(weight), own, tuple(lacks), lowrank))
    sizes = given.get("sizes")
    positive = isinstance(sizes, dict) and all(type(size) is int and size > 0 for size in sizes.values())
    _check(sizes is None or positive, "sizes", "an object of whole numbers", sizes)
    stock = read_stock(given, KEY)
    glue, dense = read_glue(given.get("glue"), f"{KEY}.glue"), given.get("dense", [])
    _check(modules(dense), "dense", "a list of modules' names", dense)
    return Groups(tuple(parts), sizes, stock, glue, tuple(dense))


def _check(holds: bool, where: str, wanted: str, found: Any) -> None:
    if not holds:
        name = f"{KEY}.{where}" if where else KEY
        raise TltError(f"config.json: {name} must be {wanted}, not {shortened(found)}")


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def part_config(config: Mapping[str, Any], groups: Groups, number: int) -> dict[str, Any]:
    """The config.json of one part alone, from that of the checkpoint; without what it says of factors."""
    part = groups.parts[number]
    whole = {**dense_config(config, groups.stock), **part.config}
    return {key: value for key, value in whole.items() if key not in part.lacks}


def differences(config: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What of a part's `own` config.json is to be kept beside `config`: keys that differ, and keys that it lacks.

    >>> differences({"a": 1, "b": 2}, {"a": 1.0, "c": 3})
    ({'a': 1.0, 'c': 3}, ('b',))
    """
    changed = {
        key: value for key, value in own.items() if key not in config or json.dumps(config[key]) != json.dumps(value)
    }
    return changed, tuple(key for key in config if key not in own)


def stored_sizes(table: Family, groups: Groups, stated: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the axes that slices are stored at; `stated` are those of config.json."""
    if groups.sizes is None:
        return dict(stated)
    if groups.sizes.keys() != table.axes.keys():
        raise TltError(
            f"config.json: {KEY}.sizes must have the axes {', '.join(table.axes)}, not {', '.join(groups.sizes)}"
        )
    return dict(groups.sizes)


def check_sizes(stored: Mapping[str, int], own: Mapping[str, int], number: int) -> None:
    """Raises TltError where a part is larger than the slices that hold it."""
    for axis, size in own.items():
        if size > stored[axis]:
            raise TltError(
                f"config.json: part {number + 1} of {KEY} says {axis}={size}, but slices hold {axis}={stored[axis]}"
            )


def check_weights(weights: Sequence[float], count: int) -> None:
    """UsageError unless there is a weight for each of `count` models, none is zero and their sum is 1."""
    if len(weights) != count:
        raise UsageError(f"--weights has {len(weights)} numbers for {count} models; give one for each")
    total = sum(weights)
    for weight in weights:
        if weight == 0 or not math.isfinite(weight):
            raise UsageError(f"--weights: {weight:g} gives a model no share; leave that model out")
    if abs(total - 1) > TOLERANCE:
        scaled = "" if total <= 0 else f", such as {','.join(f'{weight / total:.8g}' for weight in weights)}"
        raise UsageError(
            f"--weights add up to {total:g}; those of a mean add up to 1: they are taken as they stand, never scaled. "
            f"Say shares{scaled} (1/3 is understood)"
        )


def refuse_grouped(groups: Groups | None, what: str) -> None:
    """Raises TltError where a checkpoint holds several models and `what` needs one."""
    if groups is not None:
        count = len(groups.parts)
        raise TltError(
            f"this checkpoint is {count} models side by side; {what} needs one model: take each out with "
            f"`tlt slice SRC --block 1/{count}`"
        )


def refuse_joint(groups: Groups | None, what: str) -> None:
    """Raises TltError where the parts are no longer models by themselves and `what` needs them apart."""
    if groups is not None and groups.joint is not None:
        raise TltError(f"the {len(groups.parts)} models of this checkpoint are {groups.joint}; {what} needs them apart")
