"""A model compressed on a text: ranks, shared factors and neurons by one allocation, then block after block refit.

    start     what each matrix is cut to, from the second moments (or from ranks that are given)
    drift     each matrix refit to what the compressed model in front of it passes on
    block     each block tuned to the original block's output

No gradient crosses more than one block: only the metric is measured by gradients, before any weight moves. Memory holds
one block with its moments and a few copies of the stream, however many blocks there are: moments and pieces of all
others lie on disk, and of their choices only numbers are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks, check_finite
from tlt_cli.calibration.drift import STAGES, Crossed, cross
from tlt_cli.calibration.moments import block_moments, shelved
from tlt_cli.calibration.options import Menu, curve, menus
from tlt_cli.calibration.pieces import Dense, Low, Piece, Pieces, low, replacements, slot_of
from tlt_cli.calibration.refine import refine_block
from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.families import Fit, Place
from tlt_cli.surgery.allocate import allocation_of
from tlt_cli.surgery.matrices import Matrix, by_layer, read_matrix
from tlt_cli.surgery.metrics import Seen

Progress = Callable[[int, int], None]
Factors = Callable[[Matrix], tuple[Tensor, Tensor] | None]


@dataclass(eq=False)
class Compressed:
    """The pieces by (layer, role), the neurons that stay by layer, and the norm tensors that were tuned by name.

    `seen` tells what the matrices were weighed by. `loss` is what the allocation foresaw, proven the least where
    `exact`. `seconds` is what each matrix took, those of a group by their sizes.
    """

    pieces: Pieces = field(default_factory=Pieces)
    kept: dict[int, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    seen: Callable[[Matrix], Seen | None] = lambda matrix: None
    loss: float = 0.0
    exact: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def parameters(self, found: Iterable[Matrix]) -> int:
        """Numbers that storing these matrices takes: factors with pivots, a shared right factor once."""
        total = 0
        groups: dict[tuple[int, str], tuple[int, int, int]] = {}
        for matrix in found:
            part = self.pieces.parts[slot_of(matrix)]
            if part.rank is None:
                total += part.rows * part.columns
            else:
                rows = groups.get(part.owner, (0, 0, 0))[0]
                groups[part.owner] = rows + part.rows, part.columns, part.rank
        return total + sum(rank * (rows + columns) - rank**2 for rows, columns, rank in groups.values())

    def took(self, together: Iterable[Matrix], seconds: float) -> None:
        """Share out what a group took among its matrices."""
        group = list(together)
        total = sum(matrix.size for matrix in group)
        for matrix in group:
            self.seconds[matrix.name] = self.seconds.get(matrix.name, 0.0) + seconds * matrix.size / total


def start_globally(
    values: Tensors, fitted: Fit, found: Sequence[Matrix], ids: Tensor, *, budget: int, align: int = 1,
    gradients: bool = True, progress: Progress | None = None,
) -> Compressed:  # fmt: skip
    """Cut to `budget` parameters by one allocation over every group of every block, ranks being multiples of `align`.
    ids [N, T] is the calibration."""
    layers = by_layer(found)
    method = "kfac" if gradients else "whiten"
    known = shelved(ids.numel())
    made = Compressed(seen=lambda matrix: known.seen(*slot_of(matrix), method))
    groups: list[tuple[int, Menu]] = []
    for layer, moments in block_moments(Blocks(values, fitted), ids, gradients=gradients, progress=progress):
        if layer in layers:
            weights = {role: read_matrix(values, matrix) for role, matrix in layers[layer].items()}
            start = time.perf_counter()
            for menu in menus(weights, moments, layer, align=align):
                groups.append((layer, menu))
                made.took((layers[layer][role] for role in menu.roles), time.perf_counter() - start)
                start = time.perf_counter()
            known.take(moments)
    groups.sort(key=lambda group: group[0])
    chosen = allocation_of([menu.costs for _, menu in groups], [menu.losses for _, menu in groups], budget)
    made.loss, made.exact = chosen.loss, chosen.exact
    for layer, here in sorted(layers.items()):
        weights = {role: read_matrix(values, matrix) for role, matrix in here.items()}
        pieces: dict[str, Piece] = {}
        for (at, menu), index in zip(groups, chosen.chosen, strict=True):
            if at == layer:
                start = time.perf_counter()
                pieces |= menu.make(index, weights, known, layer)
                made.took((here[role] for role in menu.roles), time.perf_counter() - start)
                if (kept := menu.kept(index)) is not None:
                    made.kept[layer] = kept
        made.pieces.put(layer, pieces)
    return made


def start_from(
    values: Tensors, found: Sequence[Matrix], factors: Factors, seen: Callable[[Matrix], Seen | None] | None = None
) -> Compressed:
    """The pieces of factors that were chosen elsewhere, one pair per matrix or None where it stays dense. What they
    were weighed by, where `seen` tells it, is the metric of later refits too."""
    made = Compressed() if seen is None else Compressed(seen=seen)
    for layer, here in by_layer(found).items():
        pieces: dict[str, Piece] = {}
        for role, matrix in here.items():
            pair = factors(matrix)
            pieces[role] = Dense(read_matrix(values, matrix)) if pair is None else low(pair[0], [pair[1]])[0]
        made.pieces.put(layer, pieces)
    return made


def refine(
    made: Compressed, values: Tensors, fitted: Fit, found: Sequence[Matrix], ids: Tensor, *, drift: bool = True,
    steps: int = 0, rate: float = 4e-3, windows: int = 8, seed: int = 0, most_drift: int = 256,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Refit the pieces in place, block after block, each behind the compressed ones. `steps` of tuning per block; the
    last block is tuned again to the original's distribution over the next token, which its output alone decides."""
    source, compressed = Blocks(values, fitted), Blocks(values, fitted)
    original = stream = source.embed(ids)
    some = torch.linspace(0, len(ids) - 1, min(most_drift, len(ids))).round().long()
    total = source.layers * (4 * drift + 2 * (steps > 0))
    done = 0

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for layer in range(source.layers):
        matrices = {str(matrix.role): matrix for matrix in found if matrix.layer == layer}
        pieces = made.pieces.block(layer)
        target = _passed(source, layer, original)
        check_finite(target, layer)
        install(made, compressed, fitted, found, layer, pieces)
        for stage, writes in STAGES if drift else ():
            here = [role for role in stage if role in pieces]
            if here:
                crossed = cross(source, compressed, layer, here, writes, original[some], stream[some])
                _refit(made, pieces, [matrices[role] for role in here], crossed)
            advance()
        if steps and pieces:
            leaves = _leaves(made, pieces, values, fitted, layer)
            install(made, compressed, fitted, found, layer, pieces)
            block = compressed, layer, leaves, stream, target
            refine_block(*block, steps=steps, windows=windows, rate=rate, seed=seed + layer)
            if layer == source.layers - 1:
                refine_block(*block, steps=steps, windows=windows, rate=rate / 4, seed=seed, distribution=True)
            advance(2)
        made.pieces.put(layer, pieces)
        original, stream = target, _passed(compressed, layer, stream)
        for blocks in (source, compressed):
            blocks.replaced.clear()
            blocks.release()


def _passed(blocks: Blocks, layer: int, stream: Tensor) -> Tensor:
    """The stream [N, T, H] behind a block."""
    with torch.no_grad():
        return torch.cat([blocks.run(layer, batch) for batch in torch.split(stream, 16)])


def install(
    made: Compressed, blocks: Blocks, fitted: Fit, found: Sequence[Matrix], layer: int,
    pieces: Mapping[str, Piece] | None = None,
) -> None:  # fmt: skip
    """Let a block run with its pieces, the neurons that stay, and the tuned norms: with `pieces` as they are whenever
    it runs, or without with those that `made` keeps."""
    blocks.replaced.update(
        replacements(found, made.pieces.piece if pieces is None else lambda slot: pieces[slot[1]], layer)
    )
    for name, value in made.norms.items():
        if fitted.places[name].layer == layer:
            blocks.replaced[name] = lambda value=value: value  # type: ignore[misc]
    if layer in made.kept:
        for name, place in fitted.places.items():
            if place.layer == layer and place.kind == "bias" and place.arrow.dims == (("ffn",),):
                blocks.replaced[name] = lambda name=name: blocks.original(name)[made.kept[layer]]  # type: ignore[misc]


def _refit(made: Compressed, pieces: dict[str, Piece], stage: Sequence[Matrix], crossed: Crossed) -> None:
    """New pieces for one stage: least squares, then the best of the same rank in the metric."""
    roles = [str(matrix.role) for matrix in stage]
    wanted = {role: crossed.refit(role) for role in roles}
    seen = {role: made.seen(matrix) for role, matrix in zip(roles, stage, strict=True)}
    felt = {role: None if one is None else one.outputs for role, one in seen.items()}
    stays = made.kept.get(slot_of(stage[0])[0])
    if stays is not None:
        for role in ("gate", "up"):
            if role in wanted:
                wanted[role] = wanted[role][stays]
                felt[role] = None if (g := felt[role]) is None else g[stays][:, stays]
    groups: dict[int, list[str]] = {}
    for role in roles:
        piece = pieces[role]
        if isinstance(piece, Dense):
            pieces[role] = Dense(wanted[role].float().contiguous())
        else:
            groups.setdefault(id(piece.a), []).append(role)
    for together in groups.values():
        piece = pieces[together[0]]
        assert isinstance(piece, Low)
        found = curve([wanted[role] for role in together], crossed.inputs, [felt[role] for role in together])
        pieces.update(zip(together, found.pieces(len(piece.a)), strict=True))


def _leaves(made: Compressed, pieces: Mapping[str, Piece], values: Tensors, fitted: Fit, layer: int) -> list[Tensor]:
    """What block tuning moves: every piece of the block, and the gains and biases of its norms."""
    for name, place in fitted.places.items():
        if place.layer == layer and _is_norm(place):
            made.norms.setdefault(name, values.read(name).float())
    norms = [value for name, value in made.norms.items() if fitted.places[name].layer == layer]
    return [leaf for piece in pieces.values() for leaf in piece.leaves()] + norms


def _is_norm(place: Place) -> bool:
    return bool(place.roles) and place.roles[0].endswith("_norm")
