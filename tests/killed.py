"""Trains as `tlt` does, and is killed on the way, again and again: `killed.py FOLDER` carries out FOLDER/plan.json.

A child is forked for each attempt, so that torch is imported once. SIGKILL ends it just before the n-th time that it
opens a file to write, renames, makes or removes anything, or begins or ends a step; a negative n counts from the end of
the last attempt that had nothing to resume. What became of every attempt is printed as JSON: the number of such
moments, or null where it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink", "tlt.step"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def attempt(arguments: Sequence[str], last: int | None, errors: Path) -> int | None:
    """Run `tlt` in a child that dies before moment number `last`; how many moments it had, None where it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run(arguments, last, errors, writing)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    told = os.read(reading, 100)
    os.close(reading)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, errors.read_text()
    return int(told)


def _run(arguments: Sequence[str], last: int | None, errors: Path, writing: int) -> None:
    """In the child: never returns."""
    from tlt_cli.cli import main, training

    moments, step = 0, training.take_step

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal moments
        if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES):
            moments += 1
            if moments == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(run: Any, number: int) -> Any:
        sys.audit("tlt.step")
        done = step(run, number)
        sys.audit("tlt.step")
        return done

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    training.take_step = watched
    training.peak_flops = lambda device: (1.0, "not measured")
    sys.argv = ["tlt", *arguments]
    sys.addaudithook(watch)
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    os.write(writing, str(moments).encode())
    os._exit(code)


def main() -> None:
    folder = Path(sys.argv[1])
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    import torch._dynamo  # imported here once for all children: a new optimizer asks for it
    import torch.distributed.fsdp

    import tlt_cli.cli.training  # noqa: F401

    plan = json.loads(Path("plan.json").read_text())
    found: list[int | None] = []
    whole = 0
    for arguments, last in plan:
        from_start = last + whole + 1 if last is not None and last < 0 else last
        found.append(attempt(arguments, from_start, Path("errors.txt")))
        whole = found[-1] or 0 if "--resume" not in arguments else whole
    print(json.dumps(found))


if __name__ == "__main__":
    main()
