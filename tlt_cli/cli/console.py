"""Where words go: stdout is data, stderr is everything else, and an exception becomes one line and an exit code.

A command speaks through an Output:

    out = Output(json=json, quiet=quiet, verbose=verbose)
    out.note("what the user may want to know")                  stderr, unless --quiet
    with out.progress("growing") as progress:                   stderr, on a terminal only
        work(progress=progress)                                 calls progress(done, total)
    out.result({"path": "big.st"}, line="big.st")               stdout: the object with --json, else the line
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import typer
from typer.core import TyperGroup

from tlt_cli.errors import TltError, UsageError

DONE, FAILED, BAD_USAGE = 0, 1, 2
_PATIENCE = 2.0  # seconds of work before a progress bar appears

# The base of all that typer says of bad usage; typer exports it only as the parent of this one.
_BadOptions: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

Cell = str | int | float | None
Progress = Callable[[int, int], None]
Meter = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Table:
    """Columns and rows of data. None is an empty cell."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Output:
    """How one run of a command speaks. Of several ranks started together the first alone does, errors apart."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def draws(self) -> bool:
        """Whether progress bars are wanted: on a terminal, by the process that prints, unless --quiet."""
        return self.leads and not self.quiet and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """A line on stderr, unless --quiet."""
        if self.leads and not self.quiet:
            _say(f"tlt: {text}")

    def warn(self, text: str) -> None:
        """A note that something may not be what the user wants."""
        self.note(f"warning: {text}")

    def detail(self, text: str) -> None:
        """A note for --verbose alone."""
        if self.verbose:
            self.note(text)

    def result(self, data: Mapping[str, Any], *, line: str | None = None, table: Table | None = None) -> None:
        """The data of the command: all of it as one JSON object with --json, else a line, a table, or both."""
        if self.json:
            self.write(json.dumps(_finite(data), ensure_ascii=False) + "\n")
            return
        if line is not None:
            self.write(line + "\n")
        if table is not None and self.leads:
            _show(table) if sys.stdout.isatty() else self.write(_tab_separated(table))

    def report(self, table: Table) -> None:
        """A closing table for a person, on stderr, unless --quiet."""
        if self.leads and not self.quiet:
            _show(table, stderr=True)

    def write(self, text: str) -> None:
        """Text to stdout as it is, at once."""
        if self.leads:
            sys.stdout.write(text)
            sys.stdout.flush()

    def summary(self, text: str) -> None:
        """A line that goes with a table: under it on a terminal; on stderr where a pipe holds the table alone."""
        if sys.stdout.isatty():
            self.write(printable(text) + "\n")
        elif self.leads and not self.quiet:
            _say(text)

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """A callback `progress(done, total)` that draws a bar with the time left once work takes over two seconds."""
        with self.meter(label) as update:
            yield lambda done, total: update(done, total, "")

    @contextmanager
    def meter(self, label: str) -> Iterator[Meter]:
        """As `progress`, with a word on how things stand: `meter(done, total, status)`."""
        if not self.draws:
            yield lambda done, total, status: None
            return
        with _bar(label) as update:
            yield update


def printable(text: str) -> str:
    """Text on one line whatever it holds: names in a checkpoint may hold line breaks and a terminal's commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code; what it refuses becomes one line on stderr.

    An exception that nobody foresaw is a bug: it passes through and shows its traceback.
    """
    try:
        code = command()
        sys.stdout.flush()
    except _BadOptions as error:
        hint = f"; see {error.ctx.command_path} -h" if error.ctx is not None else ""
        return _refuse(error, _one_line(error.format_message()).rstrip(".") + hint, BAD_USAGE)
    except TltError as error:
        return _refuse(error, str(error), BAD_USAGE if isinstance(error, UsageError) else FAILED)
    except BrokenPipeError:  # the reader of our stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit finds something to write to
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(error, f"{where}{error.strerror or error}", FAILED)
    except typer.Abort:
        return _refuse(None, "aborted", FAILED)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _refuse(error, f"out of memory: {_one_line(str(error)) or 'the process may not have more'}", FAILED)
    return code if isinstance(code, int) else DONE


class Commands(TyperGroup):
    """The group of all commands; bad usage too is one plain line, not a box that breaks names at 80 columns."""

    def main(self, *args: Any, **more: Any) -> Any:
        """As typer's own, but with our errors and exit codes."""
        command = partial(super().main, *args, **{**more, "standalone_mode": False})
        return sys.exit(run(command)) if more.get("standalone_mode", True) else command()


def _refuse(error: BaseException | None, message: str, code: int) -> int:
    if error is not None and os.environ.get("TLT_DEBUG") == "1":
        traceback.print_exception(error)
    _say(f"tlt: error: {message}")
    return code


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_out_of_memory(error: Exception) -> bool:
    """torch says so with a class of its own on accelerators, with words on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tab_separated(table: Table) -> str:
    rows = [table.columns, *table.rows]
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    return "".join("\t".join(row) + "\n" for row in cells)


def _show(table: Table, *, stderr: bool = False) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        numbers = any(isinstance(row[index], int | float) for row in table.rows)
        shown.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(_readable(cell)) for cell in row))
    Console(stderr=stderr).print(shown)


def _readable(cell: Cell) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return printable(cell or "")


@contextmanager
def _bar(label: str) -> Iterator[Meter]:
    from threading import Timer

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    status = TextColumn("{task.fields[status]}", markup=False)
    bar = Bar(*columns, TimeRemainingColumn(), status, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None, status="")
    appears = Timer(_PATIENCE, bar.start)
    appears.daemon = True
    appears.start()
    try:
        yield lambda done, total, status: bar.update(task, completed=done, total=total, status=status)
    finally:
        appears.cancel()
        appears.join()
        bar.stop()
