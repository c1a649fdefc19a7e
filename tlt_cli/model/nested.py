"""Which parts a model holds: dolls that share their first entries, or blocks on the diagonal, each holding more again.

config.json says which it was trained with, in keys of tlt's own that other readers pass over:

    "nested":  {"norm": "sliced", "levels": [{"dim": 64, "ffn": 192, "heads": 4, "kv_heads": 2, ...}, ...]}
    "fractal": {"norm": "sliced", "levels": 3, "split": 4}

Level 0 is the whole model. Level l of a fractal model is split^l blocks side by side (Matryoshka representations,
arXiv:2205.13147; MatFormer, arXiv:2310.07707, nests the feed-forward alone). Blocks are counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.model.cut import Index
from tlt_cli.model.part import Part, whole

SIZES = ("dim", "ffn", "heads", "kv_heads", "head_dim", "layers")
NESTED, FRACTAL, PREFIXES = "nested", "fractal", "prefixes"  # keys of config.json
_MOST = 4096  # blocks of one level


@dataclass(frozen=True, eq=False)
class Level:
    """One part of a model: its level, and its number (from 1) among the blocks of that level."""

    level: int
    block: int
    blocks: int
    part: Part

    @property
    def name(self) -> str:
        """ "1", or "2:3/16" for block 3 of the 16 of level 2."""
        return str(self.level) if self.blocks == 1 else f"{self.level}:{self.block}/{self.blocks}"


def sizes_of(fit: Fit) -> dict[str, int]:
    """A model's sizes under the names of the options."""
    return {
        "dim": fit.sizes["hidden"], "ffn": fit.sizes["ffn"], "heads": fit.heads, "kv_heads": fit.kv_heads,
        "head_dim": fit.head_dim, "layers": fit.sizes["layer"],
    }  # fmt: skip


def option(name: str) -> str:
    """A size under the name of its option: kv_heads is --kv-heads."""
    return f"--{name.replace('_', '-')}"


def prefix(fit: Fit, sizes: Mapping[str, int], *, norm: str = "sliced", rules: str = "parent") -> Part:
    """The first entries of every axis, `sizes` of them (SIZES; what is not named stays whole).

    Where key/value heads stay, the first query heads of each group; where head_dim shrinks under the parent's rules,
    every nth rotary pair if that comes out whole, so that slow frequencies stay. Raises TltError for sizes that the
    model does not have, or that cut groups of query heads apart.
    """
    own = sizes_of(fit)
    wanted = {**own, **sizes}
    for name, size in wanted.items():
        if not 1 <= size <= own[name]:
            raise TltError(f"{option(name)} {size}: the model has {own[name]}; say a size from 1 to {own[name]}")
    layers = tuple(range(wanted["layers"]))
    kv, heads = wanted["kv_heads"], wanted["heads"]
    group = fit.heads // fit.kv_heads
    if heads % kv or heads // kv > group:
        raise TltError(
            f"{heads} query heads for {kv} key/value heads: every key/value head must keep as many query heads, at "
            f"most its {group}, or else queries would read another head's keys (GQA); legal with whole groups, or with "
            f"--kv-heads {kv}: {', '.join(map(str, legal_heads(fit, kv)))}"
        )
    queries = (np.arange(kv)[:, None] * group + np.arange(heads // kv)[None]).ravel()
    return replace(
        whole(fit), hidden=np.arange(wanted["dim"]), layers=layers, ffn=(np.arange(wanted["ffn"]),) * len(layers),
        kv=(np.arange(kv),) * len(layers), heads=(queries,) * len(layers),
        entries=_entries(fit, wanted["head_dim"], strided=rules == "parent"), norm=norm, rules=rules,
    )  # fmt: skip


def legal_heads(fit: Fit, kv: int) -> list[int]:
    """How many query heads a part can keep: whole groups, or as many of each group beside `kv` key/value heads."""
    group = fit.heads // fit.kv_heads
    return sorted(
        {*(each * group for each in range(1, fit.kv_heads + 1)), *(kv * each for each in range(1, group + 1))}
    )


def block(
    fit: Fit, number: int, count: int, *, split: int | None = None, norm: str = "sliced", rules: str = "parent"
) -> Part:
    """Block `number`, from 1, of the `count` on the diagonal: that share of the stream, of neurons, and of heads.

    Where key/value heads do not suffice for all blocks, heads are shared out first and then each head's entries. With
    `split` the blocks lie inside one another, each of `split` smaller ones, and share in that order.
    Raises TltError, with the counts that work, where an axis does not split.
    """
    if not 1 <= number <= count:
        raise TltError(f"--block {number}/{count}: blocks are counted from 1 to {count}")
    if not splits(fit, count):
        legal = [str(n) for n in range(2, fit.sizes["hidden"] + 1) if splits(fit, n)]
        raise TltError(
            f"--block {number}/{count}: dim {fit.sizes['hidden']}, ffn {fit.sizes['ffn']} and {fit.kv_heads} key/value "
            f"heads of {fit.head_dim} entries do not all split into {count} blocks; these work: "
            f"{', '.join(legal) or 'none'}"
        )
    at, group, every = number - 1, fit.heads // fit.kv_heads, whole(fit)
    kv, entries, left, rest, size = np.arange(fit.kv_heads), every.entries, count, at, split or count
    while left > 1:  # into the block that holds the one looked for, and on inside it
        left //= size
        own, rest = divmod(rest, left)
        among = math.gcd(size, len(kv))
        inner = size // among
        kv, entries = _share(kv, own // inner, among), _share(entries, own % inner, inner)
    heads = (kv[:, None] * group + np.arange(group)[None]).ravel()
    layers = len(every.layers)
    return replace(
        every, hidden=_share(every.hidden, at, count), ffn=(_share(every.ffn[0], at, count),) * layers,
        kv=(kv,) * layers, heads=(heads,) * layers, entries=entries, norm=norm, rules=rules,
    )  # fmt: skip


def splits(fit: Fit, count: int) -> bool:
    """Whether every axis splits into this many blocks."""
    inner = count // math.gcd(count, fit.kv_heads)
    return fit.sizes["hidden"] % count == fit.sizes["ffn"] % count == fit.sizes[fit.family.head_size_axis] % inner == 0


def shrunk(fit: Fit, share: Fraction, *, heads: int | None = None, layers: int | None = None) -> dict[str, int]:
    """The sizes of a model of `share` of the width: stream, feed-forward, and as few key/value heads with their groups
    as hold their share of entries; `heads` and `layers` are taken as given.

    Raises TltError for a share that leaves no whole sizes.
    """
    own = sizes_of(fit)
    group, pair = own["heads"] // own["kv_heads"], 2 if "rotary" in fit.sizes else 1
    found = {name: own[name] * share for name in ("dim", "ffn")}
    if heads is None:
        entries = own["kv_heads"] * own["head_dim"] * share
        for kv in range(1, own["kv_heads"] + 1):
            if (entries / kv).denominator == 1 and entries / kv <= own["head_dim"] and (entries / kv) % pair == 0:
                found |= {"kv_heads": Fraction(kv), "heads": Fraction(kv * group), "head_dim": entries / kv}
                break
        else:
            found["head_dim"] = entries / own["kv_heads"]
    else:
        kv = min(heads, own["kv_heads"]) if heads % group else heads // group
        found |= {"heads": Fraction(heads), "kv_heads": Fraction(kv)}
    broken = [name for name, size in found.items() if size.denominator != 1 or size < 1]
    if broken or found.get("head_dim", Fraction(pair)) % pair:
        name = broken[0] if broken else "head_dim"
        raise TltError(
            f"a level of {share} of the width would have {option(name)[2:]} {float(found[name]):g}; take shares that "
            f"leave whole sizes of dim {own['dim']} and ffn {own['ffn']}, and whole "
            f"{'rotary pairs' if pair > 1 else 'entries'} of {own['kv_heads']} key/value heads of {own['head_dim']}"
        )
    return {**own, **{name: int(size) for name, size in found.items()}, "layers": layers or own["layers"]}


def levels(fit: Fit) -> tuple[Level, ...]:
    """All parts that config.json says the model was trained with, the whole first; only that where it says nothing.

    Raises TltError for entries that are none, or that do not fit the model's sizes.
    """
    found = [Level(0, 1, 1, whole(fit))]
    nested, fractal = fit.config.get(NESTED), fit.config.get(FRACTAL)
    if nested is not None:
        for at, sizes in enumerate(_listed(nested), start=1):
            found.append(Level(at, 1, 1, prefix(fit, sizes, norm=str(nested.get("norm")), rules="own")))
    elif fractal is not None:
        depth, split = fractal_shape(fractal)
        for at in range(1, depth):
            count = split**at
            found += [
                Level(at, number, count, block(fit, number, count, split=split, norm="sliced", rules="own"))
                for number in range(1, count + 1)
            ]
    return tuple(found)


def level_at(fit: Fit, level: int | None, chosen: tuple[int, int] | None) -> Level:
    """The part that `--level` and `--block K/N` name. Raises TltError, naming those there are, where there is none."""
    known = levels(fit)
    fitting = [
        each for each in known
        if (level is None or each.level == level) and (chosen is None or (each.block, each.blocks) == chosen)
    ]  # fmt: skip
    if len(fitting) == 1:
        return fitting[0]
    asked = " ".join(
        [
            *([f"--level {level}"] if level is not None else []),
            *([f"--block {chosen[0]}/{chosen[1]}"] if chosen else []),
        ]
    )
    if len(known) == 1:
        raise TltError(f"{asked}: config.json names no levels (nested or fractal); cut by sizes, or by --block alone")
    if len(fitting) > 1:
        raise TltError(f"{asked} has {fitting[0].blocks} blocks; choose one with --block 1/{fitting[0].blocks}")
    there = sorted({(each.level, each.blocks) for each in known})
    said = ", ".join(f"--level {at}" + (f" --block 1/{n} to {n}/{n}" if n > 1 else "") for at, n in there)
    raise TltError(f"{asked}: the model has no such part; it has {said}")


def block_part(fit: Fit, number: int, count: int, *, norm: str = "sliced") -> Level:
    """The part that `--block K/N` alone names: a block that the model was trained with, or else, where config.json
    names no levels, one of the N on the diagonal, run by the whole's rules."""
    if NESTED in fit.config or FRACTAL in fit.config:
        return level_at(fit, None, (number, count))
    return Level(1, number, count, block(fit, number, count, norm=norm))


def parse_block(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). Raises UsageError for what is no block, counted from 1.

    >>> parse_block("3/16")
    (3, 16)
    """
    number, sign, count = text.partition("/")
    whole = [word.strip() for word in (number, count)]
    if not sign or not all(word.isascii() and word.isdigit() for word in whole):
        raise UsageError(f"--block {text}: expected a block and how many there are, counted from 1, such as 2/4")
    found = int(whole[0]), int(whole[1])
    if not 1 <= found[0] <= found[1]:
        raise UsageError(f"--block {text}: blocks are counted from 1 to {max(1, found[1])}")
    return found


def without_levels(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that names no parts."""
    return {key: value for key, value in config.items() if key not in (NESTED, FRACTAL)}


def stated(levels: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """What config.json says under "nested"."""
    return {"norm": "sliced", "levels": [{name: level[name] for name in SIZES} for level in levels]}


def fractal_shape(stated: Any) -> tuple[int, int]:
    """Levels, the whole among them, and into how many each splits."""
    depth, split = (stated.get(key) if isinstance(stated, dict) else None for key in ("levels", "split"))
    sound = all(isinstance(value, int) and not isinstance(value, bool) for value in (depth, split))
    if sound:
        assert isinstance(depth, int) and isinstance(split, int)
        if depth >= 1 and split >= 2 and split ** (depth - 1) <= _MOST and stated.get("norm") == "sliced":
            return depth, split
    raise TltError(
        f'config.json: "fractal" is {stated!r}; expected levels of at least 1, split of at least 2, norm "sliced"'
    )


def _listed(stated: Any) -> list[dict[str, int]]:
    listed = stated.get("levels") if isinstance(stated, dict) and stated.get("norm") in ("sliced", "masked") else None
    sound = isinstance(listed, list) and all(
        isinstance(level, dict)
        and set(level) <= set(SIZES)
        and all(isinstance(size, int) and not isinstance(size, bool) for size in level.values())
        for level in listed
    )
    if not sound:
        raise TltError(f'config.json: "nested" must have a norm and a list of levels of {", ".join(SIZES)}')
    assert isinstance(listed, list)
    return listed


def _entries(fit: Fit, head_dim: int, *, strided: bool) -> Index:
    """Which entries of a head the first `head_dim` are: rotary pairs, where positions rotate."""
    size = fit.sizes[fit.family.head_size_axis]
    if "rotary" not in fit.sizes:
        return np.arange(head_dim)
    if head_dim % 2:
        raise TltError(f"--head-dim {head_dim} is odd, but positions rotate pairs of entries")
    pairs = head_dim // 2
    return np.arange(pairs) * (size // pairs) if strided and size % pairs == 0 else np.arange(pairs)


def _share(entries: Index, at: int, count: int) -> Index:
    size = len(entries) // count
    return entries[at * size : (at + 1) * size]
