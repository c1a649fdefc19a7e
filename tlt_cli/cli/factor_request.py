"""The options of `tlt factor` as one request: which go together, and what follows where one is not given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlt_cli.errors import UsageError, nearest
from tlt_cli.families.factors import BITS
from tlt_cli.surgery.factor import ALLOCATIONS, GLOBAL, UNIFORM, check_keep
from tlt_cli.surgery.metrics import check_method, needs_gradients, needs_text

LOWRANK, DENSE = "lowrank", "dense"
FORMATS = (LOWRANK, DENSE)
REFINEMENTS = ("none", "drift", "block")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `tlt factor`, as typed. Whatever can never work is refused here."""

    rank: int | None = None
    keep: float | None = None
    energy: float | None = None
    method: str | None = None
    calibration: Sequence[Path] | None = None
    allocate: str | None = None
    refine: str | None = None
    align: int = 1
    only: Sequence[str] = ()
    format: str = LOWRANK
    bits: int | None = None
    eval: Sequence[Path] | None = None
    context: int | None = None
    max_perplexity: float | None = None
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
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            check_method(self.method)
        _one_of("--format", self.format, FORMATS)
        if self.bits not in (None, BITS):
            raise UsageError(f"--bits {self.bits}: factors are 8-bit integers with --bits {BITS}, or floats without")
        if self.bits is not None and self.format == DENSE:
            raise UsageError(f"--bits {self.bits} is for factors, and --format dense writes none; drop one of them")
        _one_of("--allocate", self.allocate, ALLOCATIONS)
        _one_of("--refine", self.refine, REFINEMENTS)
        given = [name for name in ("rank", "keep", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]} both say how small; give one of them")
        if self.keep is not None:
            check_keep(self.keep)
        if self.calibration and self.method == "svd":
            raise UsageError("--method svd weighs by no text; drop --calibration, or take --method whiten")
        if self.refine not in (None, "none") and not (self.calibration or needs_text(self.weighing)):
            raise UsageError(f"--refine {self.refine} fits to a text; say --calibration TEXT")
        if self.allocate == GLOBAL and self.keep is None:
            raise UsageError("--allocate global shares out a budget; say --keep with it")
        if self.max_perplexity is not None and not self.max_perplexity > 1:
            raise UsageError(
                f"--max-perplexity {self.max_perplexity}: expected more than 1, the perplexity of certainty"
            )

    @property
    def weighing(self) -> str:
        """The method, as given or by default."""
        return self.method or ("kfac" if self.calibration else "svd")

    @property
    def sharing(self) -> str:
        """How a budget is shared out, as given or by default: raw energies of different matrices do not compare."""
        return self.allocate or (GLOBAL if self.keep is not None and needs_gradients(self.weighing) else UNIFORM)

    @property
    def refining(self) -> str:
        """How far weights are refit, as given or by default: all the way where the text decides everything else."""
        return self.refine or ("block" if self.sharing == GLOBAL and self.weighing == "kfac" else "none")

    @property
    def compresses(self) -> bool:
        """Whether the text does more than weigh: choose among structures, or refit."""
        return self.refining != "none" or (self.sharing == GLOBAL and self.weighing == "kfac")

    @property
    def looks(self) -> bool:
        """Whether the ranks depend on values, not on shapes alone."""
        return self.energy is not None or self.sharing == GLOBAL

    @property
    def reads(self) -> str | None:
        """The option by which values decide what is written, and not shapes alone."""
        if needs_text(self.weighing):
            return f"--method {self.weighing}"
        return "--energy" if self.energy is not None else "--allocate global" if self.looks else None

    def sweeps(self, *, asked: bool, ranks: str | None) -> bool:
        """Whether this is a sweep. UsageError where the options are not clear on that."""
        sized = next((name for name in ("rank", "keep", "energy") if getattr(self, name) is not None), None)
        wanted = asked or ranks is not None or (self.max_perplexity is not None and sized is None)
        if wanted and self.bits is not None:
            raise UsageError(f"--bits {self.bits} is for one model, and a sweep tells of many; say which with --rank")
        if wanted and sized is not None:
            raise UsageError(f"--{sized} says how small and --rank-sweep tries every rank; give one of them")
        if not wanted and sized is None:
            raise UsageError(
                "say how small: --rank R, --keep 0.8 or --energy 0.99; or look at every rank: --rank-sweep"
            )
        return wanted


def _one_of(option: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise UsageError(f"{option} {value}: unknown{nearest(value, known)}; expected {', '.join(known)}")
