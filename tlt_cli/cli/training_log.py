"""What a training run says on the way: a log line per step, a status line for who watches, curves where asked for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tlt_cli.cli.console import Meter, Output
from tlt_cli.errors import TltError
from tlt_cli.training.loop import Done
from tlt_cli.training.objective import KL

REGULARIZING = "regularizer_seconds"
_SPOKEN_EVERY = 30.0  # seconds between status lines where no bar can be drawn
_RECENT = 20  # steps that the speed is a mean of


def log_path(output: Path) -> Path:
    """Where a run's log is: beside its output, whatever that is."""
    return output.with_name(f"{output.name}.log.jsonl")


@dataclass
class Journal:
    """The log of one run, begun anew or cut to the step that a resumed run goes on from. A process that does not lead
    writes nothing. `peak` is what the device could do, in operations per second; `cost` those of one step."""

    path: Path
    steps: int
    cost: float
    peak: float
    out: Output
    meter: Meter
    leads: bool
    boards: Any = None
    times: list[float] = field(default_factory=list)
    spoken: float = 0.0

    def step(self, done: Done, seconds: float) -> None:
        """Log a step that took so many seconds, and which share of them a regularizer took."""
        if not self.leads:
            return
        self.times = [*self.times[1 - _RECENT :], seconds]
        mean = sum(self.times) / len(self.times)
        entry: dict[str, Any] = {
            "step": done.step, "loss": done.loss, "norm": done.norm, "rate": done.rate,
            "tokens_per_second": done.tokens / seconds, "mfu": self.cost / seconds / self.peak, "memory": _memory(),
            **{name: value for name, value in done.numbers.items() if name != REGULARIZING},
        }  # fmt: skip
        if REGULARIZING in done.numbers:
            entry["regularizer_share"] = done.numbers[REGULARIZING] / seconds
        self.write(entry)
        taught = f"kl {done.numbers[KL]:.3f}  " if KL in done.numbers else ""
        status = (
            f"loss {done.loss:.3f}  {taught}{done.tokens / mean:,.0f} tokens/s  "
            f"MFU {self.cost / mean / self.peak:.0%}  {_memory() / 2**30:.1f} GiB"
        )
        if "regularizer_share" in entry:
            status += f"  regularizer {entry['regularizer_share']:.1%} of the step"
        self.meter(done.step + 1, self.steps, status)
        now = time.monotonic()
        if not self.out.draws and now - self.spoken > _SPOKEN_EVERY:
            if self.spoken:
                left = (self.steps - done.step - 1) * mean
                self.out.note(f"step {done.step + 1:,} of {self.steps:,}  {status}  {_clock(left)} left")
            self.spoken = now

    def evaluation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Log and say what an evaluation found."""
        self.write({"step": step, "evaluation": dict(numbers)})
        shown = "  ".join(
            f"{name.replace('_', ' ')} {_short(value)}" for name, value in numbers.items() if name != "models"
        )
        self.out.note(f"step {step:,} of {self.steps:,}: {shown}")

    def write(self, entry: Mapping[str, Any]) -> None:
        """One line of JSON; numbers that JSON does not know become null."""
        if not self.leads:
            return
        unknown = {key for key, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
        safe = {key: None if key in unknown else value for key, value in entry.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(safe) + "\n")
        if self.boards is not None:
            numbers = {**entry, **entry.get("evaluation", {})}
            for name, value in numbers.items():
                if isinstance(value, int | float) and name != "step":
                    self.boards.add_scalar(name, value, entry["step"])


@contextmanager
def journal(
    output: Path, *, first: int, steps: int, cost: float, peak: float, out: Output, leads: bool, boards: Path | None
) -> Iterator[Journal]:
    """The journal of a run that starts at step `first`. Raises TltError where the log cannot be written."""
    path = log_path(output)
    curves = check_curves()(str(boards)) if boards is not None and leads else None
    if leads:
        begun = path.with_name(f".{path.name}.partial")  # a kill while the log is cut loses none of it
        try:
            kept = [] if not first or not path.exists() else _before(path, first, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            begun.write_text("".join(kept), encoding="utf-8")
            begun.replace(path)
        except OSError as error:
            raise TltError(f"cannot write the log {path}: {error.strerror}") from error
    with out.meter("train") as meter:
        yield Journal(path, steps, cost, peak, out, meter, leads, curves)


def _before(path: Path, first: int, steps: int) -> list[str]:
    """The log's lines about steps before `first`; half a line at its end is what a kill leaves.

    The evaluation there belongs to them, but for the last one of a run, which is made again for the output's record.
    """
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] < first or ("evaluation" in entry and entry["step"] == first < steps):
            kept.append(line)
    return kept


def check_curves() -> Any:
    """What writes curves. Raises TltError where its package is not there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TltError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter


def _memory() -> int:
    """Bytes in use at most so far: the accelerator's where one is used, else the process's."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_short(each) for each in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
