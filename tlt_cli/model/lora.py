"""LoRA (arXiv:2106.09685): beside a frozen linear W a product of two narrow matrices, y = W x + s B A x.

Modules that read the same input keep their A in one stack, so that query, key and value cost one narrow product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.sites import Site, choose, named, reading_alike, sites
from tlt_cli.model.step import Step


@dataclass(frozen=True)
class LowRankUpdate:
    """What one module gets: its rank, and alpha, of which and the rank the scale is made."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r), which keeps large ranks as loud as small ones (rsLoRA, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def updates(
    decoder: Decoder,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Iterable[str] = (),
    ranks: Mapping[str, int] = {},
    alphas: Mapping[str, float] = {},
    rslora: bool = False,
) -> dict[str, LowRankUpdate]:
    """What every module gets, by its name: the modules that `targets` mean, all linears of blocks without any.

    `ranks` and `alphas` are exceptions: the first glob that means a module decides; the rank 0 leaves it alone. An
    alpha that is not given is twice the module's rank, so that a scale of alpha / r does not depend on it. Raises
    TltError for globs that mean no module, ranks below 0 or of a whole matrix, and where nothing is left.
    """
    chosen = choose(sites(decoder), targets)
    for pattern in (*ranks, *alphas):
        choose(chosen, [pattern])
    found = {}
    for site in chosen:
        own = next((value for pattern, value in ranks.items() if named(site.module, pattern)), rank)
        full = min(site.inputs, sum(site.outputs))
        if not 0 <= own <= full:
            raise TltError(f"LoRA of rank {own} for {site.module}: wanted a rank from 1 to {full}")
        if own:
            loud = next((value for pattern, value in alphas.items() if named(site.module, pattern)), alpha)
            found[site.module] = LowRankUpdate(own, 2.0 * own if loud is None else float(loud), rslora)
    if not found:
        raise TltError("LoRA of rank 0 on every module changes nothing; wanted a rank of at least 1")
    return found


@dataclass(frozen=True)
class _Spot:
    """Where a role's update is: the stack of A that it shares, the parameter B, its part of it, its scale."""

    stack: str
    piece: int
    left: str
    part: int | None
    parts: int
    scale: float


class Lora(nn.Module):
    """An adapter for a decoder: `decoder.adapter = Lora(decoder, updates(decoder, rank=8))`.

    `a["0:query+key+value"]` stacks the A [r, in] of the modules of a layer that read the same, `b["0:query"]` is the
    transpose [r, out] of one module's B, all of its fused parts side by side: so that no product, forwards or
    backwards, has a narrow matrix on its right, which takes a CPU twice as long. A starts as PEFT starts it, uniform
    with the variance of 1 / (3 in), drawn with `generator` in the order of the modules; B starts at zero: nothing
    changes yet.
    """

    def __init__(
        self,
        decoder: Decoder,
        chosen: Mapping[str, LowRankUpdate],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        device = decoder.device if device is None else device
        self.updates = dict(chosen)
        self.all_sites = sites(decoder)  # with those that are left alone
        self.sites = [site for site in self.all_sites if site.module in chosen]
        assert len(self.sites) == len(chosen), "updates are for modules of this decoder"
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self._spots: dict[tuple[str, int], _Spot] = {}
        self._ranks: dict[str, list[int]] = {}
        self._users: dict[str, int] = {}
        self._rows: dict[str, tuple[str, int, int, str]] = {}  # by module: stack, rows from and to, key of its B
        for group in reading_alike(self.sites):
            self._add(group, dtype, device, generator)
        # what was made of the input in use, until the last of its readers has asked: input, pieces, readers to come
        self._read: tuple[Tensor, list[Tensor], dict[str, tuple[Tensor, ...]], int] | None = None

    def _add(
        self, group: list[Site], dtype: torch.dtype, device: torch.device | str, generator: torch.Generator | None
    ) -> None:
        stack = f"{group[0].layer}:{'+'.join(role for site in group for role in site.roles)}"
        drawn, start = [], 0
        for piece, site in enumerate(group):
            update, key = self.updates[site.module], f"{site.layer}:{'+'.join(site.roles)}"
            bound = 1 / math.sqrt(site.inputs)  # kaiming_uniform_ with a = sqrt(5)
            drawn.append(torch.empty(update.rank, site.inputs).uniform_(-bound, bound, generator=generator))
            self.b[key] = nn.Parameter(torch.zeros(update.rank, sum(site.outputs), dtype=dtype, device=device))
            self._rows[site.module] = (stack, start, start + update.rank, key)
            start += update.rank
            for part, role in enumerate(site.roles):
                whole = len(site.roles) == 1
                self._spots[role, site.layer] = _Spot(
                    stack, piece, key, None if whole else part, len(site.roles), update.scale
                )
        self.a[stack] = nn.Parameter(torch.cat(drawn).to(device, dtype))
        self._ranks[stack] = [self.updates[site.module].rank for site in group]
        self._users[stack] = sum(len(site.roles) for site in group)

    # --- as an adapter -----------------------------------------------------------------------------------------

    def begin(self, x: Tensor, step: Step) -> None:
        """Forget what an unfinished pass has left."""
        self._read = None

    def add(self, y: Tensor, x: Tensor, role: str, layer: int) -> Tensor:
        """y + s B A x, in the dtype of y [B, T, out]; x [B, T, in]."""
        spot = self._spots.get((role, layer))
        if spot is None:
            return y
        kept = self._read
        if kept is None or kept[0] is not x:
            right = self.a[spot.stack]
            narrow = torch.mm(right if right.dtype == x.dtype else right.to(x.dtype), x.flatten(0, -2).T)  # [r, B T]
            ranks = self._ranks[spot.stack]
            pieces = [narrow] if len(ranks) == 1 else list(torch.split(narrow, ranks))
            kept = (x, pieces, {}, self._users[spot.stack])
        _, pieces, lefts, users = kept
        self._read = (x, pieces, lefts, users - 1) if users > 1 else None
        left: Tensor = self.b[spot.left]
        if spot.part is not None:
            if spot.left not in lefts:  # one cut for all parts: going back it is one concatenation
                lefts[spot.left] = left.chunk(spot.parts, dim=1)
            left = lefts[spot.left][spot.part]
        narrow = pieces[spot.piece]
        left = left if left.dtype == narrow.dtype else left.to(narrow.dtype)
        return torch.addmm(y.flatten(0, -2), narrow.T, left, alpha=spot.scale).view_as(y)

    def advance(self, step: int, steps: int) -> None:
        """Nothing changes with the step."""

    def penalty(self, step: int, steps: int, mean: Callable[[Tensor], Tensor]) -> Tensor | None:
        """No loss of its own."""
        return None

    def report(self) -> dict[str, float | list[float]]:
        """No numbers of its own."""
        return {}

    # --- module by module --------------------------------------------------------------------------------------

    def matrices(self) -> Iterator[tuple[Site, LowRankUpdate, Tensor, Tensor]]:
        """Every site with its update and its A [r, in] and B [out, r]: views of the parameters, to read or to set."""
        for site in self.sites:
            stack, start, stop, key = self._rows[site.module]
            yield site, self.updates[site.module], self.a[stack].detach()[start:stop], self.b[key].detach().T

    @torch.no_grad()
    def set(self, module: str, a: Tensor, b: Tensor) -> None:
        """Copy A [r, in] and B [out, r] of one module in."""
        stack, start, stop, key = self._rows[module]
        self.a[stack][start:stop].copy_(a)
        self.b[key].copy_(b.T)
