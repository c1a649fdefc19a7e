"""A training carried out: what is trained is opened, its text read, steps taken, and what came of it written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.cli.console import Output, Table
from tlt_cli.cli.execute import Outcome
from tlt_cli.cli.opening import parse_device
from tlt_cli.cli.training_evaluation import evaluate
from tlt_cli.cli.training_levels import (
    inner_flops,
    level_losses,
    level_objective,
    level_rows,
    level_sizes,
    with_levels,
)
from tlt_cli.cli.training_log import REGULARIZING, Journal, journal
from tlt_cli.cli.training_output import derived_output, write_adapter, write_model
from tlt_cli.cli.training_prefixes import hierarchy_of, prefix_config, prefix_numbers
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_runs import check_run, forget
from tlt_cli.cli.training_start import Subject, Texts, read_texts, start, stream_info, teacher
from tlt_cli.errors import TltError, UsageError, nearest
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.sites import block_prefixes
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_start import aim
from tlt_cli.training.ahead import Ahead
from tlt_cli.training.flops import peak_flops, training_flops
from tlt_cli.training.hierarchy import Hierarchy
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.objective import Objective, distillation, next_token
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.regularize import Regularizer, check_target_rank, regularize, spectra, targets
from tlt_cli.training.state import check_same, latest, load_state, read_extra, reserved, save_state
from tlt_cli.training.windows import Windows
from tlt_cli.training.world import World, replicate, shard, start_world

_GRAPHS = 64  # that one function may be compiled to
_AIMED_AT = 64  # windows that the routers of a tree start from


def train_model(request: Request, *, out: Output) -> Outcome:
    """Train and write; with --dry-run say what would be. Notes and progress go to `out`.

    Raises TltError, with nothing written but the states and the log of the run, for whatever cannot be done.
    """
    with start_world(parse_device(request.device)) as world:
        with world.ranks.together():
            subject = with_levels(request, start(request, device=world.device, out=out), out=out)
            output = request.output or derived_output(request, subject)
            states = output.with_name(f"{output.name}.training")
        with contextlib.nullcontext() if request.dry_run else reserved(states, world=world):
            with world.ranks.together():
                finished = check_run(request, subject, output, states, out)
            if finished is not None:
                if world.rank == 0:
                    forget(states)
                return finished
            with world.ranks.together():
                texts = read_texts(request, subject, out=out)
                recipe = request.recipe(
                    context=texts.context, batch=texts.batch, windows=texts.windows.per_epoch,
                    adapts=subject.adapter is not None,
                )  # fmt: skip
            return _Training(request, subject, texts, recipe, output, states, world, out).carried_out()


@dataclass(frozen=True)
class _Training:
    """One run: the request, what it is about, and where it goes."""

    request: Request
    subject: Subject
    texts: Texts
    recipe: Recipe
    output: Path
    states: Path
    world: World
    out: Output

    def carried_out(self) -> Outcome:
        decoder, world = self.subject.decoder, self.world
        if self.recipe.batch < world.size:
            raise UsageError(f"--batch-size {self.recipe.batch} is less than the {world.size} processes that share it")
        hierarchy, recorded = self._hierarchy
        trained, sharded = self._trained()
        inside = {name for name in trained if name.startswith(tuple(block_prefixes(decoder)))}
        counted = {name: parameter.numel() for name, parameter in trained.items()}
        report, after = self._report(counted), self._after()
        if self.request.dry_run:
            return Outcome({**report, "dry_run": True}, _table(report))
        objective, learned_from = self._objective()
        run = Run(
            decoder=decoder, trained=trained, windows=self._windows(), recipe=self.recipe,
            optimizers=optimizers(trained, self.recipe, blocks=inside, vectors=decoder.vectors), objective=objective,
            adapter=self.subject.adapter, world=world, sharded=sharded, micro=self.request.micro_batch,
            autocast=None if sharded else self._precision(), after=after,
        )  # fmt: skip
        with world.ranks.together():
            if world.rank == 0 and not self.request.resume:
                forget(self.states)
        first = self._resumed(run)
        if first == 0 and isinstance(self.subject.adapter, Tree) and self.subject.before is None:
            some = self.texts.windows.batch(0, _AIMED_AT).to(decoder.device)
            documents = None if some.documents is None else some.documents[:, :-1]
            aim(self.subject.adapter, decoder, some.rows[:, :-1], documents)
            replicate(trained.values(), world)
        if run.adapter is not None and first:  # where nothing but writing is left, no step does it
            run.adapter.advance(first - 1, self.recipe.steps)
        evaluation, seconds = self._steps(run, first, self._cost(counted, learned_from))
        report.update(evaluation=evaluation, seconds=seconds, resumed_at=first)
        details: dict[str, Any] = {key: report[key] for key in ("recipe", "data", "trained", "evaluation")}
        written = write_adapter if self.subject.adapter is not None else write_model
        details.update({"hierarchy": recorded} if recorded else {})
        details.update({"teacher": self._teacher} if self._teacher else {})
        config = {} if hierarchy is None else prefix_config(hierarchy)
        subject = replace(self.subject, config={**self.subject.config, **config})
        written(
            self.request, subject, trained, self.output, details=details, world=world, changes=_changes(report),
            force=self.request.force or first == self.recipe.steps, out=self.out,
        )  # fmt: skip
        with world.ranks.together():
            if world.rank == 0:
                forget(self.states)
        return Outcome(report, _table(report))

    @cached_property
    def _hierarchy(self) -> tuple[Hierarchy | None, dict[str, Any]]:
        """What prefixes of the stream learn, and what is recorded of it."""
        return hierarchy_of(self.request, self.subject, self.texts, out=self.out)

    # --- what moves ------------------------------------------------------------------------------------------

    def _trained(self) -> tuple[dict[str, nn.Parameter], bool]:
        """The parameters that move, by name, and whether they are split over the ranks."""
        decoder, adapter = self.subject.decoder, self.subject.adapter
        if adapter is not None:
            decoder.requires_grad_(False)
            found = dict(adapter.named_parameters())
            replicate(found.values(), self.world)
            return found, False
        if self.request.only:
            names = [name for name, _ in decoder.named_parameters()]
            for glob in self.request.only:
                if not any(fnmatchcase(name, glob) for name in names):
                    raise UsageError(f"--only {glob}: no tensor's name matches{nearest(glob, names)}")
            for name, parameter in decoder.named_parameters():
                parameter.requires_grad_(any(fnmatchcase(name, glob) for glob in self.request.only))
            found = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
            replicate(decoder.parameters(), self.world)
            return found, False
        if self.subject.inner:  # which read parts of weights, so that all ranks must hold the whole
            replicate(decoder.parameters(), self.world)
            return dict(decoder.named_parameters()), False
        return shard(decoder, self.world, compute=self._precision()), self.world.size > 1

    def _windows(self) -> Windows | Ahead:
        """The windows to train on; where an accelerator is busy, the next ones are prepared meanwhile."""
        return Ahead(self.texts.windows) if self.world.device.type == "cuda" else self.texts.windows

    def _precision(self) -> torch.dtype | None:
        """The dtype of matrix products where it is not the weights' own: bfloat16 on accelerators."""
        return torch.bfloat16 if self.world.device.type == "cuda" and self.request.precision != "float32" else None

    def _objective(self) -> tuple[Objective, Decoder | None]:
        """What is minimized, and the model that is learned from, if any."""
        objective, model = self._of_each_level()
        if self.subject.inner:
            streams = len(self.texts.windows.streams)
            objective = level_objective(
                self.request, self.subject.inner, objective, recipe=self.recipe, streams=streams
            )  # fmt: skip
        return objective, model

    def _of_each_level(self) -> tuple[Objective, Decoder | None]:
        hierarchy, _ = self._hierarchy
        if hierarchy is not None:
            return hierarchy.objective, None
        if self.request.distill is None:
            return next_token, None
        model = teacher(
            self.request, self.subject, context=self.texts.context, device=self.world.device, out=self.out
        )  # fmt: skip
        return distillation(model, share=self.request.distill_share), model

    def _after(self) -> Callable[[int, float], Mapping[str, float]] | None:
        (hierarchy, _), regularizing = self._hierarchy, self._regularizing()
        if hierarchy is None:
            return regularizing

        def after(step: int, rate: float) -> Mapping[str, float]:
            numbers = {} if regularizing is None else regularizing(step, rate)
            hierarchy.after(self.subject.decoder, step, self.recipe.steps, self.world)
            return numbers

        return after

    def _regularizing(self) -> Callable[[int, float], Mapping[str, float]] | None:
        request = self.request
        if request.regularizer is None:
            return None
        chosen = Regularizer(request.regularizer, request.strength, request.target_rank, request.regularize_every)
        matrices = targets(self.subject.decoder, only=request.regularize_only)
        check_target_rank(matrices, chosen)

        def after(step: int, rate: float) -> Mapping[str, float]:
            began = time.perf_counter()
            numbers = regularize(matrices, chosen, rate=rate, step=step)
            return {**numbers, REGULARIZING: time.perf_counter() - began}

        return after

    # --- the steps -------------------------------------------------------------------------------------------

    def _same(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with the one that was interrupted."""
        recipe = {**self.recipe.data(), "command": self.request.command(self.subject.name)}
        return {
            **recipe,
            "data": [stream_info(stream) for stream in self.texts.windows.streams],
            "model": self.subject.digests,
            **({"hierarchy": self._hierarchy[1]} if self._hierarchy[1] else {}),
            **({"teacher": self._teacher} if self._teacher else {}),
        }

    @cached_property
    def _teacher(self) -> dict[str, str]:
        """Which model is learned from, apart from where it lies; empty where none is."""
        if self.request.distill is None:
            return {}
        checkpoint = open_checkpoint(self.request.distill, values=False)
        return {"source": source_name(checkpoint), "sha256": checkpoint.digest()}

    def _resumed(self, run: Run) -> int:
        """The step to go on from; with --resume the weights and optimizers are then those of the last state."""
        last = latest(self.states) if self.request.resume else None
        if last is None:
            if self.request.resume:
                self.out.note(f"no state in {self.states} yet: beginning at the first step")
            return 0
        check_same(read_extra(last), self._same(), last)
        extra = load_state(last, run.trained, run.optimizers, world=self.world)
        step, (hierarchy, _) = int(extra["step"]), self._hierarchy
        if hierarchy is not None:
            hierarchy.restore(extra["found"])
        self.out.note(f"resuming at step {step:,} of {self.recipe.steps:,} from {last}")
        return step

    def _save(self, run: Run, step: int) -> None:
        extra = {"recipe": self._same(), "done": step == self.recipe.steps}
        hierarchy, _ = self._hierarchy
        if hierarchy is not None:
            extra["found"] = hierarchy.data()
        save_state(self.states, step, run.trained, run.optimizers, extra, world=self.world)

    def _cost(self, counted: Mapping[str, int], learned_from: Decoder | None) -> int:
        """Operations of one step, a teacher's way there included."""
        tokens, context = self.recipe.tokens, self.recipe.context
        adapted = sum(counted.values()) if self.subject.adapter is not None else 0
        moving = () if adapted else counted
        cost = training_flops(self.subject.decoder, tokens, context=context, trained=moving, adapter=adapted)
        inner, sampled = self.subject.inner, self.request.nested_sample
        if inner:
            cost += inner_flops(inner, tokens, context=context, trained=moving, sampled=sampled)
        if learned_from is not None:  # each level asks it
            asked = 1 + (min(1, len(inner)) if sampled else len(inner))
            cost += asked * training_flops(learned_from, tokens, context=context, trained=())
        return cost

    def _steps(self, run: Run, first: int, cost: int) -> tuple[dict[str, Any], float]:
        steps, request = self.recipe.steps, self.request
        evaluating, saving = request.every(request.eval_every, steps), request.every(request.save_every, steps)
        peak, origin = peak_flops(self.world.device)
        self.out.detail(f"MFU counts {cost:.3g} operations a step, of {peak:.3g} a second: {origin}")
        began = time.perf_counter()
        evaluation: dict[str, Any] = {}
        with self._compiled(), journal(
            self.output, first=first, steps=steps, cost=cost, peak=peak * self.world.size, out=self.out,
            leads=self.world.rank == 0, boards=request.tensorboard,
        ) as log:  # fmt: skip
            if first == 0 or first == steps:
                evaluation = self._evaluated(run, log, first)
            for step in range(first, steps):
                start = time.perf_counter()
                done = take_step(run, step)
                log.step(done, time.perf_counter() - start)
                last = step + 1 == steps
                if last or (step + 1) % evaluating == 0:
                    evaluation = self._evaluated(run, log, step + 1)
                if saving and (last or (step + 1) % saving == 0):
                    self._save(run, step + 1)
        return evaluation, time.perf_counter() - began

    @contextlib.contextmanager
    def _compiled(self) -> Any:
        if not self.request.compile:
            yield
            return
        # a tree has many ways to run: soft, straight, hard, packed rows or not, each a graph
        with torch._dynamo.config.patch(cache_size_limit=_GRAPHS):
            self.subject.decoder.compile()
            yield

    def _evaluated(self, run: Run, log: Journal, step: int) -> dict[str, Any]:
        taught = None if self.request.distill is None or self.subject.inner else run.objective
        try:
            numbers = evaluate(
                run.decoder, self.subject.adapter, self.texts, world=self.world, split=run.sharded, taught=taught
            )  # fmt: skip
        except TltError as error:
            if step == 0:
                raise
            rate = f"{self.recipe.learning_rate:g}"
            raise TltError(f"after {step} steps: {error}; train at a lower rate than {rate}") from error
        if self.subject.inner and numbers:
            numbers.update(level_losses(self.subject.inner, self.texts, self.world))
        if self.request.regularizer is not None:
            numbers.update(spectra(targets(self.subject.decoder, only=self.request.regularize_only)))
        hierarchy, _ = self._hierarchy
        if hierarchy is not None:
            numbers.update(prefix_numbers(hierarchy, self.subject.decoder, self.texts))
        if numbers:
            log.evaluation(step, numbers)
        return numbers

    # --- what is said of it ----------------------------------------------------------------------------------

    def _report(self, counted: Mapping[str, int]) -> dict[str, Any]:
        whole = sum(parameter.numel() for parameter in self.subject.decoder.parameters())
        return {
            "operation": "train", "command": self.request.command(self.subject.name), "path": str(self.output),
            "source": self.request.source, "recipe": self.recipe.data(),
            "tokens": self.recipe.steps * self.recipe.tokens, "data": self.texts.info, "parameters": whole,
            "trained": {"tensors": len(counted), "parameters": sum(counted.values())},
            **({"hierarchy": self._hierarchy[1]} if self._hierarchy[1] else {}),
            **({"levels": level_sizes(self.subject.inner)} if self.subject.inner else {}),
        }  # fmt: skip


def _changes(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [("steps", "", f"{report['recipe']['steps']:,}"), ("tokens", "", f"{report['tokens']:,}")]


def _table(report: Mapping[str, Any]) -> Table:
    rows: list[Sequence[Any]] = [
        ("steps", report["recipe"]["steps"]), ("tokens", report["tokens"]), ("parameters", report["parameters"]),
        ("of them, or beside them, trained", report["trained"]["parameters"]),
    ]  # fmt: skip
    rows += level_rows(report)
    for name, value in report.get("evaluation", {}).items():
        if name != "models":
            rows.append((name.replace("_", " "), value if isinstance(value, int | float) else str(value)))
    if "seconds" in report:
        rows.append(("seconds", round(report["seconds"], 1)))
    return Table(("", "value"), rows)
