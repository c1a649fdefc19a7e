"""How a run trains: sizes, rates, seeds. The same recipe on the same data gives the same weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tlt_cli.errors import UsageError

SCHEDULES = ("wsd", "cosine", "linear")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A step sees `batch` windows of `context` tokens, over all processes. `warm_up` and `decay` are counted in steps.

    `betas` and `weight_decay` are AdamW's (arXiv:1711.05101); only matrices decay. `clip` bounds the norm of all
    gradients together; 0 turns it off. Raises UsageError naming the option for what cannot be.
    """

    steps: int
    learning_rate: float = 1e-3
    batch: int = 8
    context: int = 128
    optimizer: str = "adamw"
    schedule: str = "wsd"
    warm_up: int | None = None
    decay: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} {getattr(self, name)} is not known; take one of {', '.join(known)}")
        for option, value in (("steps", self.steps), ("batch-size", self.batch), ("context", self.context)):
            if value < 1:
                raise UsageError(f"--{option} {value}: expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"--lr {self.learning_rate}: expected a rate above 0")
        counts = (("warm-up", self.warm_up or 0), ("decay", self.decay or 0))
        for option, size in (("weight-decay", self.weight_decay), ("clip", self.clip), *counts):
            if not 0 <= size < math.inf:
                raise UsageError(f"--{option} {size}: expected at least 0")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed {self.seed} is not a whole number from 0 to 2^63 - 1")

    @property
    def warming(self) -> int:
        """Steps over which the rate rises: a tenth of all, at most 200, unless told."""
        return min(200, max(1, self.steps // 10)) if self.warm_up is None else self.warm_up

    @property
    def decaying(self) -> int:
        """Steps over which a "wsd" rate falls at the end: a fifth of all unless told."""
        return max(1, self.steps // 5) if self.decay is None else self.decay

    @property
    def tokens(self) -> int:
        """Tokens that a step reads."""
        return self.batch * self.context

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0.

        It rises in a line over the warm-up. Then "wsd" (warm-up, stable, decay: arXiv:2404.06395) holds it and falls
        in a line over the last steps, "linear" falls at once, and "cosine" (arXiv:1608.03983) follows half a wave to a
        tenth.

        >>> [Recipe(steps=6, learning_rate=1, schedule="linear", warm_up=2).rate(step) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        return self.learning_rate * self._share(step)

    def _share(self, step: int) -> float:
        warm = self.warming
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "cosine":
            return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))
        falling = self.steps - warm if self.schedule == "linear" else min(self.decaying, self.steps - warm)
        return min(1.0, (self.steps - step) / falling) if falling else 1.0

    def data(self) -> dict[str, Any]:
        """As JSON has it: what a resumed run must agree on."""
        return {**asdict(self), "betas": list(self.betas)}
