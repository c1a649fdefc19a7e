"""The state of a training run on disk: `step-00000123` folders of torch.distributed.checkpoint, whole or not there.

A state holds the trained tensors and the optimizers' tensors under the parameters' names, so it loads into any number
of ranks and any order of parameters; and a JSON dict of what else resuming needs. A folder is built under a name that
starts with a dot, brought to disk and renamed: a kill at any moment leaves the states that were whole before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from tlt_cli.checkpoint.staging import Stage, absolute, locked, plain_errors, sync_folder
from tlt_cli.errors import TltError
from tlt_cli.training.state_reader import ADVICE, StateReader
from tlt_cli.training.world import World

_EXTRA = "state.json"
_WHOLE = re.compile(r"step-(\d{8,})")
_UNSEEN = re.compile(r"\.step-\d{8,}\.(partial|old)")


@contextmanager
def reserved(folder: Path, *, world: World) -> Iterator[None]:
    """No other run writes states to `folder` while this lasts. Raises TltError, on every rank, where one does."""
    with ExitStack() as held:
        with world.ranks.together():
            if world.rank == 0:
                with plain_errors(folder):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(Stage(absolute(folder))))
        yield


def save_state(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    extra: Mapping[str, Any],
    *,
    world: World,
    keep: int = 2,
) -> Path:
    """Write the state after `step` steps to `folder`, of which the last `keep` states stay; returns the new one's path.

    States of more steps, of a run that was set back, go. `model` is all that is trained, by name, split over ranks or
    not; the optimizers' parameters are among it. Every rank must call this, on a disk that all of them see. Raises
    TltError, on every rank, where one cannot write: the states before are as they were.
    """
    assert keep > 0
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        with world.ranks.together(), plain_errors(folder):
            if world.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _clear(folder)
                partial.mkdir()
        with world.ranks.together(), plain_errors(partial):
            _run(
                state_dict_saver.save,
                _tensors(model, optimizers),
                storage_writer=FileSystemWriter(partial),
                process_group=world.ranks.group,
            )
        with world.ranks.together(), plain_errors(final):
            if world.rank == 0:
                _put(partial / _EXTRA, {**extra, "step": step})
                sync_folder(partial)
                if final.exists():  # a run that went on from an earlier state comes by here again
                    _remove(final)
                partial.rename(final)
                sync_folder(folder)
                states = _states(folder)
                last = states.index(final)
                for other in (*states[: max(0, last + 1 - keep)], *states[last + 1 :]):
                    _remove(other)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def latest(folder: Path) -> Path | None:
    """The state of the most steps in `folder`, None where there is none; what was not finished is not seen."""
    return states[-1] if (states := _states(folder)) else None


def read_extra(path: Path) -> dict[str, Any]:
    """What else a state holds: the dict it was saved with, and its "step". Raises TltError where it is no state."""
    try:
        extra: dict[str, Any] = json.loads((path / _EXTRA).read_text())
    except (OSError, ValueError) as error:
        raise TltError(f"{path}: is no training state: cannot read {_EXTRA}: {error}; {ADVICE}") from error
    return extra


def check_same(extra: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """TltError naming every difference between the recipe that a state was made with, extra["recipe"], and `wanted`."""
    before, now = extra["recipe"], json.loads(json.dumps(wanted))
    differ = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    if differ:
        was = ", ".join(f"{name} {before.get(name)}" for name in differ)
        asked = ", ".join(f"{name} {now.get(name)}" for name in differ)
        raise TltError(
            f"{path}: cannot go on from a run with {was} when {asked} is asked for; "
            "give the options of that run, or start a new one elsewhere: -o PATH"
        )


def load_state(
    path: Path, model: Mapping[str, Tensor], optimizers: Sequence[Optimizer], *, world: World
) -> dict[str, Any]:
    """Load a state into the tensors of `model` and into the optimizers, in place; returns its extra dict.

    However many ranks saved it, every rank of now must call this. Raises TltError for a state that does not hold
    exactly these tensors, and for one that is damaged.
    """
    reader = StateReader(path)
    with world.ranks.together():
        extra = read_extra(path)
        stored = reader.sizes()
        tensors = {f"model.{name}": tensor.detach() for name, tensor in model.items()}
        states = _blank_states(stored, _named(model, optimizers))
        for name, (_, _, state) in states.items():
            tensors.update({f"optimizer.{slot}.{name}": value for slot, value in state.items()})
        _check(path, stored, tensors)
    with world.ranks.together():
        try:
            _run(state_dict_loader.load, tensors, storage_reader=reader, process_group=world.ranks.group)
        except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
            raise TltError(f"{path}: the state is damaged: {error}; {ADVICE}") from error
    for parameter, optimizer, state in states.values():
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = state
    return extra


def _named(model: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, tuple[Tensor, Optimizer, bool]]:
    """Every optimized parameter by name: itself, its optimizer, and whether that counts steps beside the weights."""
    names = {id(tensor): name for name, tensor in model.items()}
    return {
        names[id(parameter)]: (parameter, optimizer, bool(group.get("fused") or group.get("capturable")))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _tensors(model: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """All that a state holds, by key: "model.<name>" and "optimizer.<slot>.<name>", such as "optimizer.exp_avg.x"."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.items()}
    for name, (parameter, optimizer, _) in _named(model, optimizers).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor) and "." not in slot, slot
            tensors[f"optimizer.{slot}.{name}"] = value
    return tensors


def _blank_states(
    stored: Mapping[str, TensorStorageMetadata], named: Mapping[str, tuple[Tensor, Optimizer, bool]]
) -> dict[str, tuple[Tensor, Optimizer, dict[str, Tensor]]]:
    """Room for the optimizer state that was saved of each parameter: split as the parameter is, but for its steps."""
    slots = dict.fromkeys(key.split(".")[1] for key in stored if key.startswith("optimizer."))
    states = {}
    for name, (parameter, optimizer, beside) in named.items():
        state = {}
        for slot in slots:
            held = stored.get(f"optimizer.{slot}.{name}")
            if held is None:
                continue
            if slot == "step":
                device = parameter.device if beside else torch.device("cpu")
                state[slot] = torch.zeros(held.size, dtype=held.properties.dtype, device=device)
            else:
                state[slot] = torch.zeros_like(parameter, dtype=held.properties.dtype, requires_grad=False)
        states[name] = parameter, optimizer, state
    return states


def _check(path: Path, stored: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor]) -> None:
    for key in sorted(stored.keys() ^ tensors.keys()):
        what = "it has no" if key in tensors else "it has, and this run has no,"
        raise TltError(f"{path}: is the state of another model: {what} {key}; start a new run elsewhere: -o PATH")
    for key, tensor in tensors.items():
        size, dtype = tuple(stored[key].size), stored[key].properties.dtype
        if (size, dtype) != (tuple(tensor.shape), tensor.dtype):
            raise TltError(
                f"{path}: is the state of another model: {key} is {dtype} {list(size)}, "
                f"but here {tensor.dtype} {list(tensor.shape)}; start a new run elsewhere: -o PATH"
            )


def _states(folder: Path) -> list[Path]:
    """The whole states in a folder, by steps."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _WHOLE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _remove(state: Path) -> None:
    """Delete a state; it is gone for `latest` before the first of its files is."""
    aside = state.with_name(f".{state.name}.old")
    state.rename(aside)
    shutil.rmtree(aside)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if _UNSEEN.fullmatch(path.name):
            shutil.rmtree(path)


def _put(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("x") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _run(work: Callable[..., Any], tensors: Mapping[str, Tensor], **options: Any) -> None:
    """Save or load; what goes wrong is raised as it was met first, out of the report on all ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is .*uninitialized")  # one process is meant
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # which torch 2.6 asks itself for
        try:
            work(dict(tensors), **options)
        except CheckpointException as error:
            failures = [failure for _, (failure, _) in sorted(error.failures.items())]
            raise next(iter(failures), RuntimeError(str(error))) from error
