"""An output that appears whole or not at all: built in `<output>.partial`, then renamed.

A kill at any moment leaves the old output or none, and a stage that the next run clears away. One stage
belongs to one run: a lock beside it, which the system takes back when its holder dies, says whose it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tlt_cli.checkpoint.folder import SAFE_SUFFIXES
from tlt_cli.errors import TltError

_AT_FDCWD = -100
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2


@dataclass(frozen=True)
class Stage:
    """Where the run that holds the lock builds `output`: at `path`, inside of `<output>.partial`."""

    output: Path

    @property
    def folder(self) -> Path:
        """The folder that is deleted in the end, whatever happens."""
        return self.output.with_name(f"{self.output.name}.partial")

    @property
    def path(self) -> Path:
        """The output in the making: its name is the final one, so that readers know its kind by the suffix."""
        return self.folder / self.output.name

    @property
    def aside(self) -> Path:
        """Where an old output waits for its end, on systems that cannot exchange two names in one step."""
        return self.folder / f"{self.output.name}.replaced"

    def commit(self, *, force: bool) -> None:
        """Put what is staged in the output's place, in one step where the system has one."""
        with plain_errors(self.output):
            if _rename(self.path, self.output, _NO_REPLACE):
                pass
            elif not force:
                raise TltError(f"{self.output}: came into being during the work; pass --force to replace it")
            elif not _rename(self.path, self.output, _EXCHANGE):
                self.output.rename(self.aside)
                self.path.rename(self.output)
            sync_folder(self.output.parent)


def absolute(output: Path) -> Path:
    """The output's path from the root, with the links of its folder resolved, but not a link that it may be itself."""
    if output.name in ("", ".."):
        output = Path(os.path.realpath(output))
        if not output.name:
            raise TltError(f"{output}: cannot be an output; name a file or a folder: -o PATH")
    return Path(os.path.realpath(output.parent), output.name)


def check_output(output: Path, sources: Collection[Path], *, force: bool) -> None:
    """TltError if `output` is, holds or lies in one of `sources`, or exists and may not be replaced."""
    stage = Stage(absolute(output))
    above = next(folder for folder in stage.output.parents if folder.exists())
    if not above.is_dir():
        raise TltError(f"{output}: {above} is not a folder; write elsewhere: -o PATH")
    for source in map(Path, {os.path.realpath(source) for source in sources}):
        for written in (stage.output, Path(os.path.realpath(output)), stage.folder):
            if written == source or written in source.parents or source in written.parents:
                raise TltError(f"{output}: is, holds or lies in the input {source}; write elsewhere: -o PATH")
    if not os.path.lexists(output):
        return
    if not force:
        raise TltError(f"{output}: exists already; pass --force to replace it, or write elsewhere: -o PATH")
    if not (output.is_symlink() or output.is_file() or output.is_dir()):
        raise TltError(f"{output}: is a device, a pipe or a socket, which is never replaced; write elsewhere: -o PATH")
    here = Path(os.path.realpath(os.curdir))
    if stage.output == here or stage.output in here.parents:
        raise TltError(f"{output}: is the current folder or holds it, and cannot be replaced; write elsewhere: -o PATH")
    if output.is_dir() and not output.is_symlink():
        suffixes = [path.suffix.lower() for path in output.iterdir()]
        if suffixes and not set(suffixes) & set(SAFE_SUFFIXES):
            raise TltError(f"{output}: is a folder with no checkpoint in it, which --force does not replace; delete it")


def check_room(output: Path, wanted: int) -> None:
    """TltError if `wanted` bytes are more than the disk of `output` has free."""
    folder, free = free_space(output)
    if wanted > free:
        raise TltError(
            f"{output}: would take {wanted:,} bytes, but {folder} has {free:,} free; make room, or use -o PATH"
        )


def free_space(output: Path) -> tuple[Path, int]:
    """The nearest folder above `output` that exists, and the bytes that its disk has free."""
    folder = absolute(output).parent
    while not folder.exists():
        folder = folder.parent
    return folder, shutil.disk_usage(folder).free


@contextmanager
def staged(output: Path, *, force: bool) -> Iterator[Stage]:
    """A cleared stage for `output` (an absolute path), locked; gone at the end, committed or not."""
    stage = Stage(output)
    missing = [folder for folder in output.parents if not folder.exists()]
    done = False
    try:
        with plain_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
        with locked(stage):
            try:
                with plain_errors(output):
                    _clear(stage)
                    stage.folder.mkdir()
                yield stage
                done = True
            finally:
                with plain_errors(stage.folder):
                    _clear(stage)
    finally:
        if not done:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written, as one TltError line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TltError(
                f"{path}: the disk is full; nothing was kept; make room, or write elsewhere: -o PATH"
            ) from error
        raise TltError(f"{path}: cannot write: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(stage: Stage) -> Iterator[None]:
    """The stage is this run's alone. Raises TltError while another run has it."""
    import fcntl

    path = stage.output.with_name(f"{stage.folder.name}.lock")
    while True:
        with plain_errors(path):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            with plain_errors(path):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise TltError(
                        f"{stage.output}: another run is writing it; wait for that, or use -o PATH"
                    ) from None
            # The holder before may have deleted the file between our open and our lock: then it guards nothing.
            if not _is_at(descriptor, path):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _clear(stage: Stage) -> None:
    """Delete the stage; first give back an output that a killed run had moved aside and not yet replaced."""
    if not os.path.lexists(stage.folder):
        return
    ours = {stage.path, stage.aside}
    if stage.folder.is_symlink() or not stage.folder.is_dir() or not ours.issuperset(stage.folder.iterdir()):
        raise TltError(f"{stage.folder}: is in the way, and tlt did not make it; move it, or write elsewhere: -o PATH")
    if os.path.lexists(stage.aside) and not os.path.lexists(stage.output):
        stage.aside.rename(stage.output)
    shutil.rmtree(stage.folder)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Linux's renameat2, since os.rename can neither exchange nor refuse to replace. False if it cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return _rename_elsewhere(source, target, flag)
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return _rename_elsewhere(source, target, flag)
    if number == errno.EEXIST:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _rename_elsewhere(source: Path, target: Path, flag: int) -> bool:
    """The same on a system or a disk without it: no exchange, and a look before the rename."""
    if flag == _EXCHANGE or os.path.lexists(target):
        return False
    source.rename(target)
    return True
