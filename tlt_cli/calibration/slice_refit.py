"""The matrices of a cut model moved by least squares, so that each layer's output stays as close as it can on a text.

Block after block, on the streams of both models: what reads the stream aims at what the original's kept outputs were;
what writes it aims at what the original's stream is behind it, as far as it was kept, less what the cut model's stream
has by then (anchored: errors do not pile up). With r what is missing and z what the cut matrix reads, it becomes

    W + E[r zT] (E[z zT] + lambda I)^-1

which is W itself where nothing is missing, and E[t zT] E[z zT]^-1 at lambda 0: for a feed-forward that lost neurons
behind an unchanged layer, down H[:, S] H[S, S]^-1. Lambda is chosen per matrix on a fifth of the tokens held out, and
a matrix stays as it was cut where nothing helps there. Then all tokens count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks, check_finite, tapped
from tlt_cli.calibration.drift import STAGES
from tlt_cli.calibration.shelf import Shelf
from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.model.cut import Cut
from tlt_cli.surgery.matrices import Matrix, linears, part_of, put

_RIDGES = (1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of E[z zT]
_STRETCH, _FOLDS = 64, 5  # every fifth stretch of tokens is held out while lambda is chosen
SAME = 1e-10  # of the target's energy: less than this is missing by rounding alone
Stream = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Refitted:
    """The stored tensors that changed, on disk, by the child's names; of a head the rows from one on, by that one.
    `errors` are E||r||^2 / E||t||^2 before and after, by slot and in the order of the fits."""

    tensors: Shelf[str] = field(default_factory=Shelf)
    head: Shelf[int] = field(default_factory=Shelf)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


class _Reached(Exception):
    """A block has run as far as it was wanted."""


class _Sums:
    """E over tokens, the held out ones apart: z zT [in, in], and per role r zT [out, in], of r and of t the squares."""

    def __init__(self) -> None:
        self.gram: list[Tensor] = []
        self.cross: dict[str, list[Tensor]] = {}
        self.missing: dict[str, list[float]] = {}
        self.wanted: dict[str, float] = {}

    def add(self, z: Tensor, roles: Mapping[str, tuple[Tensor, Tensor]], held: Tensor) -> None:
        """z [n, in], by role r and t [n, out]; `held` [n]."""
        wide = z.double()
        parts = [~held, held]
        grams = [wide[part].T @ wide[part] for part in parts]
        self.gram = [a + b for a, b in zip(self.gram, grams, strict=True)] if self.gram else grams
        for role, (missing, target) in roles.items():
            r = missing.double()
            cross = [r[part].T @ wide[part] for part in parts]
            energy = [float(r[part].square().sum()) for part in parts]
            if role in self.cross:
                cross = [a + b for a, b in zip(self.cross[role], cross, strict=True)]
                energy = [a + b for a, b in zip(self.missing[role], energy, strict=True)]
            self.cross[role], self.missing[role] = cross, energy
            self.wanted[role] = self.wanted.get(role, 0.0) + float(target.double().square().sum())

    def change(self, role: str) -> tuple[Tensor | None, float, float]:
        """What is added to the matrix [out, in], None where nothing helps; the relative error before and after."""
        cross, (missing, held_out) = self.cross[role], self.missing[role]
        wanted = self.wanted[role] or 1.0
        before = (missing + held_out) / wanted
        if before <= SAME:
            return None, before, before
        ridge = best_ridge(self.gram, [cross])
        if ridge is None:
            return None, before, before
        whole, crossed = self.gram[0] + self.gram[1], cross[0] + cross[1]
        change = solve(whole, crossed, ridge)
        after = before + float(((change @ whole) * change).sum() - 2 * (change * crossed).sum()) / wanted
        return change, before, max(after, 0.0)


def best_ridge(gram: Sequence[Tensor], crosses: Iterable[Sequence[Tensor]]) -> float | None:
    """The one of _RIDGES whose solution from the first part of the tokens does best on the second; None where even the
    best makes the error larger there. `gram` and every one of `crosses`, which are rows of one matrix, are the two
    parts' E[z zT] and E[r zT]."""
    values, basis = torch.linalg.eigh(gram[0])
    mean, inner = float(gram[0].diagonal().mean()), basis.T @ gram[1] @ basis
    changes = [0.0] * len(_RIDGES)
    for cross in crosses:
        first, second = cross[0] @ basis, cross[1] @ basis
        for index, share in enumerate(_RIDGES):
            found = first / (values.clamp_min(0) + (share * mean or 1.0))
            changes[index] += float(((found @ inner) * found).sum() - 2 * (found * second).sum())
    return _RIDGES[changes.index(min(changes))] if min(changes) < 0 else None


def solve(gram: Tensor, cross: Tensor, share: float) -> Tensor:
    """cross [out, in] (gram [in, in] + lambda I)^-1, lambda being this share of gram's mean diagonal."""
    ridge = share * float(gram.diagonal().mean()) or 1.0
    found: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross.T).T
    return found


def refit(
    source: Blocks, made: Blocks, child: Fit, cuts: Mapping[str, Cut], layers: Sequence[int], ids: Tensor,
    kept: Stream, *, batch: int = 16, advance: Callable[[], None] = lambda: None,
) -> tuple[Refitted, Tensor, Tensor]:  # fmt: skip
    """Refit the blocks of the cut model, which runs on `made`, to the original on windows ids [N, T]; what changed,
    and both streams behind all blocks.

    `layers` are the original's that stay, `cuts` choose the kept outputs of matrices, `kept` what the stream keeps of
    the original's. The text must be long enough (`check_enough`).
    """
    matrices, found = linears(child), Refitted()
    original, stream = source.embed(ids), made.embed(ids)
    ends = [*layers[1:], source.layers]
    for at in range(layers[0]):
        original = _passed(source, at, original, batch)
        source.release()
    for at, (layer, end) in enumerate(zip(layers, ends, strict=True)):
        target = original
        for each in range(layer, end):  # what the layers that go would have written too
            target = _passed(source, each, target, batch)
            check_finite(target, each)
            if each > layer:
                source.release()
        block = _Block(source, made, child, cuts, matrices[at], layer, at, kept, batch, found)
        for roles, writes in STAGES:
            block.fit([role for role in roles if role in matrices[at]], writes, original, stream, target)
            advance()
        stream = _passed(made, at, stream, batch)
        original = target
        block.put_away()
    return found, original, stream


def check_enough(ids: Tensor, child: Fit) -> None:
    """TltError where there are fewer tokens than some matrix of the cut model has inputs: unknowns per output."""
    widest = max(
        (matrix for here in linears(child).values() for matrix in here.values()), key=lambda each: each.columns
    )
    if ids.numel() <= widest.columns:
        raise TltError(
            f"--refit: {ids.numel()} tokens of calibration cannot tell the {widest.columns} inputs of {widest.name} "
            "apart; give a longer text, or leave --refit out"
        )


@dataclass(eq=False)
class _Block:
    """One block of both models, stage after stage."""

    source: Blocks
    made: Blocks
    child: Fit
    cuts: Mapping[str, Cut]
    here: Mapping[str, Matrix]
    layer: int
    at: int
    kept: Stream
    batch: int
    found: Refitted
    changed: dict[str, Tensor] = field(default_factory=dict)

    def fit(self, roles: Sequence[str], writes: bool, before: Tensor, after: Tensor, target: Tensor) -> None:
        """Move the matrices of one stage. `before` is the original's stream in front of the block, `after` the cut
        model's, `target` the original's in front of what follows in the cut model."""
        sums = {True: _Sums(), False: _Sums()}  # with a bias and without
        spots = self.made.decoder.description["roles"]
        start = 0
        for some, other, end in zip(
            torch.split(before, self.batch), torch.split(after, self.batch), torch.split(target, self.batch),
            strict=True,
        ):  # fmt: skip
            now = self._run(self.made, self.at, other, roles[-1])
            was = self._run(self.source, self.layer, some, roles[-1]) if self._needs_own(roles) else {}
            held = held_out(start, some.shape[0], some.shape[1])
            start += some.shape[0]
            read, missing = now[roles[-1]][0].flatten(0, -2), dict[str, tuple[Tensor, Tensor]]()
            for role in roles:
                aim = self._aim(role, writes, some, other, end, was, now)
                missing[role] = (aim - now[role][1]).flatten(0, -2), aim.flatten(0, -2)
            for biased in (True, False):
                those = {role: each for role, each in missing.items() if spots[role]["bias"] == biased}
                if those:
                    z = torch.cat([read, torch.ones(len(read), 1)], 1) if biased else read
                    sums[biased].add(z, those, held)
        for role in roles:
            biased = spots[role]["bias"]
            change, *errors = sums[biased].change(role)
            self.found.errors[self.here[role].name] = errors[0], errors[1]
            if change is not None:
                self._move(self.here[role], change[:, :-1] if biased else change, change[:, -1] if biased else None)

    def put_away(self) -> None:
        """Keep what changed, and forget the block."""
        for name, value in self.changed.items():
            self.found.tensors[name] = value
        for blocks in (self.source, self.made):
            blocks.replaced.clear()
            blocks.release()

    def _needs_own(self, roles: Sequence[str]) -> bool:
        """Whether the target of a stage takes more of the original than its stream behind the block."""
        return roles != ["down"] or "ffn_post_norm" in self.made.decoder.description["roles"]

    def _run(self, blocks: Blocks, layer: int, stream: Tensor, last: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and outputs by role, of a block that runs as far as the role `last`."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def see(role: str, _: int, x: Tensor, y: Tensor) -> None:
            seen[role] = x, y
            if role == last:
                raise _Reached

        with torch.no_grad(), tapped(blocks.decoder, see), suppress(_Reached):
            blocks.run(layer, stream)
        return seen

    def _aim(
        self, role: str, writes: bool, some: Tensor, other: Tensor, end: Tensor,
        was: Mapping[str, tuple[Tensor, Tensor]], now: Mapping[str, tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        """What a matrix should write [B, T, out]."""
        if not writes:
            return self._outputs(self.here[role], was[role][1])
        norm = "attention_post_norm" if role == "output" else "ffn_post_norm"
        if role == "output":
            aim = self.kept(some + self._written(self.source, self.layer, was["output"][1])) - other
        else:
            aim = self.kept(end) - other - self._written(self.made, self.at, now["output"][1])
        if norm not in self.made.decoder.description["roles"]:
            return aim
        # what is written passes a norm: aim at what it would make of the original's own, at the original's size
        own = self._outputs(self.here[role], was[role][1])
        through = self.made.decoder.normalize(own, norm, self.at)
        return own * torch.where(through.abs() > 1e-6, aim / through, 1.0)

    def _written(self, blocks: Blocks, layer: int, value: Tensor) -> Tensor:
        """What attention adds to the stream."""
        norm = "attention_post_norm"
        return blocks.decoder.normalize(value, norm, layer) if norm in blocks.decoder.description["roles"] else value

    def _outputs(self, matrix: Matrix, value: Tensor) -> Tensor:
        """The outputs that the cut keeps of a role's own [..., out], with its factors."""
        cut = self.cuts[matrix.tensor]
        dim = 1 if matrix.transposed else 0
        index, factors = cut.kept[dim], cut.factors.get(dim)
        rows = slice((matrix.part or 0) * matrix.rows, ((matrix.part or 0) + 1) * matrix.rows)
        if index is not None:
            first = (matrix.part or 0) * value.shape[-1]
            value = value[..., torch.from_numpy(index[rows] - first)]
        return value if factors is None else value * torch.from_numpy(factors[rows]).to(value)

    def _move(self, matrix: Matrix, change: Tensor, bias: Tensor | None) -> None:
        """Add to one matrix of a stored tensor, and to its bias."""
        stored = self._stored(matrix.tensor)
        part = part_of(stored, matrix)
        value = (part.T if matrix.transposed else part).double() + change
        put(stored, matrix, value.to(stored.dtype))
        if bias is not None:
            name = f"{matrix.tensor.removesuffix('.weight')}.bias"
            start = (matrix.part or 0) * matrix.rows
            self._stored(name)[start : start + matrix.rows] += bias.float()

    def _stored(self, name: str) -> Tensor:
        """A tensor of the block that may be written to, and with which it runs from now on."""
        if name not in self.changed:
            self.changed[name] = self.made.original(name).clone()
            self.made.replaced[name] = lambda: self.changed[name]
        return self.changed[name]


def _passed(blocks: Blocks, layer: int, stream: Tensor, batch: int) -> Tensor:
    """The stream [N, T, H] behind a block."""
    with torch.no_grad():
        return torch.cat([blocks.run(layer, some) for some in torch.split(stream, batch)])


def held_out(start: int, windows: int, length: int) -> Tensor:
    """Which tokens [windows x length] are held out: every fifth stretch, in every window another one."""
    stretch = min(_STRETCH, max(1, length))
    stretches = torch.arange(length) // stretch
    window = torch.arange(start, start + windows)[:, None]
    return ((stretches[None] + window) % _FOLDS == _FOLDS - 1).flatten()
