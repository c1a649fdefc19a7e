"""A binary tree of LoRAs beside a frozen decoder: routers send every token down to a leaf, each node adds its update.

Soft, as it is trained, every node counts with the chance that it is reached: one narrow product in, a gate on the rank,
one product out, so that a tree of N nodes of rank r costs what a LoRA of rank N r does. Hard, as it is served, only the
nodes on one way down count, each in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.sites import Site, choose, reading_alike, sites
from tlt_cli.model.step import Step
from tlt_cli.model.tree_routes import causal_mean, entropy, greedy, log_reach, one_path, spread, unit, wide
from tlt_cli.model.tree_shape import Schedule, Shape


class Tree(nn.Module):
    """An adapter for a decoder: `decoder.adapter = Tree(decoder, Shape(depth=2, rank=8))`.

    `a["0:query+key+value"]` stacks, module after module that reads the same, A [N r, in]; `b["0:query"]` is one
    module's B [out, N r]. Node n has the n-th r rows and columns, in heap order; in the leaf form leaf n has. A is
    drawn as PEFT does it, B is zero. `router` [R, L - 1, H] and `bias` [R, L - 1] are of R = 1 routers, or one for each
    layer.

    Nothing that a call computes depends on later tokens or on other rows. `hard` is how a tree is served: each router
    says yes or no. `locked` keeps to one leaf whatever the routers say: its number, or one for each layer.

    Raises TltError for targets that mean no module, and for a rank that a module cannot have.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: Shape,
        *,
        schedule: Schedule | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = decoder.device if device is None else device
        self.shape, self.schedule = shape, schedule or Schedule()
        self.hard = False
        self.locked: int | Sequence[int] | None = None
        self.level, self.temperature, self.straight = shape.depth, 1.0, False
        self.sites = choose(sites(decoder), shape.targets)
        for site in self.sites:
            if shape.rank > (full := min(site.inputs, sum(site.outputs))):
                raise TltError(
                    f"--rank {shape.rank}: a tree of LoRAs of that rank beside {site.module}: wanted 1 to {full}"
                )
        self.layers, hidden = int(decoder.description["layers"]), decoder.sizes(0)["output"][0]
        generator, width = torch.Generator().manual_seed(seed), shape.nodes * shape.rank
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self._spots: dict[tuple[str, int], tuple[str, int, str, int, int]] = {}  # stack, piece, key of B, part, parts
        self._users: dict[str, int] = {}
        for group in reading_alike(self.sites):
            stack = f"{group[0].layer}:{'+'.join(role for site in group for role in site.roles)}"
            bound, drawn = 1 / math.sqrt(group[0].inputs), torch.empty(len(group) * width, group[0].inputs)
            self.a[stack] = nn.Parameter(drawn.uniform_(-bound, bound, generator=generator).to(device))
            self._users[stack] = sum(len(site.roles) for site in group)
            for piece, site in enumerate(group):
                key = f"{site.layer}:{'+'.join(site.roles)}"
                self.b[key] = nn.Parameter(torch.zeros(sum(site.outputs), width, device=device))
                for part, role in enumerate(site.roles):
                    self._spots[role, site.layer] = stack, piece, key, part, len(site.roles)
        routers = self.layers if shape.route == "token" else 1
        start = torch.randn(routers, shape.leaves - 1, hidden, generator=generator) / math.sqrt(hidden)
        self.router = nn.Parameter(start.to(device))
        self.bias = nn.Parameter(torch.zeros(routers, shape.leaves - 1, device=device))
        # sums of what was routed outside training: soft and hard use by leaf, entropy, and how many tokens
        self.tally: Tensor
        self.register_buffer(
            "tally", torch.zeros(routers, 2 * shape.leaves + 2, dtype=torch.float64, device=device), persistent=False
        )
        self._gates: Tensor | None = None
        self._chances: list[Tensor] = []  # logarithms, of the leaves in use: [B, T, L], by router
        self._ways: list[Tensor] = []  # 1.0 at the leaf of the hard way: [B, T, L], by router
        # what was made of the input in use, until the last of its readers has asked: input, pieces, readers to come
        self._read: tuple[Tensor, tuple[Tensor, ...], int] | None = None

    # --- as an adapter -----------------------------------------------------------------------------------------

    def begin(self, x: Tensor, step: Step) -> None:
        """Route by the stream behind the embedding, x [B, T, H], where that is what routers read."""
        self._read, self._gates, self._chances, self._ways = None, None, [], []
        if self.shape.route != "token":
            self._gates = self._route(x, None if self.locked is not None else self.mean(x, step), 0)

    def mean(self, x: Tensor, step: Step) -> Tensor:
        """What the routers of the running and the prefix route read, [B, T, H], of the stream x [B, T, H]."""
        return causal_mean(x, step, self.shape.prefix if self.shape.route == "prefix" else None)

    def add(self, y: Tensor, x: Tensor, role: str, layer: int) -> Tensor:
        """y + scale B gate(A x), in the dtype of y [B, T, out]; x [B, T, in]."""
        if self.shape.route == "token" and role == "query":  # the first to read what the block reads
            self._gates = self._route(x, None if self.locked is not None else unit(wide(x)), layer)
        spot = self._spots.get((role, layer))
        if spot is None:
            return y
        assert self._gates is not None, "a pass begins with begin"
        stack, piece, key, part, parts = spot
        kept = self._read
        if kept is None or kept[0] is not x:
            right = self.a[stack]
            narrow = functional.linear(x, right if right.dtype == x.dtype else right.to(x.dtype)).flatten(0, -2)
            width = self._gates.shape[-1]
            gated = torch.unflatten(narrow, -1, (-1, width)) * self._gates.to(narrow.dtype)[:, None]
            kept = (x, gated.unbind(1), self._users[stack])
        _, pieces, users = kept
        self._read = (x, pieces, users - 1) if users > 1 else None
        left: Tensor = self.b[key]
        left = left if parts == 1 else left.chunk(parts)[part]
        left = left if left.dtype == y.dtype else left.to(y.dtype)
        flat = y.flatten(0, -2)
        return torch.addmm(flat, pieces[piece].to(y.dtype), left.T, alpha=self.shape.scale).view_as(y)

    def _route(self, x: Tensor, source: Tensor | None, router: int) -> Tensor:
        """The gate on every entry of the rank, [B T, N r] or [1, N r], in the dtype of x; source [B, T, H] is read."""
        if source is None:
            assert self.locked is not None
            leaf = self.locked if isinstance(self.locked, int) else self.locked[router]
            levels = one_path(leaf, self.shape.depth, x)
            return self._by_rank(levels)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.router[router].to(source.dtype), self.bias[router].to(source.dtype)
            logits = functional.linear(source, weight, bias) / self.temperature
            log = log_reach(logits)
            levels = greedy(logits) if self.hard else [one.exp() for one in log]
            if self.training:
                self._chances.append(log[self.level])
                if self.straight and not self.hard:  # forward one way alone, backward as if soft
                    levels = [way + soft - soft.detach() for way, soft in zip(greedy(logits), levels, strict=True)]
            else:
                self._ways.append((levels if self.hard else greedy(logits))[-1])
                self._count(log[-1], self._ways[-1], router)
        return self._by_rank(levels).to(x.dtype)

    def _by_rank(self, levels: list[Tensor]) -> Tensor:
        """Gates of nodes, level by level as `log_reach`, for each entry of the rank: [B T, N r]."""
        depth, level = self.shape.depth, self.level
        if self.shape.form == "path":
            off = [torch.zeros_like(one) for one in levels[level + 1 :]]
            nodes = torch.cat([*levels[: level + 1], *off], -1)
        elif level == depth:
            nodes = levels[depth]
        else:  # a leaf that has not split yet stands where its first child will
            own = levels[level][..., None]
            nodes = functional.pad(own, (0, (1 << (depth - level)) - 1)).flatten(-2)
        wide_gates = nodes[..., None].expand(*nodes.shape, self.shape.rank).flatten(-2)
        return wide_gates.reshape(-1, wide_gates.shape[-1])

    # --- training ----------------------------------------------------------------------------------------------

    def advance(self, step: int, steps: int) -> None:
        """Before the first pass of a step: how soft and how deep the tree is by now, a function of the step alone.

        Where a level opens, leaves split in two that compute what they did: the function is kept.
        """
        before, self.level = (self.schedule.level(at, steps, self.shape.depth) for at in (step - 1, step))
        self.temperature = self.schedule.temperature(step, steps)
        self.straight = self.schedule.straight(step, steps)
        if step > 0 and self.shape.form == "leaf":
            for level in range(before, self.level):
                self._split(level)

    @torch.no_grad()
    def _split(self, level: int) -> None:
        """Leaf form: each of the 2^level leaves in use is copied to where its second child will be."""
        rank, stride = self.shape.rank, 1 << (self.shape.depth - level)
        for matrix in [
            *(a.unflatten(0, (-1, self.shape.leaves, rank)) for a in self.a.values()),
            *(b.T.unflatten(0, (1, self.shape.leaves, rank)) for b in self.b.values()),
        ]:
            matrix[:, stride // 2 :: stride] = matrix[:, ::stride]

    def penalty(
        self, step: int, steps: int, mean: Callable[[Tensor], Tensor] = lambda of_rows: of_rows
    ) -> Tensor | None:
        """What routing costs in the last pass, in nats: undecided tokens, and leaves that take too much or too little.

        harden * E[H(leaf)] / log L + balance * (1 - H(E[leaf]) / log L), the mean over routers. E runs over the tokens
        of this pass, of which `mean` makes those of all processes: with gradient accumulation those of a micro-batch.
        """
        chances, self._chances = self._chances, []
        if not chances or self.level == 0:
            return None
        harden, balance = self.schedule.weights(step, steps)
        undecided = torch.stack([entropy(log).mean() for log in chances])
        taken = mean(torch.stack([log.exp().flatten(0, -2).mean(0) for log in chances]))
        return (harden * undecided + balance * (1 - spread(taken))).mean()

    # --- what is going on --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(self, log: Tensor, way: Tensor, router: int) -> None:
        sums = log.exp().flatten(0, -2).sum(0), way.flatten(0, -2).sum(0), entropy(log).sum()[None]
        count = torch.full_like(sums[-1], log.numel() // log.shape[-1])
        self.tally[router] += torch.cat([*sums, count]).double()

    def report(self) -> dict[str, float | list[float]]:
        """What the passes outside training did since the last report.

        `entropy`: of leaves, a share of log L, 0 where every token is decided; `usage`: the share of tokens that each
        leaf serves; `dead_leaves`: below a quarter of their fair share; `effective_leaves`: exp of the usage's entropy.
        With routers in every layer the mean over layers, and dead leaves are counted in all of them. `tally` holds the
        sums: added up over processes, before, they give the report of all.
        """
        leaves, tally = self.shape.leaves, self.tally.clone()
        self.tally.zero_()
        if not float(tally.sum()):
            return {}
        share = tally / tally[:, -1:]
        usage = share[:, leaves : 2 * leaves]
        return {
            "entropy": float(share[:, -2].mean()),
            "usage": usage.mean(0).tolist(),
            "soft_usage": share[:, :leaves].mean(0).tolist(),
            "dead_leaves": float((usage < 0.25 / leaves).sum()),
            "effective_leaves": float((spread(usage) * math.log(leaves)).exp().mean()),
        }

    # --- node by node ------------------------------------------------------------------------------------------

    def matrices(self) -> Iterator[tuple[Site, Tensor, Tensor]]:
        """Every site with A [N, r, in] and B [out, N, r] of all nodes: views of the parameters, to read or to set."""
        for site in self.sites:
            stack, piece, key, _, _ = self._spots[site.roles[0], site.layer]
            rows = self.a[stack].detach().unflatten(0, (-1, self.shape.nodes, self.shape.rank))
            yield site, rows[piece], self.b[key].detach().unflatten(1, (self.shape.nodes, self.shape.rank))

    @torch.no_grad()
    def choose_leaf(self, decoder: Decoder, ids: Tensor) -> list[int]:
        """The leaf that the last of a prompt's ids [T] is sent to, for `locked`; one per layer where each has routers.

        Raises nothing; decoder.adapter and what this tree counts are as before.
        """
        before = decoder.adapter, self.hard, self.locked, self.training, self.tally.clone()
        decoder.adapter, self.hard, self.locked = self, True, None
        self.eval()
        try:
            decoder(ids[None])
            return [int(way[0, -1].argmax()) for way in self._ways]
        finally:
            decoder.adapter, self.hard, self.locked, training, tally = before
            self.train(training)
            self.tally.copy_(tally)
