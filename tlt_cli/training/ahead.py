"""The next batch prepared while this one is used."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from tlt_cli.training.windows import Batch, Windows


class Ahead:
    """Windows whose next batch a thread gathers meanwhile: worth it where a device is waited for, or a disk.

    Which batch is next is guessed: as far behind this one as this one is behind the last. A wrong guess costs time and
    nothing else, since batches are a pure function of what is asked for.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self._thread = ThreadPoolExecutor(1)
        self._last: int | None = None
        self._waiting: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, first: int, count: int) -> Batch:
        """What `windows.batch` gives."""
        if self._waiting is not None and self._waiting[0] == (first, count):
            found = self._waiting[1].result()
        else:
            found = self.windows.batch(first, count)
        following = max(first + (count if self._last is None else first - self._last), 0)
        self._last = first
        self._waiting = (following, count), self._thread.submit(self.windows.batch, following, count)
        return found
