"""What a family table says, as data: the axes, a row per tensor, who feeds whom, and how a block computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tlt_cli.axes import Arrow
from tlt_cli.families.expression import Expression


@dataclass(frozen=True)
class Module:
    """Where a role lives: a module name with `{layer}` left in, and the slice of it when several roles are fused."""

    name: str
    part: int | None = None


@dataclass(frozen=True)
class Family:
    """One model family. `rows` maps tensor-name patterns (with `{layer}`) to arrows; `roles` maps roles to modules.

    `defaults` are what an absent config key means, `derived` what an absent or null size key without a default means;
    `biases` maps a switch of config.json to the roles that have a bias where it is true. Where the names of a bare file
    fit several families, the one of the lowest `precedence` is taken.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    prefix: str
    precedence: int
    axes: Mapping[str, Expression]
    derived: Mapping[str, Expression]
    multiples: Mapping[str, str]
    defaults: Mapping[str, Any]
    rows: Mapping[str, Arrow]
    biases: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]
    roles: Mapping[str, Module]
    buffers: tuple[str, ...]
    rules: Mapping[str, Any]
    text: str

    @property
    def head_axes(self) -> tuple[str, ...]:
        """The axes whose product is the number of query heads."""
        return tuple(axis for axis in ("kv", "group") if axis in self.axes)

    @property
    def head_size_axis(self) -> str:
        """The axis that head_dim grows along: half of it where positions rotate, all of it elsewhere."""
        return "rotary" if "rotary" in self.axes else "channel"
