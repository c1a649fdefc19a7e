"""Which sizes the grown model will have: the ones asked for, the ones that follow, and why some stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from tlt_cli.errors import TltError
from tlt_cli.families import Family, Fit
from tlt_cli.families.sizes import edit_config
from tlt_cli.model.nested import sizes_of
from tlt_cli.surgery.maps import has_head_slots

_SEARCH = 4096  # sizes tried on either side when the nearest legal ones are looked for


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes asked for; None where the user named none. `heads` counts query heads, `head_dim` one head's entries."""

    dim: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    layers: int | None = None
    vocab: int | None = None

    def named(self) -> dict[str, int]:
        """The sizes that were asked for, under the names of their options."""
        return {field.name: size for field in fields(self) if (size := getattr(self, field.name)) is not None}


@dataclass(frozen=True)
class Targets:
    """The new size of every axis of the table, the config.json that states them, and notes on axes that stayed."""

    sizes: dict[str, int]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def current(fit: Fit) -> dict[str, int]:
    """The checkpoint's sizes under the names of the options."""
    return {**sizes_of(fit), "vocab": fit.sizes["vocab"]}


def axis_sizes(fit: Fit, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes under the names of the options as the sizes of the table's axes."""
    axes = {"vocab": "vocab", "hidden": "dim", "ffn": "ffn", "layer": "layers", "kv": "kv_heads"}
    new = {axis: sizes[axes[axis]] if axis in axes else size for axis, size in fit.sizes.items()}
    if "group" in new:
        new["group"] = sizes["heads"] // sizes["kv_heads"]
    new[fit.family.head_size_axis] = sizes["head_dim"] // 2 if "rotary" in new else sizes["head_dim"]
    return new


def resolve(fit: Fit, wanted: Sizes) -> Targets:
    """All new sizes. A new width takes ffn, heads and key/value heads along wherever their share of it is whole and
    legal; head_dim stays. Raises TltError for sizes the family cannot have, naming the nearest that it can.
    """
    old = current(fit)
    _check_larger(fit, wanted, old)
    problems: list[str] = []
    for candidate in _candidates(fit, wanted, old):
        found = _legal(fit, candidate, problems)
        if found is not None:
            return replace(found, notes=stayed(wanted, old, candidate))
    raise TltError(problems[0] + _nearest(fit, wanted, old))


def _check_larger(fit: Fit, wanted: Sizes, old: dict[str, int]) -> None:
    for name, size in wanted.named().items():
        option = f"--to-{name.replace('_', '-')}"
        if size < old[name]:
            raise TltError(f"{option} {size} is smaller than the model's {old[name]}; grow only makes larger")
    if "group" not in fit.sizes and wanted.kv_heads not in (None, wanted.heads):
        raise TltError(
            f"--to-kv-heads {wanted.kv_heads}: {fit.family.name} has a key/value head for every query head; "
            "say --to-heads alone"
        )
    if wanted.head_dim is not None and "rotary" in fit.sizes and wanted.head_dim % 2:
        raise TltError(f"--to-head-dim {wanted.head_dim} is odd, but positions rotate pairs of entries")


def _candidates(fit: Fit, wanted: Sizes, old: dict[str, int]) -> Iterator[dict[str, int]]:
    """Full sets of sizes, the most proportional first."""
    sizes = {**old, **wanted.named()}
    ratio = Fraction(sizes["dim"], old["dim"])

    def scaled(name: str) -> list[int]:
        share = old[name] * ratio
        return [int(share)] if share.denominator == 1 and ratio > 1 else []

    ffn = [wanted.ffn] if wanted.ffn is not None else [*scaled("ffn"), old["ffn"]]
    heads, kv_heads = [old["heads"]], [old["kv_heads"]]
    if wanted.heads is not None:
        heads = [wanted.heads]
    elif wanted.head_dim is None:
        heads = [*scaled("heads"), old["heads"]]
    elif forced(fit.family):  # heads times head_dim is the width
        heads = [max(old["heads"], sizes["dim"] // wanted.head_dim), old["heads"]]
    if wanted.kv_heads is not None:
        kv_heads = [wanted.kv_heads]
    elif wanted.heads is None and wanted.head_dim is None:
        kv_heads = [*scaled("kv_heads"), old["kv_heads"]]
    for count in heads:
        in_step = kv_heads if count != old["heads"] or wanted.kv_heads is not None else [old["kv_heads"]]
        for kv in in_step if "group" in fit.sizes else [count]:
            for inner in ffn:
                yield {**sizes, "ffn": inner, "heads": count, "kv_heads": kv}


def forced(family: Family) -> bool:
    """Whether head_dim has no key of its own: it is what width and heads make it."""
    expression = family.axes[family.head_size_axis]
    simple = {str(other) for other in family.axes.values() if not other.sign}
    return {str(expression.left), str(expression.right)} <= simple


def _legal(fit: Fit, sizes: dict[str, int], problems: list[str]) -> Targets | None:
    """The targets of one full set of sizes, or None with the reason appended to `problems`."""
    heads, kv, head_dim = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
    old = current(fit)
    what = f"cannot grow {changes(old, sizes)}"
    if forced(fit.family):
        if sizes["dim"] % heads:
            problems.append(f"{what}: a width of {sizes['dim']} does not split into {heads} heads")
            return None
        head_dim = sizes["dim"] // heads
        if head_dim < sizes["head_dim"]:
            width = heads * sizes["head_dim"]
            problems.append(
                f"{what}: {heads} heads of {sizes['head_dim']} entries make a width of {width}, not {sizes['dim']}; "
                f"say --to-dim {width} too"
            )
            return None
    if heads % kv:
        problems.append(f"{what}: {heads} query heads do not split among {kv} key/value heads")
        return None
    group = fit.sizes.get("group", 1)
    if not has_head_slots(fit.kv_heads, group, kv, heads // kv):
        problems.append(
            f"{what}: {kv} key/value heads with {heads // kv} query heads each have no room for the "
            f"{fit.kv_heads} groups of {group} of the model"
        )
        return None
    new = axis_sizes(fit, {**sizes, "head_dim": head_dim})
    try:
        return Targets(new, edit_config(fit.family, fit.config, new))
    except TltError as error:
        problems.append(f"{what}: {error}")
        return None


def changes(old: Mapping[str, int], new: Mapping[str, int]) -> str:
    """What differs between two sets of sizes, in words."""
    parts = [f"{name} from {old[name]} to {new[name]}" for name in old if old[name] != new[name]]
    return " and ".join(parts) or "nothing"


def stayed(wanted: Sizes, old: dict[str, int], new: dict[str, int]) -> tuple[str, ...]:
    """What the user should know of axes that a new width did not take along."""
    if wanted.dim is None or wanted.dim == old["dim"]:
        return ()
    ratio = Fraction(wanted.dim, old["dim"])
    notes = []
    for name in ("ffn", "heads", "kv_heads"):
        share = old[name] * ratio
        if name not in wanted.named() and new[name] == old[name] and wanted.head_dim is None:
            legal = "be legal" if share.denominator == 1 else "be whole"
            notes.append(f"{name} stays {old[name]}: its share of the new width, {float(share):g}, would not {legal}")
    return tuple(notes)


def _nearest(fit: Fit, wanted: Sizes, old: dict[str, int]) -> str:
    """ " (nearest that work: --to-dim 480 or 540)", searching the first named size that has neighbours that work."""
    for name in ("dim", "heads", "kv_heads", "head_dim"):
        size = wanted.named().get(name)
        if size is None:
            continue
        found = []
        for step in (-1, 1):
            for distance in range(1, _SEARCH):
                other = size + step * distance
                if other < old[name]:
                    break
                tried = replace(wanted, **{name: other})
                if other > old[name] and any(_legal(fit, sizes, []) for sizes in _candidates(fit, tried, old)):
                    found.append(other)
                    break
        if found:
            return f" (nearest that work: --to-{name.replace('_', '-')} {' or '.join(map(str, found))})"
    return ""
