"""A training carried out: what is trained is opened, its text read, steps taken, and what came of it written."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome
from tlt_cli.cli.opening import parse_device
from tlt_cli.cli.training_aim import Aim, aim_of, step_cost
from tlt_cli.cli.training_evaluation import evaluate
from tlt_cli.cli.training_levels import level_losses, level_objective, with_levels
from tlt_cli.cli.training_log import Journal, journal
from tlt_cli.cli.training_output import derived_output, write_adapter, write_model
from tlt_cli.cli.training_prefixes import prefix_numbers
from tlt_cli.cli.training_report import changes, closing_table, report_of
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_runs import check_run, forget
from tlt_cli.cli.training_start import Subject, Texts, read_texts, start, stream_info
from tlt_cli.errors import TltError, UsageError, nearest
from tlt_cli.model.nested import PREFIXES
from tlt_cli.model.sites import block_prefixes
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_start import aim
from tlt_cli.training.ahead import Ahead
from tlt_cli.training.flops import peak_flops
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.objective import Objective
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.regularize import spectra, targets
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
        trained, sharded = self._trained()
        inside = {name for name in trained if name.startswith(tuple(block_prefixes(decoder)))}
        counted = {name: parameter.numel() for name, parameter in trained.items()}
        hierarchy, recorded = self._aim.hierarchy, self._aim.recorded
        report = report_of(
            self.request, self.subject, self.texts, self.recipe, self.output, counted=counted, recorded=recorded
        )  # fmt: skip
        if self.request.dry_run:
            return Outcome({**report, "dry_run": True}, closing_table(report))
        one, learned_from = self._aim.one()
        cost = step_cost(self.request, self.subject, self.recipe, counted, learned_from)
        run = Run(
            decoder=decoder, trained=trained, windows=self._windows(), recipe=self.recipe,
            optimizers=optimizers(trained, self.recipe, blocks=inside, vectors=decoder.vectors),
            objective=self._of_all_levels(one),
            adapter=self.subject.adapter, world=world, sharded=sharded, micro=self.request.micro_batch,
            autocast=None if sharded else self._precision(), after=self._aim.after,
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
        evaluation, seconds = self._steps(run, first, cost, taught=None if learned_from is None else one)
        report.update(evaluation=evaluation, seconds=seconds, resumed_at=first)
        details = {**{key: report[key] for key in ("recipe", "data", "trained", "evaluation")}, **recorded}
        written = write_adapter if self.subject.adapter is not None else write_model
        config = {} if hierarchy is None else {PREFIXES: list(hierarchy.prefixes)}
        subject = replace(self.subject, config={**self.subject.config, **config})
        written(
            self.request, subject, trained, self.output, details=details, world=world, changes=changes(report),
            force=self.request.force or first == self.recipe.steps, out=self.out,
        )  # fmt: skip
        with world.ranks.together():
            if world.rank == 0:
                forget(self.states)
        return Outcome(report, closing_table(report))

    @cached_property
    def _aim(self) -> Aim:
        return aim_of(
            self.request, self.subject, self.texts, steps=self.recipe.steps, world=self.world, out=self.out
        )  # fmt: skip

    def _of_all_levels(self, objective: Objective) -> Objective:
        """What is minimized of the whole and of the models inside, `objective` being that of one model."""
        inner, streams = self.subject.inner, len(self.texts.windows.streams)
        if not inner:
            return objective
        return level_objective(self.request, inner, objective, recipe=self.recipe, streams=streams)

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

    # --- the steps -------------------------------------------------------------------------------------------

    def _same(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with the one that was interrupted."""
        recipe = {**self.recipe.data(), "command": self.request.command(self.subject.name)}
        return {
            **recipe,
            "data": [stream_info(stream) for stream in self.texts.windows.streams],
            "model": self.subject.digests,
            **self._aim.recorded,
        }

    def _resumed(self, run: Run) -> int:
        """The step to go on from; with --resume the weights and optimizers are then those of the last state."""
        last = latest(self.states) if self.request.resume else None
        if last is None:
            if self.request.resume:
                self.out.note(f"no state in {self.states} yet: beginning at the first step")
            return 0
        check_same(read_extra(last), self._same(), last)
        extra = load_state(last, run.trained, run.optimizers, world=self.world)
        step = int(extra["step"])
        if self._aim.hierarchy is not None:
            self._aim.hierarchy.restore(extra["found"])
        self.out.note(f"resuming at step {step:,} of {self.recipe.steps:,} from {last}")
        return step

    def _save(self, run: Run, step: int) -> None:
        extra = {"recipe": self._same(), "done": step == self.recipe.steps}
        if self._aim.hierarchy is not None:
            extra["found"] = self._aim.hierarchy.data()
        save_state(self.states, step, run.trained, run.optimizers, extra, world=self.world)

    def _steps(
        self, run: Run, first: int, cost: int, *, taught: Objective | None
    ) -> tuple[dict[str, Any], float]:  # fmt: skip
        """The steps from the first on, and what is found on the way. Returns the last evaluation, and seconds."""
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
                evaluation = self._evaluated(run, log, first, taught)
            for step in range(first, steps):
                start = time.perf_counter()
                done = take_step(run, step)
                log.step(done, time.perf_counter() - start)
                last = step + 1 == steps
                if last or (step + 1) % evaluating == 0:
                    evaluation = self._evaluated(run, log, step + 1, taught)
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

    def _evaluated(self, run: Run, log: Journal, step: int, taught: Objective | None) -> dict[str, Any]:
        decoder, world, hierarchy = run.decoder, self.world, self._aim.hierarchy
        try:
            numbers = evaluate(
                decoder, self.subject.adapter, self.texts, world=world, split=run.sharded, taught=taught
            )  # fmt: skip
            if self.subject.inner and numbers:
                numbers.update(level_losses(self.subject.inner, self.texts, world))
            if self.request.regularizer is not None:
                numbers.update(spectra(targets(decoder, only=self.request.regularize_only)))
            if hierarchy is not None:
                numbers.update(prefix_numbers(hierarchy, decoder, self.texts, world=world, split=run.sharded))
        except TltError as error:
            if step == 0:
                raise
            rate = f"{self.recipe.learning_rate:g}"
            raise TltError(f"after {step} steps: {error}; train at a lower rate than {rate}") from error
        if numbers:
            log.evaluation(step, numbers)
        return numbers
