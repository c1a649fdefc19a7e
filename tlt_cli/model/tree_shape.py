"""What a tree of LoRAs is made of, and how it goes from soft to hard: functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tlt_cli.errors import TltError, UsageError

FORMS, ROUTES = ("path", "leaf"), ("running", "prefix", "token")
DEEPEST = 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a tree is made of. Raises UsageError naming the option for what cannot be.

    In the "path" form every node has a LoRA of `rank` and the update of a leaf is the sum from the root down, of rank
    `rank * (depth + 1)`; in the "leaf" form leaves alone have one. Routers read the mean of the stream behind the
    embedding over the tokens so far ("running"), or over the first `prefix` of them ("prefix"); or each block has
    routers of its own that read what the block does, token by token ("token"). The scale is alpha / rank; an alpha that
    is not given is twice the rank. `targets` are globs for modules, all linears of blocks where there are none.
    """

    depth: int = 2
    rank: int = 8
    alpha: float | None = None
    form: str = "path"
    route: str = "running"
    prefix: int = 32
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= DEEPEST:
            raise UsageError(f"a tree of depth {self.depth}: expected 1 to {DEEPEST}; it has 2^depth leaves")
        if self.rank < 1:
            raise UsageError(f"--rank {self.rank}: expected at least 1")
        if self.prefix < 1:
            raise UsageError(f"a prefix of {self.prefix} tokens has no mean; expected at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UsageError(f"--alpha {self.alpha}: expected a number above 0")
        if self.form not in FORMS:
            raise UsageError(f"a tree of the form {self.form!r} is not known; take one of {', '.join(FORMS)}")
        if self.route not in ROUTES:
            raise UsageError(f"--route {self.route} is not known; take one of {', '.join(ROUTES)}")

    @property
    def leaves(self) -> int:
        """L = 2^depth."""
        return 1 << self.depth

    @property
    def nodes(self) -> int:
        """N, how many LoRAs there are: 2 L - 1 in the path form, L in the leaf form."""
        return 2 * self.leaves - 1 if self.form == "path" else self.leaves

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    @property
    def active(self) -> int:
        """The rank of what one leaf adds."""
        return self.rank * (self.depth + 1) if self.form == "path" else self.rank

    def check_leaf(self, leaf: int) -> None:
        """UsageError for a leaf that is not there, TltError where leaves are no models of their own."""
        if self.route == "token":
            raise TltError(
                "this tree routes in every layer anew (route token), so a token's way leads through several leaves and "
                "none is a model of its own; trees with the route running or prefix have leaves to fold and to export"
            )
        if not 0 <= leaf < self.leaves:
            raise UsageError(f"--leaf {leaf}: this tree has the leaves 0 to {self.leaves - 1}")

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "alpha": self.scale * self.rank, "targets": list(self.targets)}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Shares are of all steps.

    `harden` and `balance` weigh, in nats, undecided tokens and uneven leaves; hardening is 0 up to `soft`, then rises
    in a line and is whole at `firm`. Logits of routers are divided by a temperature that falls from 1 to `coldest`
    over the same time. Over the last `served` share the model computes what will be served, gradients go on as if it
    were soft. `warm_up` is when the last level opens; before it, levels open one by one.
    """

    harden: float = 0.5
    balance: float = 0.5
    soft: float = 0.3
    firm: float = 0.7
    coldest: float = 0.1
    served: float = 0.1
    warm_up: float = 0.0

    def weights(self, step: int, steps: int) -> tuple[float, float]:
        """Those of hardening and balance at a step, counted from 0."""
        return self.harden * self._risen(step, steps), self.balance

    def temperature(self, step: int, steps: int) -> float:
        """What routers' logits are divided by."""
        return float(self.coldest ** self._risen(step, steps))

    def straight(self, step: int, steps: int) -> bool:
        """Whether each token takes one way already, in training too."""
        return step >= round((1 - self.served) * steps)

    def level(self, step: int, steps: int, depth: int) -> int:
        """The deepest level in use: with a warm-up one more each time that an equal share of it has passed."""
        opened = round(self.warm_up * steps)
        return depth if step >= opened else depth * max(0, step) // max(1, opened)

    def _risen(self, step: int, steps: int) -> float:
        begin, end = self.soft * steps, self.firm * steps
        return min(1.0, max(0.0, (step - begin) / max(1.0, end - begin)))


# A tree that is trained on stays as hard as it is served: its routers' logits are cold already.
SERVED = Schedule(soft=0.0, firm=0.0, coldest=1.0, served=1.0)
