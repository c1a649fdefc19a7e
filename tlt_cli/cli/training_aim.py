"""What a training minimizes, what it does behind each step, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.cli.console import Output
from tlt_cli.cli.training_levels import inner_flops
from tlt_cli.cli.training_log import REGULARIZING
from tlt_cli.cli.training_prefixes import hierarchy_of
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_start import Subject, Texts, teacher
from tlt_cli.model.decoder import Decoder
from tlt_cli.training.flops import training_flops
from tlt_cli.training.hierarchy import Hierarchy
from tlt_cli.training.objective import Objective, distillation, next_token
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.regularize import Regularizer, check_target_rank, regularize, targets
from tlt_cli.training.world import World

After = Callable[[int, float], Mapping[str, float]]  # (step, rate) to numbers for the log


@dataclass(frozen=True, eq=False)
class Aim:
    """What a run learns: `one` makes the objective of one model; a teacher that it learns from is loaded then.

    `after` is called behind each step. `recorded` says what is learned beside the text, in reports, in the output's
    record and in states: the "hierarchy", and which model is the "teacher", apart from where it lies.
    """

    one: Callable[[], tuple[Objective, Decoder | None]]
    after: After | None
    recorded: Mapping[str, Any]
    hierarchy: Hierarchy | None


def aim_of(request: Request, subject: Subject, texts: Texts, *, steps: int, world: World, out: Output) -> Aim:
    """What a request aims at, once weights are split over the ranks where they are to be: a regularizer moves those.

    Raises TltError or UsageError for what cannot be learned.
    """
    hierarchy, info = hierarchy_of(request, subject, texts, out=out)
    recorded = {"hierarchy": info} if info else {}
    if request.distill is not None:
        checkpoint = open_checkpoint(request.distill, values=False)
        recorded["teacher"] = {"source": source_name(checkpoint), "sha256": checkpoint.digest()}

    def one() -> tuple[Objective, Decoder | None]:
        if hierarchy is not None:
            return hierarchy.objective, None
        if request.distill is None:
            return next_token, None
        model = teacher(request, subject, context=texts.context, device=world.device, out=out)
        return distillation(model, share=request.distill_share), model

    regularizing = _regularizing(request, subject.decoder)
    after = (
        regularizing if hierarchy is None else _with_hierarchy(regularizing, hierarchy, subject.decoder, steps, world)
    )
    return Aim(one, after, recorded, hierarchy)


def _with_hierarchy(
    regularizing: After | None, hierarchy: Hierarchy, decoder: Decoder, steps: int, world: World
) -> After:
    def after(step: int, rate: float) -> Mapping[str, float]:
        numbers = {} if regularizing is None else regularizing(step, rate)
        hierarchy.after(decoder, step, steps, world)
        return numbers

    return after


def _regularizing(request: Request, decoder: Decoder) -> After | None:
    if request.regularizer is None:
        return None
    chosen = Regularizer(request.regularizer, request.strength, request.target_rank, request.regularize_every)
    matrices = targets(decoder, only=request.regularize_only)
    check_target_rank(matrices, chosen)

    def after(step: int, rate: float) -> Mapping[str, float]:
        began = time.perf_counter()
        numbers = regularize(matrices, chosen, rate=rate, step=step)
        return {**numbers, REGULARIZING: time.perf_counter() - began}

    return after


def step_cost(
    request: Request, subject: Subject, recipe: Recipe, counted: Mapping[str, int], learned_from: Decoder | None
) -> int:
    """Operations of one step, a teacher's way there included; `counted` are the sizes of what moves, by name."""
    tokens, context = recipe.tokens, recipe.context
    adapted = sum(counted.values()) if subject.adapter is not None else 0
    moving = () if adapted else counted
    cost = training_flops(subject.decoder, tokens, context=context, trained=moving, adapter=adapted)
    inner, sampled = subject.inner, request.nested_sample
    if inner:
        cost += inner_flops(inner, tokens, context=context, trained=moving, sampled=sampled)
    if learned_from is not None:  # each level asks it
        asked = 1 + (min(1, len(inner)) if sampled else len(inner))
        cost += asked * training_flops(learned_from, tokens, context=context, trained=())
    return cost
