"""The models inside a model that is trained (--nested, --fractal): which there are, their objective, their worth."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from tlt_cli.cli.console import Output
from tlt_cli.cli.training_evaluation import distinct, stream_losses
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_start import Subject, Texts
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.model.nested import FRACTAL, NESTED, shrunk, sizes_of, stated, without_levels
from tlt_cli.training.flops import training_flops
from tlt_cli.training.fractal import check_splits, seen
from tlt_cli.training.nested import Drawn, Inner, inner_models, level_name, of_levels, shares
from tlt_cli.training.objective import Objective
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.world import World

NO_LEVELS = "none"


def with_levels(request: Request, subject: Subject, *, out: Output) -> Subject:
    """The subject with the models inside it that are trained too, and its config.json saying so.

    Those that the options name; without any, those that it has been trained with. Raises UsageError for levels that its
    sizes do not allow.
    """
    asked = _asked(request, subject.fitted)
    known = {key: subject.config[key] for key in (NESTED, FRACTAL) if subject.config.get(key) is not None}
    if subject.adapter is not None or (asked is None and not known):
        _check_said(request, ())
        return subject
    if asked != {} and (request.hierarchy or request.nested_only):
        option = "hierarchy" if request.hierarchy else "nested-only"
        raise UsageError(f"--{option} orders one model's embedding; train it without models inside: --nested none")
    config = {**without_levels(subject.config), **(known if asked is None else asked)}
    fitted = replace(subject.fitted, config=config)
    try:
        inner = inner_models(subject.decoder, fitted)
    except TltError as error:
        if asked is None:
            raise TltError(f"{subject.name} says it has models inside, but {error}; or say --nested none") from error
        raise
    _check_said(request, inner)
    shares(1 + len(inner), level_weights(request))
    if inner and request.compile:
        out.note("--compile: the whole is compiled; the models inside run as they are")
    if asked is None:
        out.note(f"{subject.name} has models inside, {_said(inner)}: they are trained too, but with --nested none")
    elif known and known != asked:
        out.note(f"{subject.name} had other models inside, which are not trained on: config.json names them no more")
    return replace(subject, config=fitted.config, fitted=fitted, inner=inner)


def _asked(request: Request, fit: Fit) -> dict[str, Any] | None:
    """What config.json is to say of levels; None where no option does."""
    if request.fractal is not None:
        check_splits(fit, request.fractal, request.split)
        return {FRACTAL: {"norm": "sliced", "levels": request.fractal, "split": request.split}}
    if request.nested is None:
        return None
    if request.nested == NO_LEVELS:
        for option, given in (("--nested-layers", request.nested_layers), ("--nested-heads", request.nested_heads)):
            if given is not None:
                raise UsageError(f"{option} says nothing with --nested none; drop it")
        return {}
    own = sizes_of(fit)
    widths = _numbers("--nested", request.nested)
    layers = _each("--nested-layers", request.nested_layers, len(widths), own["layers"])
    heads = _each("--nested-heads", request.nested_heads, len(widths), own["heads"])
    found = []
    for width, some_layers, some_heads in zip(widths, layers, heads, strict=True):
        share = Fraction(width) / own["dim"] if _whole(width) else Fraction(width)
        if not 0 < share <= 1:
            raise UsageError(f"--nested {width}: expected a share of at most 1, or a width of at most {own['dim']}")
        sizes = shrunk(fit, share, heads=some_heads, layers=some_layers)
        if sizes == own:
            raise UsageError(f"--nested {width} is the whole model, which is always trained; drop it")
        found.append(sizes)
    return {NESTED: stated(found)}


def _check_said(request: Request, inner: Sequence[Sequence[Inner]]) -> None:
    """UsageError for options that say something of levels where none of the kind is trained."""
    for option, given in (
        ("--level-weights", request.level_weights is not None),
        ("--nested-sample", request.nested_sample),
    ):
        if given and not inner:
            raise UsageError(f"{option} says nothing where no models inside are trained; drop it, or see --nested")
    if request.nested_sample and any(len(level) > 1 for level in inner):
        raise UsageError("--nested-sample says nothing of models side by side, which share the batch; drop it")


def _numbers(option: str, text: str) -> list[str]:
    """The values of a list, shares such as 1/2 or 0.5 and whole numbers, as they were written."""
    found = [part.strip() for part in text.split(",")]
    for part in found:
        try:
            sound = Fraction(part) > 0
        except (ValueError, ZeroDivisionError):
            sound = False
        if not sound:
            raise UsageError(f"{option} {text}: {part!r} is neither a share, such as 1/2 or 0.5, nor a whole number")
    return found


def _whole(part: str) -> bool:
    return part.isdigit()


def _each(option: str, text: str | None, levels: int, size: int) -> list[int | None]:
    """One count for each level, from counts or shares of `size`; None where the option is not given."""
    if text is None:
        return [None] * levels
    parts = _numbers(option, text)
    if len(parts) != levels:
        raise UsageError(f"{option} {text}: {len(parts)} values for the {levels} levels of --nested; give one for each")
    found: list[int | None] = []
    for part in parts:
        count = Fraction(part) if _whole(part) else Fraction(part) * size
        if count.denominator != 1 or not 1 <= count <= size:
            raise UsageError(f"{option} {part}: {float(count):g} of {size}; expected a whole number from 1 to {size}")
        found.append(int(count))
    return found


def level_weights(request: Request) -> list[float] | None:
    """The levels' weights in the loss, the whole's first. Raises UsageError for what are none."""
    if request.level_weights is None:
        return None
    try:
        found = [float(part) for part in request.level_weights.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 < weight < math.inf for weight in found):
        raise UsageError(f"--level-weights {request.level_weights}: expected numbers above 0, the whole model's first")
    return found


def _said(inner: Sequence[Sequence[Inner]]) -> str:
    """The levels in short, such as "2 of dim 64, 4 of dim 32"."""
    return ", ".join(f"{len(level)} of dim {level[0].child.fit.sizes['hidden']}" for level in inner)


# --- what is trained, and what it costs ------------------------------------------------------------------------


def level_objective(
    request: Request, inner: Sequence[Sequence[Inner]], objective: Objective, *, recipe: Recipe, streams: int
) -> Objective:
    """The objective of all levels, each learning what `objective` says."""
    weights = shares(len(inner) + 1, level_weights(request))
    models = [[each.decoder for each in level] for level in inner]
    drawn = Drawn(recipe.batch, recipe.seed) if request.nested_sample else None
    return of_levels(models, weights, streams=streams, objective=objective, drawn=drawn)


def inner_flops(
    inner: Sequence[Sequence[Inner]], tokens: int, *, context: int, trained: Collection[str], sampled: bool
) -> int:
    """Operations of a step of all levels inside: models of one level share its tokens, and all are of one size."""
    cost = 0
    for first, *_ in inner:
        moving = [name for name, cut in first.child.cuts.items() if cut.source in trained]
        cost += training_flops(first.decoder, tokens, context=context, trained=moving)
    return cost // len(inner) if sampled else cost


# --- what they are worth ---------------------------------------------------------------------------------------


@torch.no_grad()
def level_losses(inner: Sequence[Sequence[Inner]], texts: Texts, world: World) -> dict[str, Any]:
    """Nats per held-out token: of each level as loss_level_<n>, and of every model on every stream under "models".

    A level's is that of its models on the streams that they are given, by the share that each is given. The ranks share
    the work, and each must call this.
    """
    names, streams = distinct([name for name, _ in texts.held]), len(texts.windows.streams)
    numbers: dict[str, Any] = {}
    models = []
    for number, level in enumerate(inner, start=1):
        summed = counted = 0.0
        for each in level:
            found = stream_losses(each.decoder, texts, world=world)
            own = seen(each.level.block, each.level.blocks, streams)
            if len(found) != streams:  # measured on other texts
                own = [1 / len(level)] * len(found)
            for share, (nll, tokens) in zip(own, found, strict=True):
                summed, counted = summed + share * nll * tokens, counted + share * tokens
            by_stream = {name: nll for name, (nll, _) in zip(names, found, strict=True)}
            tokens_in_all = sum(tokens for _, tokens in found)
            mean = sum(nll * tokens for nll, tokens in found) / tokens_in_all
            models.append({"model": each.level.name, "loss": mean, "streams": by_stream})
        numbers[level_name(number)] = summed / counted
    return {**numbers, "models": models}
