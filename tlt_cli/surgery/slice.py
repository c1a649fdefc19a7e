"""Slicing: a part of a model as a checkpoint of its own. A fitted header and a part in, a Plan out.

Every tensor becomes W' = P_out+ W P_in with maps that choose entries: growing, backwards. What is kept and by which
rules it runs is a Part (model/part.py); where nothing is multiplied, the written entries are the stored ones, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tlt_cli.checkpoint.planned import PlannedTensor, Rows
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.families import fit as fit_to
from tlt_cli.model.cut import Cut
from tlt_cli.model.decoder import HEAD_NORMS
from tlt_cli.model.nested import (
    FRACTAL,
    NESTED,
    PREFIXES,
    SIZES,
    Level,
    block_part,
    fractal_shape,
    level_at,
    levels,
    prefix,
    sizes_of,
)
from tlt_cli.model.part import Child, Part, child
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.slice_sizes import budget_of, parameters, smaller, within
from tlt_cli.surgery.targets import Sizes, axis_sizes, current

NORMS = ("sliced", "masked")
ORDERS = ("prefix", "importance", "pca")
SLICED = "sliced"  # key of config.json


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to keep, as asked for: sizes, a budget of parameters, or a level and block; and by which norm."""

    sizes: Sizes = field(default_factory=Sizes)
    size: str | None = None
    level: int | None = None
    block: tuple[int, int] | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        if self.norm not in (None, *NORMS):
            raise UsageError(f"--norm {self.norm} is not known; take one of {', '.join(NORMS)}")
        inner = self.level is not None or self.block is not None
        if inner and (self.size is not None or self.sizes.named()):
            raise UsageError("--level and --block name a part whole; take them, or sizes, and slice twice for both")
        if not inner and self.size is None and not self.sizes.named():
            raise UsageError("nothing to slice: say at least one of --dim, --ffn, --heads, --kv-heads, --head-dim, "
                             "--layers, --vocab, --size, --level, --block")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Chosen:
    """The part that follows, the level it is where it is one, and what to say."""

    part: Part
    level: Level | None = None
    notes: tuple[str, ...] = ()


def chosen(fit: Fit, wanted: Wanted) -> Chosen:
    """The part asked for. Raises TltError for what the family cannot have or the model does not hold."""
    if wanted.level is not None:
        return _of_level(level_at(fit, wanted.level, wanted.block), wanted.norm)
    if wanted.block is not None:
        level = block_part(fit, *wanted.block, norm=wanted.norm or "sliced")
        found, trained = _of_level(level, wanted.norm), level.part.rules == "own"
        return replace(found, notes=_convention(fit, level.part.norm, trained=trained))
    if wanted.size is not None and (NESTED in fit.config or FRACTAL in fit.config) and not wanted.sizes.named():
        inner = _largest_level(fit, budget_of(fit, wanted.size))
        if inner is not None:
            return _of_level(inner, wanted.norm)
    sizes, notes = wanted_sizes(fit, wanted)
    return of_sizes(fit, sizes, wanted.norm, notes)


def wanted_sizes(fit: Fit, wanted: Wanted) -> tuple[dict[str, int], tuple[str, ...]]:
    """All sizes that follow from those named and from a budget, and notes on them. Raises TltError where none do."""
    if wanted.size is None:
        sizes, notes = smaller(fit, wanted.sizes)
    else:
        budget = budget_of(fit, wanted.size)
        sizes = within(fit, budget, wanted.sizes)
        notes = (f"{parameters(fit, axis_sizes(fit, sizes)):,} of the {budget:,} parameters that --size allows",)
    if sizes == current(fit):
        raise TltError("nothing to slice: the model already has the sizes asked for")
    return sizes, notes


def of_sizes(fit: Fit, sizes: Mapping[str, int], norm: str | None, notes: tuple[str, ...] = ()) -> Chosen:
    """The first entries of every axis, at full sizes; as a level runs, where a level of the model has these sizes."""
    inner = {name: sizes[name] for name in SIZES}
    if sizes["vocab"] == fit.sizes["vocab"]:
        for level in levels(fit)[1:]:
            if level.blocks == 1 and _part_sizes(fit, level.part) == inner and norm in (None, level.part.norm):
                return _of_level(level, norm)
    stated = fit.config.get(NESTED)
    trained = isinstance(stated, dict) and stated.get("norm") in NORMS
    rule = norm or (str(stated["norm"]) if isinstance(stated, dict) and trained else "sliced")
    part = prefix(fit, inner, norm=rule)
    changes = sizes["dim"] < fit.sizes["hidden"] or (sizes["head_dim"] < fit.head_dim and _head_norms(fit))
    notes += _convention(fit, rule, trained=trained) if changes else ()
    if sizes["vocab"] < fit.sizes["vocab"]:
        part = replace(part, vocab=np.arange(sizes["vocab"]))
        notes += (f"the first {sizes['vocab']} tokens are kept; the tokenizer is copied as it is and knows more",)
    return Chosen(part, notes=notes)


def sliced(
    fit: Fit,
    dtypes: Mapping[str, str],
    found: Chosen,
    *,
    tensors: tuple[PlannedTensor, ...] | None = None,
    config: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> tuple[Child, Plan]:
    """The part as a model and the Plan of its checkpoint. `dtypes` are the stored ones by name; they are kept.

    `tensors`, `config` and `details` take the place of, or add to, what cutting alone gives: for values that were
    calibrated.
    """
    part, level = found.part, found.level
    made = child(fit, part)
    inner = {} if tensors is not None else _inner(fit, found)  # weights that moved are no longer the levels' own
    stated = {**made.fit.config, **(config or {})}
    whole = {key: value for key, value in stated.items() if key not in (NESTED, FRACTAL, PREFIXES)}
    whole |= {**inner, SLICED: {"norm": part.norm, "rules": part.rules}}
    planned = tuple(planned_cut(name, cut, dtypes[cut.source]) for name, cut in made.cuts.items())
    made = replace(made, fit=replace(made.fit, config=whole))
    if tensors is not None:  # a rotation unties head and embedding
        made = replace(made, fit=fit_to({one.name: one.shape for one in tensors}, whole, family=fit.family))
    plan = Plan(
        operation="slice",
        tensors=planned if tensors is None else tensors,
        config=whole,
        exact=False,
        details={
            "family": fit.family.name, "from": current(fit), "to": current(made.fit), "norm": part.norm,
            "rules": part.rules, "order": "prefix",
            "level": None if level is None or part.rules == "parent" else level.level,  # a block of none is no level
            "block": None if level is None or level.blocks == 1 else f"{level.block}/{level.blocks}",
            "layers": list(part.layers),
            "config": {key: value for key, value in whole.items() if fit.config.get(key) != value},
            **(details or {}),
        },
        notes=found.notes,
    )  # fmt: skip
    return made, plan


def planned_cut(name: str, cut: Cut, dtype: str) -> PlannedTensor:
    """One tensor of a part: copied where its rows are the parent's as they stand, else computed."""
    if cut.plain:
        return PlannedTensor(name, cut.shape, dtype, cut.source)
    copies = () if cut.rows is None else (Rows(cut.source, *cut.rows),)
    return PlannedTensor(name, cut.shape, dtype, cut.source, cut, cut.work, copies=copies)


def _of_level(level: Level, norm: str | None) -> Chosen:
    if level.level == 0:
        raise TltError("--level 0 is the whole model: there is nothing to slice")
    if norm not in (None, level.part.norm):
        raise TltError(f'--norm {norm}: config.json says that level {level.name} runs with "norm": "{level.part.norm}"')
    return Chosen(level.part, level)


def _largest_level(fit: Fit, budget: int) -> Level | None:
    """The largest level within a budget, its first block where it has several."""
    fitting = [
        (parameters(fit, axis_sizes(fit, {**current(fit), **_part_sizes(fit, level.part)})), -level.level, level)
        for level in levels(fit)[1:] if level.block == 1
    ]  # fmt: skip
    within_it = [one for one in fitting if one[0] <= budget]
    return max(within_it, key=lambda one: one[:2])[2] if within_it else None


def _part_sizes(fit: Fit, part: Part) -> dict[str, int]:
    return {
        "dim": len(part.hidden), "ffn": len(part.ffn[0]), "heads": len(part.heads[0]), "kv_heads": len(part.kv[0]),
        "head_dim": len(part.entries) * (2 if "rotary" in fit.sizes else 1), "layers": len(part.layers),
    }  # fmt: skip


def _inner(fit: Fit, found: Chosen) -> dict[str, Any]:
    """The levels that the part still holds, as config.json says them."""
    part, level, config = found.part, found.level, fit.config
    if level is not None and FRACTAL in config and NESTED not in config:
        depth, _ = fractal_shape(config[FRACTAL])
        left = depth - level.level
        return {FRACTAL: {**config[FRACTAL], "levels": left}} if left > 1 else {}
    if NESTED not in config:
        return {}
    own = _part_sizes(fit, part)
    same_entries = part.rules == "own" or len(part.entries) == fit.sizes[fit.family.head_size_axis]
    if not (same_entries and part.norm == config[NESTED].get("norm") and _is_prefix(fit, part)):
        return {}
    inner = [
        {**sizes_of(fit), **sizes} for sizes in config[NESTED]["levels"]
        if all(sizes.get(name, size) <= own[name] for name, size in sizes_of(fit).items())
    ]  # fmt: skip
    inner = [sizes for sizes in inner if sizes != own]
    return {NESTED: {**config[NESTED], "levels": inner}} if inner else {}


def _is_prefix(fit: Fit, part: Part) -> bool:
    first = prefix(fit, _part_sizes(fit, part), norm=part.norm, rules=part.rules)
    return part.layers == first.layers and all(
        np.array_equal(one, other)
        for one, other in (
            (part.hidden, first.hidden), (part.entries, first.entries), *zip(part.ffn, first.ffn, strict=True),
            *zip(part.heads, first.heads, strict=True),
        )
    )  # fmt: skip


def _head_norms(fit: Fit) -> bool:
    return any(role in fit.family.roles for role in HEAD_NORMS)


def _convention(fit: Fit, norm: str, *, trained: bool) -> tuple[str, ...]:
    """What the user should know where no training said how a part's norms see it."""
    if trained:
        return ()
    how = "see the entries that are kept" if norm == "sliced" else "divide as if all other entries were zero"
    other = NORMS[1 - NORMS.index(norm)]
    offered = "" if fit.family.rules["norm"] == "layer" else f" (--norm {other} is the other convention)"
    return (f"the model was not trained to be cut: what is kept is exact, what it lost is not; norms {how}{offered}",)
