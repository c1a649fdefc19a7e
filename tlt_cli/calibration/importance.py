"""How much each entry of every axis matters on a text, and which ones stay.

    neurons, heads    by what they write: E||W_B x_B||^2 ("energy"), or, where the others are refit, by what the layer's
                      output loses then ("refit", removal.py; of neurons up to 4096)
    channels          by their energy in all that reads the normed stream, each reader's relative to all it makes of it
    entries of heads  E||q_p||^2 E||k_p||^2 of rotary pairs, and the energy of what they write
    layers            1 - E cos(stream in front, stream behind) (block influence, ShortGPT, arXiv:2403.03853)

"activation" stands beside them: the mean |activation| by which Minitron orders (arXiv:2407.14679). What stays comes
most important first, so that prefixes of the result are cuts by importance too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlt_cli.calibration.moments import outer
from tlt_cli.calibration.removal import largest, removed
from tlt_cli.calibration.survey import Look
from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.families import Fit
from tlt_cli.families.place import named
from tlt_cli.model.cut import Index
from tlt_cli.surgery.grow import READS_NORM
from tlt_cli.surgery.matrices import Matrix, head_name, linears, read_matrix

ENERGY, ACTIVATION, REFIT = "energy", "activation", "refit"
RANKINGS = (ENERGY, ACTIVATION, REFIT)
_DAMPING = 1e-6
_MOST_NEURONS = 4096  # the greedy order takes f^3 steps: beyond this they stay by their energy
_ROWS = 4096  # of a vocabulary at a time
Shares = dict[str, dict[str, float]]


@dataclass(eq=False)
class Importance:
    """What stays of every layer's neurons, key/value heads and query heads, most important first, and the scores of
    layers and of a head's entries. `shares` say how much of each score stays.

    Of the stream, summed over its norms: `unit` E[u uT], u being what is normed without its gain, `readers` K = WT W
    of all that reads u, each relative to E||W u||^2, and `absolute` E|gain u|; None where it was not looked at.
    """

    ffn: list[Index]
    kv: list[Index]
    heads: list[Index]
    shares: list[Shares]
    influence: list[float]
    entries: Tensor
    unit: Tensor | None = None
    readers: Tensor | None = None
    absolute: Tensor | None = None


def importance(
    looks: Iterable[Look], fit: Fit, values: Tensors, sizes: Mapping[str, int], axes: Collection[str], *, by: str
) -> Importance:
    """Choose by one of RANKINGS among what is seen of every block. `sizes` are all of nested.SIZES, `axes` those of
    them that are to be put in order; the others stay as they are."""
    found = Importance([], [], [], [], [], torch.zeros((), dtype=torch.float64))
    layers = linears(fit)
    for seen in looks:
        here = {} if seen.layer is None else layers[seen.layer]
        if seen.layer is not None:
            shares: Shares = {}
            found.ffn.append(_neurons(seen, fit, values, here, sizes, axes, by, shares))
            keys, queries = _heads(seen, fit, values, here, sizes, axes, by, shares)
            found.kv.append(keys)
            found.heads.append(queries)
            found.shares.append(shares)
            found.influence.append(seen.influence)
            if "head_dim" in axes:
                found.entries = found.entries + _relative(seen.turned) + _relative(_written(seen, fit, values, here))
        for role in seen.unit:
            _add(found, seen, role, fit, values, here)
    return found


def layers_by(influence: Sequence[float], keep: int) -> tuple[int, ...]:
    """The `keep` layers of the most influence, in the order they run."""
    return tuple(sorted(largest(torch.tensor(influence, dtype=torch.float64), keep).tolist()))


def channels(found: Importance, keep: int, by: str) -> tuple[Index, dict[str, float]]:
    """The channels of the stream that stay, and what share of the scores."""
    assert found.unit is not None and found.readers is not None and found.absolute is not None
    energy = found.readers.diagonal() * found.unit.diagonal()
    kept = largest(found.absolute if by == ACTIVATION else energy, keep)
    return kept, _share(kept, energy=energy, activation=found.absolute)


def _neurons(
    seen: Look, fit: Fit, values: Tensors, here: Mapping[str, Matrix], sizes: Mapping[str, int], axes: Collection[str],
    by: str, shares: Shares,
) -> Index:  # fmt: skip
    size = fit.sizes["ffn"]
    if "ffn" not in axes:
        return np.arange(size)
    assert seen.layer is not None
    gram, inputs = _gram(values, here["down"]), seen.moments.inputs(seen.layer, "down")
    energy, activation = gram.diagonal() * inputs.diagonal(), seen.moments.absolute(seen.layer, "down")
    loss = {}
    if by == REFIT and size <= _MOST_NEURONS:
        gone = removed(gram, inputs, np.arange(size)[:, None], sizes["ffn"])
        kept, loss = gone.kept, {"lost": gone.loss}
    else:
        kept = largest(activation if by == ACTIVATION else energy, sizes["ffn"])
    shares["neurons"] = {**_share(kept, energy=energy, activation=activation), **loss}
    return kept


def _heads(
    seen: Look, fit: Fit, values: Tensors, here: Mapping[str, Matrix], sizes: Mapping[str, int], axes: Collection[str],
    by: str, shares: Shares,
) -> tuple[Index, Index]:  # fmt: skip
    """Key/value heads with their groups, then as many query heads of each."""
    kv, group, width = fit.kv_heads, fit.heads // fit.kv_heads, fit.head_dim
    keys, queries = np.arange(kv), np.arange(kv * group)
    if not {"heads", "kv_heads"} & set(axes):
        return keys, queries
    assert seen.layer is not None
    gram, inputs = _gram(values, here["output"]), seen.moments.inputs(seen.layer, "output")
    entries = np.arange(kv * group * width).reshape(kv * group, width)
    activation = seen.moments.absolute(seen.layer, "output").reshape(kv * group, width).sum(1)
    energy = _energy(gram, inputs, entries)
    together = entries.reshape(kv, group * width)
    if by == REFIT:
        keys = removed(gram, inputs, together, sizes["kv_heads"]).kept
    else:
        score = activation.reshape(kv, group).sum(1) if by == ACTIVATION else _energy(gram, inputs, together)
        keys = largest(score, sizes["kv_heads"])
    among = (keys[:, None] * group + np.arange(group)[None]).ravel()
    owners, each = (among // group).tolist(), sizes["heads"] // sizes["kv_heads"]
    if by == REFIT:
        gram, inputs = _refit(gram, inputs, entries[among].ravel())
        local = np.arange(len(among) * width).reshape(len(among), width)
        at = removed(gram, inputs, local, sizes["heads"], owners=owners, each=each).kept
    else:
        score = activation if by == ACTIVATION else energy
        at = largest(score[torch.from_numpy(among)], sizes["heads"], owners=owners, each=each)
    shares["heads"] = _share(among[at], energy=energy, activation=activation)
    return keys, among[at]


def _written(seen: Look, fit: Fit, values: Tensors, here: Mapping[str, Matrix]) -> Tensor:
    """The energy of what the output matrix makes of each entry of a head, or pair of entries, of all heads."""
    assert seen.layer is not None
    energy = _gram(values, here["output"]).diagonal() * seen.moments.inputs(seen.layer, "output").diagonal()
    halves = fit.head_dim // fit.sizes[fit.family.head_size_axis]
    return energy.reshape(fit.heads, halves, -1).sum((0, 1))


def _add(found: Importance, seen: Look, role: str, fit: Fit, values: Tensors, here: Mapping[str, Matrix]) -> None:
    """Count what a norm of the stream saw, and what reads it."""
    name = named(fit.places, role, layer=seen.layer)
    assert name is not None
    gain = values.read(name).double() + float(fit.family.rules.get("gain_offset", 0.0))
    unit = seen.unit[role]
    readers = torch.zeros_like(unit)
    readers_of = [matrix for reader, matrix in here.items() if READS_NORM.get(reader) == role]
    for gram in [_gram(values, matrix) for matrix in readers_of] or [_head_gram(fit, values)]:
        felt = gain[:, None] * gram * gain
        readers += felt / (felt * unit).sum().clamp_min(1e-300)
    absolute = seen.absolute[role] * gain.abs()
    before = found.unit, found.readers, found.absolute
    found.unit, found.readers, found.absolute = (
        new if old is None else old + new for old, new in zip(before, (unit, readers, absolute), strict=True)
    )


def _head_gram(fit: Fit, values: Tensors) -> Tensor:
    """WT W [H, H] of what makes logits, some rows of it at a time."""
    name, vocab, width = head_name(fit), fit.sizes["vocab"], fit.sizes["hidden"]
    total = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, vocab, _ROWS):
        total += outer(values.read_rows(name, start, min(vocab, start + _ROWS)).float())
    return total


def _refit(gram: Tensor, inputs: Tensor, entries: Index) -> tuple[Tensor, Tensor]:
    """K and H of the same matrix refit on some of its inputs."""
    inside = torch.from_numpy(entries)
    narrow = inputs[inside][:, inside]
    damped = narrow + (_DAMPING * float(narrow.diagonal().mean()) or 1e-30) * torch.eye(len(narrow))
    taken = torch.linalg.solve(damped, inputs[inside])
    return taken @ gram @ taken.T, narrow


def _energy(gram: Tensor, inputs: Tensor, groups: Index) -> Tensor:
    """E||W_B x_B||^2 of every group of inputs."""
    where = torch.from_numpy(groups)
    rows, columns = where[:, :, None], where[:, None, :]
    found: Tensor = (gram[rows, columns] * inputs[rows, columns]).sum((1, 2))
    return found


def _gram(values: Tensors, matrix: Matrix) -> Tensor:
    """WT W [in, in]."""
    return outer(read_matrix(values, matrix))


def _relative(score: Tensor) -> Tensor:
    return score / score.sum().clamp_min(1e-300)


def _share(kept: Index, **scores: Tensor) -> dict[str, float]:
    at = torch.from_numpy(kept)
    return {name: float(_relative(score)[at].sum()) for name, score in scores.items()}
