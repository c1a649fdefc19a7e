"""The options of `tlt slice` as one request: what goes together, what its output and its record are called."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tlt_cli.errors import UsageError
from tlt_cli.model.nested import parse_block
from tlt_cli.surgery.slice import ORDERS, Wanted
from tlt_cli.surgery.targets import Sizes


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of the command."""

    sizes: Sizes = field(default_factory=Sizes)
    size: str | None = None
    level: int | None = None
    block: str | None = None
    norm: str | None = None
    order: str = "prefix"
    calibration: Sequence[Path] | None = None
    refit: bool = False
    context: int | None = None
    data: Sequence[Path] | None = None
    tokenizer: str | None = None
    family: str | None = None
    axes: Sequence[str] | None = None
    output: Path | None = None
    force: bool = False
    dry_run: bool = False
    max_shard_size: str | None = None
    verify: bool = True
    jobs: int | None = None
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UsageError(f"--order {self.order} is not known; take one of {', '.join(ORDERS)}")
        if not self.calibrates and (self.calibration or self.context):
            raise UsageError("--calibration is a text to order or refit on; add --order importance, pca, or --refit")
        if self.data and not self.verify:
            raise UsageError("--data is a text to verify on, and --no-verify verifies nothing; drop one of the two")

    @property
    def calibrates(self) -> bool:
        """Whether a text decides what is written."""
        return self.order != "prefix" or self.refit

    @property
    def cuts_a_block(self) -> bool:
        """Whether a block is to be cut further, which only one of merged models can be."""
        cut = self.size is not None or self.sizes.named() or self.calibrates
        return self.block is not None and self.level is None and bool(cut)

    @property
    def reads(self) -> str | None:
        """The options by which values decide what is written, and not shapes alone."""
        return "--refit" if self.refit else None if self.order == "prefix" else f"--order {self.order}"

    @property
    def wanted(self) -> Wanted:
        """What to keep. UsageError where that is not clear."""
        if self.calibrates and (self.level is not None or self.block is not None):
            raise UsageError("--level and --block keep what they name: --order and --refit go with sizes")
        block = None if self.block is None else parse_block(self.block)
        return Wanted(sizes=self.sizes, size=self.size, level=self.level, block=block, norm=self.norm)


def named(request: Request) -> str:
    """What is kept, as a part of a file's name."""
    words = [f"{name.replace('_', '')}{size}" for name, size in request.sizes.named().items()]
    words += [f"size{request.size.replace('/', 'of')}"] if request.size else []
    words += [f"level{request.level}"] if request.level is not None else []
    words += [f"block{request.block.replace('/', 'of')}"] if request.block else []
    words += [request.order] if request.order != "prefix" else []
    return "-".join([*words, *(["refit"] if request.refit else [])])


def command(source: str, request: Request, dtype: str | None) -> str:
    """The command that makes the same bytes from the same source: no paths, no words on how to print."""
    words = ["tlt", "slice", source]
    for name, size in request.sizes.named().items():
        words += [f"--{name.replace('_', '-')}", str(size)]
    for name, value in (
        ("size", request.size), ("level", request.level), ("block", request.block), ("norm", request.norm),
        ("order", request.order if request.order != "prefix" else None), ("context", request.context),
        ("dtype", dtype.lower() if dtype else None), ("max-shard-size", request.max_shard_size),
        ("family", Path(request.family).name if request.family else None),
    ):  # fmt: skip
        words += [f"--{name}", str(value)] if value is not None else []
    for text in request.calibration or ():
        words += ["--calibration", text.name]
    words += ["--refit"] if request.refit else []
    for axis in request.axes or ():
        words += ["--axis", axis]
    return shlex.join(words)
