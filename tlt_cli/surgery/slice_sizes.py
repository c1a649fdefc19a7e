"""Which sizes a sliced model will have: those asked for, what follows from a new width, or what a budget allows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from math import prod

from tlt_cli.axes import Arrow, shape
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.families.sizes import edit_config
from tlt_cli.model.nested import legal_heads, option
from tlt_cli.surgery.targets import Sizes, axis_sizes, changes, current, forced, stayed

_SEARCH = 4096  # sizes tried on either side when the nearest legal ones are looked for


def smaller(fit: Fit, wanted: Sizes) -> tuple[dict[str, int], tuple[str, ...]]:
    """All sizes under the names of the options, and notes on what stayed. A smaller width takes ffn, heads and
    key/value heads along wherever their share of it is whole and legal; head_dim stays.

    Raises TltError for sizes the family cannot have, naming the nearest that it can.
    """
    old = current(fit)
    for name, size in wanted.named().items():
        if not 1 <= size <= old[name]:
            raise TltError(f"{option(name)} {size}: the model has {old[name]}; say a size from 1 to {old[name]}")
    if "group" not in fit.sizes and wanted.kv_heads not in (None, wanted.heads):
        raise TltError(
            f"--kv-heads {wanted.kv_heads}: {fit.family.name} has a key/value head for every query head; "
            "say --heads alone"
        )
    problems: list[str] = []
    for candidate in _candidates(fit, wanted, old):
        problem = why_not(fit, candidate)
        if problem is None:
            return candidate, stayed(wanted, old, candidate)
        problems.append(problem)
    raise TltError(problems[0] + _nearest(fit, wanted, old))


def _candidates(fit: Fit, wanted: Sizes, old: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Full sets of sizes, the most proportional first."""
    sizes = {**old, **wanted.named()}
    ratio = Fraction(sizes["dim"], old["dim"])
    ffn = [sizes["ffn"]]
    if wanted.ffn is None and (share := old["ffn"] * ratio).denominator == 1:
        ffn.insert(0, int(share))
    for heads, kv in _heads(fit, wanted, old, ratio):
        head_dim = sizes["head_dim"]
        if forced(fit.family) and sizes["dim"] % heads == 0:
            head_dim = sizes["dim"] // heads
        for inner in dict.fromkeys(ffn):
            yield {**sizes, "ffn": inner, "heads": heads, "kv_heads": kv, "head_dim": head_dim}


def _heads(fit: Fit, wanted: Sizes, old: Mapping[str, int], ratio: Fraction) -> list[tuple[int, int]]:
    """Query and key/value heads to try: whole groups where that is possible, else as many of each group."""
    group, kv = old["heads"] // old["kv_heads"], old["kv_heads"]
    if "group" not in fit.sizes:
        if wanted.heads is not None:
            counts = [wanted.heads]
        elif wanted.head_dim is not None:  # heads times head_dim may be the width
            counts = [max(1, int(old["dim"] * ratio) // wanted.head_dim) if forced(fit.family) else old["heads"]]
        else:
            share = old["heads"] * ratio
            counts = [*([int(share)] if share.denominator == 1 else []), old["heads"]]
        return [(count, count) for count in counts]
    if wanted.heads is not None and wanted.kv_heads is not None:
        return [(wanted.heads, wanted.kv_heads)]
    if wanted.heads is not None:
        whole_groups = [(wanted.heads, wanted.heads // group)] if wanted.heads % group == 0 else []
        return [*whole_groups, (wanted.heads, kv)]
    if wanted.kv_heads is not None:
        return [(wanted.kv_heads * group, wanted.kv_heads)]
    share, kv_share = old["heads"] * ratio, kv * ratio
    found_pairs = []
    if wanted.head_dim is None and share.denominator == 1:
        found_pairs += [(int(share), int(kv_share))] if kv_share.denominator == 1 else []
        found_pairs.append((int(share), kv))
    return [*found_pairs, (old["heads"], kv)]


def why_not(fit: Fit, sizes: Mapping[str, int]) -> str | None:
    """Which law these sizes break, or None where they are legal."""
    old = current(fit)
    heads, kv, head_dim = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
    what = f"cannot slice {changes(old, sizes)}"
    group = old["heads"] // old["kv_heads"]
    if heads % kv or heads // kv > group:
        return (
            f"{what}: {heads} query heads for {kv} key/value heads; every key/value head must keep as many query "
            f"heads, at most its {group}, or queries would read another head's keys (GQA); legal: --heads "
            f"{', '.join(map(str, legal_heads(fit, old['kv_heads'])))}"
        )
    if head_dim > old["head_dim"] or heads > old["heads"]:
        heads, head_dim = min(heads, old["heads"]), min(head_dim, old["head_dim"])
        return (
            f"{what}: {heads} heads of {head_dim} entries make a width of {heads * head_dim}, not {sizes['dim']}; "
            f"say --dim {heads * head_dim} too"
        )
    if forced(fit.family) and heads * head_dim != sizes["dim"]:
        return f"{what}: a width of {sizes['dim']} does not split into {heads} heads"
    if "rotary" in fit.sizes and head_dim % 2:
        return f"{what}: positions rotate pairs of entries, and {head_dim} is odd"
    try:
        edit_config(fit.family, fit.config, axis_sizes(fit, sizes))
    except TltError as error:
        return f"{what}: {error}"
    return None


def _nearest(fit: Fit, wanted: Sizes, old: Mapping[str, int]) -> str:
    """ " (nearest that work: --dim 24 or 28)", searching the first named size that has neighbours that work."""
    for name in ("dim", "heads", "kv_heads", "head_dim"):
        size, found = wanted.named().get(name), []
        for step in (-1, 1) if size is not None else ():
            for distance in range(1, _SEARCH):
                assert size is not None
                other = size + step * distance
                if not 1 <= other <= old[name]:
                    break
                tried = replace(wanted, **{name: other})
                if other < old[name] and any(why_not(fit, sizes) is None for sizes in _candidates(fit, tried, old)):
                    found.append(other)
                    break
        if found:
            return f" (nearest that work: {option(name)} {' or '.join(map(str, found))})"
    return ""


# --- a budget ----------------------------------------------------------------------------------------------------


def budget_of(fit: Fit, text: str) -> int:
    """--size as a number of parameters: "1/4" or "0.25" of the model's, or "160000" of them."""
    total = parameters(fit, fit.sizes)
    try:
        share = Fraction(text.replace("_", "").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"--size {text}: expected a share such as 1/4, or a number of parameters such as 160000"
        ) from None
    count = int(share * total) if share < 1 else int(share)
    if not 1 <= count < total:
        raise TltError(f"--size {text}: the model has {total:,} parameters; say a share below 1, or fewer of them")
    return count


def parameters(fit: Fit, sizes: Mapping[str, int]) -> int:
    """Stored parameters at these sizes of the axes."""
    rows: dict[str, tuple[Arrow, bool]] = {
        place.pattern: (place.arrow, place.layer is not None) for place in fit.places.values()
    }
    return sum(prod(shape(arrow, sizes)) * (sizes["layer"] if layered else 1) for arrow, layered in rows.values())


def within(fit: Fit, budget: int, wanted: Sizes) -> dict[str, int]:
    """The largest legal model of at most `budget` parameters whose stream, feed-forward and groups of heads keep their
    proportion as nearly as whole numbers can; sizes that are named stay as named.

    Raises TltError where even the smallest is larger.
    """
    old = current(fit)
    if wanted.dim is not None:
        raise UsageError("--size finds the width, and --dim says it; take one of the two")
    sizes, group = {**old, **wanted.named()}, old["heads"] // old["kv_heads"]
    named = _heads(fit, wanted, old, Fraction(1)) if wanted.heads or wanted.kv_heads else None

    def at(dim: int, heads: int, kv: int) -> dict[str, int]:
        ffn = wanted.ffn or max(1, old["ffn"] * dim // old["dim"])
        head_dim = max(1, dim // heads) if forced(fit.family) else sizes["head_dim"]
        return {**sizes, "dim": dim, "ffn": ffn, "heads": heads, "kv_heads": kv, "head_dim": head_dim}

    def count(tried: Mapping[str, int]) -> int:
        return parameters(fit, axis_sizes(fit, tried))

    fewest = min(named) if named else (group, 1)
    widest = bisect_right(range(1, old["dim"] + 1), budget, key=lambda dim: count(at(dim, *fewest)))
    for dim in range(widest, 0, -1):
        most = max(1, old["kv_heads"] * dim // old["dim"])
        for heads, kv in named or [(kv * group, kv) for kv in range(most, 0, -1)]:
            tried = at(dim, heads, kv)
            if heads % kv == 0 and count(tried) <= budget and why_not(fit, tried) is None:
                return tried
    smallest = count(at(1, *fewest))
    raise TltError(
        f"no model of at most {budget:,} parameters keeps these proportions; the narrowest has {smallest:,}: "
        "allow more, or name sizes of your own, such as --layers"
    )
