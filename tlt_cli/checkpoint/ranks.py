"""The processes of a `torchrun` as one writer: who am I, and did all of us succeed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tlt_cli.errors import TltError

_LONGEST_WAIT = timedelta(days=1)  # a rank with few shards waits for the one with the most


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `size`; with one process, nothing here needs torch."""

    rank: int
    size: int
    group: Any = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that no rank leaves before all have done it, or that fails on every rank if it fails on one."""
        own: BaseException | None = None
        try:
            yield
        except BaseException as error:
            own = error
        failures = self._gather(None if own is None else f"{own}" or type(own).__name__)
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise TltError(f"rank {rank} of {self.size} failed, so nothing was written: {failure}")

    def _gather(self, failure: str | None) -> list[str | None]:
        if self.size == 1:
            return [failure]
        import torch.distributed as distributed

        failures: list[str | None] = [None] * self.size
        try:
            distributed.all_gather_object(failures, failure, group=self.group)
        except RuntimeError as error:
            if failure is not None:
                return [failure]  # the reason is ours, and will be raised
            raise TltError(f"lost the other ranks of {self.size}: one of them died; run it again") from error
        return failures


def world_size() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def jobs_per_rank() -> int:
    """The cores of this machine, divided among its ranks."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return max(1, (os.cpu_count() or 1) // local)


@contextmanager
def joined() -> Iterator[Ranks]:
    """All ranks of this run; a process group that exists already is used, one that is made here is ended here."""
    size = world_size()
    if size == 1:
        yield Ranks(0, 1)
        return
    import torch.distributed as distributed

    own = not distributed.is_initialized()
    try:
        if own:
            distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
            group = None
        else:
            group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise TltError(f"cannot reach the other ranks of {size}: {error}") from error
    try:
        yield Ranks(distributed.get_rank(), size, group)
    finally:
        distributed.destroy_process_group(group)
