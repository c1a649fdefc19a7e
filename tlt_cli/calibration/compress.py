"""A model compressed on a text: ranks, shared factors and neurons by one allocation, then block after block refit.

    start     what each matrix is cut to, from the second moments (or from ranks that are given)
    drift     each matrix refit to what the compressed model in front of it passes on
    block     each block tuned to the original block's output

No gradient crosses more than one block: only the metric is measured by gradients, before any weight moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks
from tlt_cli.calibration.drift import STAGES, Crossed, cross
from tlt_cli.calibration.moments import block_moments, streams
from tlt_cli.calibration.options import Option, curve, group_options
from tlt_cli.calibration.pieces import Dense, Low, Piece, Slot, low, replacements
from tlt_cli.calibration.refine import refine_block
from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.families import Fit, Place
from tlt_cli.surgery.allocate import allocation
from tlt_cli.surgery.matrices import Matrix, read_matrix

Progress = Callable[[int, int], None]
Factors = Callable[[Matrix], tuple[Tensor, Tensor] | None]


@dataclass(eq=False)
class Compressed:
    """The pieces by (layer, role), the neurons that stay by layer, and the norm tensors that were tuned by name."""

    pieces: dict[Slot, Piece]
    kept: dict[int, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)
    loss: float = 0.0
    exact: bool = False

    def parameters(self, found: Iterable[Matrix]) -> int:
        """Numbers that storing these matrices takes: factors with pivots, a shared right factor once."""
        total, seen = 0, set[int]()
        groups: dict[int, tuple[Low, int]] = {}
        for matrix in found:
            assert matrix.layer is not None and matrix.role is not None
            piece = self.pieces[matrix.layer, matrix.role]
            if isinstance(piece, Dense):
                total += piece.value.numel()
            else:
                rows = groups.get(id(piece.a), (piece, 0))[1]
                groups[id(piece.a)] = piece, rows + len(piece.b)
                seen.add(id(piece.a))
        for piece, rows in groups.values():
            rank, columns = piece.a.shape
            total += rank * (rows + columns) - rank**2
        return total


def start_globally(
    values: Tensors, fitted: Fit, found: Sequence[Matrix], ids: Tensor, *, budget: int, gradients: bool = True,
    progress: Progress | None = None,
) -> Compressed:  # fmt: skip
    """Cut to `budget` parameters by one allocation over every group of every block. ids [N, T] is the calibration."""
    by_layer: dict[int, list[Matrix]] = {}
    for matrix in found:
        assert matrix.layer is not None
        by_layer.setdefault(matrix.layer, []).append(matrix)
    groups: list[tuple[int, list[Option]]] = []
    outputs: dict[tuple[int, str], Tensor] = {}
    blocks = Blocks(values, fitted)
    for layer, moments in block_moments(blocks, ids, gradients=gradients, progress=progress):
        weights = {str(matrix.role): read_matrix(values, matrix) for matrix in by_layer.get(layer, ())}
        groups += [(layer, options) for options in group_options(weights, moments, layer)]
        outputs.update(moments.feels)
    groups.sort(key=lambda group: group[0])
    chosen = allocation([[option.choice for option in options] for _, options in groups], budget)
    made = Compressed({}, outputs=outputs, loss=chosen.loss, exact=chosen.exact)
    for (layer, options), index in zip(groups, chosen.chosen, strict=True):
        option = options[index]
        made.pieces.update({(layer, role): piece for role, piece in option.make().items()})
        if option.kept is not None:
            made.kept[layer] = option.kept
    return made


def start_from(values: Tensors, found: Sequence[Matrix], factors: Factors) -> Compressed:
    """The pieces of factors that were chosen elsewhere, one pair per matrix or None where it stays dense."""
    pieces: dict[Slot, Piece] = {}
    for matrix in found:
        assert matrix.layer is not None and matrix.role is not None
        pair = factors(matrix)
        piece = Dense(read_matrix(values, matrix)) if pair is None else low(pair[0], [pair[1]])[0]
        pieces[matrix.layer, matrix.role] = piece
    return Compressed(pieces)


def refine(
    made: Compressed, values: Tensors, fitted: Fit, found: Sequence[Matrix], ids: Tensor, *, drift: bool = True,
    steps: int = 0, rate: float = 4e-3, windows: int = 8, seed: int = 0, most_drift: int = 256,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Refit the pieces in place, block after block, each behind the compressed ones. `steps` of tuning per block; the
    last block is tuned again to the original's distribution over the next token, which its output alone decides."""
    source, compressed = Blocks(values, fitted), Blocks(values, fitted)
    original = streams(source, ids)
    stream = original[0]
    some = torch.linspace(0, len(ids) - 1, min(most_drift, len(ids))).round().long()
    roles = {matrix.role for matrix in found}
    total = source.layers * (4 * drift + 2 * (steps > 0))
    done = 0

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for layer in range(source.layers):
        install(made, compressed, fitted, found, layer)
        for stage, writes in STAGES if drift else ():
            here = [role for role in stage if role in roles and (layer, role) in made.pieces]
            if here:
                crossed = cross(source, compressed, layer, here, writes, original[layer][some], stream[some])
                _refit(made, layer, here, crossed)
                install(made, compressed, fitted, found, layer)
            advance()
        if steps and any(at == layer for at, _ in made.pieces):
            leaves = _leaves(made, values, fitted, layer)
            install(made, compressed, fitted, found, layer)
            block = compressed, layer, leaves, stream, original[layer + 1]
            refine_block(*block, steps=steps, windows=windows, rate=rate, seed=seed + layer)
            if layer == source.layers - 1:
                refine_block(*block, steps=steps, windows=windows, rate=rate / 4, seed=seed, distribution=True)
            advance(2)
        with torch.no_grad():
            stream = torch.cat([compressed.run(layer, batch) for batch in torch.split(stream, 16)])
        compressed.release()
        source.release()


def install(made: Compressed, blocks: Blocks, fitted: Fit, found: Sequence[Matrix], layer: int) -> None:
    """Let a block run with the pieces as they are now, the neurons that stay, and the tuned norms."""
    blocks.replaced.update(replacements(found, made.pieces, layer))
    for name, value in made.norms.items():
        blocks.replaced[name] = lambda value=value: value  # type: ignore[misc]
    if layer in made.kept:
        for name, place in fitted.places.items():
            if place.layer == layer and place.kind == "bias" and place.arrow.dims == (("ffn",),):
                blocks.replaced[name] = lambda name=name: blocks.original(name)[made.kept[layer]]  # type: ignore[misc]


def _refit(made: Compressed, layer: int, roles: Sequence[str], crossed: Crossed) -> None:
    """New pieces for one stage: least squares, then the best of the same rank in the metric."""
    wanted = {role: crossed.refit(role) for role in roles}
    felt = {role: made.outputs.get((layer, role)) for role in roles}
    if layer in made.kept:
        stays = made.kept[layer]
        for role in ("gate", "up"):
            if role in wanted:
                wanted[role] = wanted[role][stays]
                felt[role] = None if (g := felt[role]) is None else g[stays][:, stays]
    groups: dict[int, list[str]] = {}
    for role in roles:
        piece = made.pieces[layer, role]
        if isinstance(piece, Dense):
            made.pieces[layer, role] = Dense(wanted[role].float().contiguous())
        else:
            groups.setdefault(id(piece.a), []).append(role)
    for together in groups.values():
        piece = made.pieces[layer, together[0]]
        assert isinstance(piece, Low)
        found = curve([wanted[role] for role in together], crossed.inputs, [felt[role] for role in together])
        for role, new in zip(together, found.pieces(len(piece.a) - 1), strict=True):
            made.pieces[layer, role] = new


def _leaves(made: Compressed, values: Tensors, fitted: Fit, layer: int) -> list[Tensor]:
    """What block tuning moves: every piece of the block, and the gains and biases of its norms."""
    for name, place in fitted.places.items():
        if place.layer == layer and _is_norm(place):
            made.norms.setdefault(name, values.read(name).float())
    norms = [value for name, value in made.norms.items() if fitted.places[name].layer == layer]
    return [leaf for (at, _), piece in made.pieces.items() if at == layer for leaf in piece.leaves()] + norms


def _is_norm(place: Place) -> bool:
    return bool(place.roles) and place.roles[0].endswith("_norm")
