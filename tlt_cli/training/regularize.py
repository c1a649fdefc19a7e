"""Low-rank regularizers: a step of their own behind every optimizer's, in closed form on the smaller Gram matrix.

A matrix A with singular values s_i has the shares of energy p_i = s_i^2 / sum s^2, the concentration

    c(A) = tr((AT A)^2) / tr(AT A)^2 = sum p_i^2      and the participation ratio      PR = 1 / c,

the number of directions that carry it: 1 for a single one, k = min(m, n) for all alike. Three penalties of strength l:

    concentration    l (1 - c)
    participation    l max(log PR - log target, 0)      without a target l log PR, the log form of concentration
    nuclear          l (s_1 + ... + s_k)                with a target r of s_r+1, ..., s_k alone

The step is decoupled from the optimizer, as AdamW's weight decay is: A moves against the penalty's own gradient by the
learning rate, and no second moment rescales it. Large and small weights move alike: the gradient, in proportion to
1 / ||A||, or for nuclear to nothing, is taken in the unit of the matrix, ||A||^2 / 4 or ||A||^2 / sum s times as long.
With G = A AT (or AT A, whichever is smaller), S = tr G, Q = tr G^2 and a share w = rate l (participation) or rate l c
(concentration), the step is a mixture of A and its cube, at the length of A since the gradient is orthogonal to it:

    A <- (1 - w) A + w (S / Q) G A,   ||A|| as before:    s_i grows at the rate w (p_i / c - 1);
    nuclear:                                              s_i <- max(s_i - rate l (sum s^2 / sum s), 0).

So l has the unit of weight decay in all forms. Under participation the smallest singular values shrink at the rate l,
whatever the size of the matrix. Under concentration they shrink at l c: hardly where the rank is high, faster and
faster as it falls. Under nuclear as much energy goes as weight decay l would take, but the same from each singular
value: small ones reach zero. c has its maximum at rank one, so without a target nothing stops the first two short of
it. With one, w is cut to where PR meets it: no step goes below.

Cost: 4 a^2 b operations for a matrix of sides a <= b, 2 a / 3 T of a training step on T tokens; near the target up to
twice that. nuclear takes all eigenvectors of G instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from tlt_cli.errors import UsageError, nearest
from tlt_cli.model.decoder import NORMS, STEM, Decoder

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

CONCENTRATION, PARTICIPATION, NUCLEAR = "concentration", "participation", "nuclear"
FORMS = (CONCENTRATION, PARTICIPATION, NUCLEAR)
_HALVINGS = 40


@dataclass(frozen=True)
class Regularizer:
    """What pulls matrices to low rank: the penalties above. `strength` has the unit of weight decay.

    `target_rank` is where concentration and participation stop, and how many leading singular values nuclear leaves
    alone. It acts at every `every`-th step, with as many times the size.
    """

    form: str
    strength: float
    target_rank: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            known = ", ".join(FORMS)
            raise UsageError(f"regularizer {self.form}: unknown{nearest(self.form, FORMS)}; expected {known}")
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise UsageError(f"regularizer of strength {self.strength}: expected 0 or more, usually 0.1 to 10")
        if self.target_rank is not None and self.target_rank < 1:
            raise UsageError(f"regularizer with the target rank {self.target_rank}: expected 1 or more")
        if self.every < 1:
            raise UsageError(f"regularizer every {self.every} steps: expected 1 or more")


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix: a whole parameter, or part number `part` of `parts` equal slices of its dim `dim`."""

    name: str
    parameter: Tensor
    part: int = 0
    parts: int = 1
    dim: int = 0

    def of(self, whole: Tensor) -> Tensor:
        """The matrix in the parameter's values, a view, as stored: transposed or not, its spectrum is the same."""
        return whole.chunk(self.parts, self.dim)[self.part]


def targets(decoder: Decoder, *, only: Sequence[str] = ()) -> list[Target]:
    """The matrices of the decoder's blocks that are trained, fused ones part by part; none that is stored as factors.

    `only` keeps those whose name, or stored tensor, one of its globs matches; embeddings and the head only where one
    names them. Ask again once parameters were replaced, as sharding does. UsageError for a glob that matches nothing
    and where nothing is left.
    """
    if decoder.description.get("groups") is not None:
        raise UsageError(
            "a regularizer acts on the matrices of one model, and this is several side by side; leave it out"
        )
    known = [
        (role in STEM, tensor, target)
        for role in decoder.description["roles"]
        if role not in NORMS
        for layer in ((0,) if role in STEM else range(decoder.description["layers"]))
        for tensor, target in _stored(decoder, role, layer)
    ]

    def named(tensor: str, target: Target, glob: str) -> bool:
        return fnmatchcase(target.name, glob) or fnmatchcase(tensor, glob)

    for glob in only:
        if not any(named(tensor, target, glob) for _, tensor, target in known):
            names = [target.name for _, _, target in known]
            raise UsageError(f"no matrix of the model is called {glob}{nearest(glob, names)}")
    chosen = [
        target
        for stem, tensor, target in known
        if (any(named(tensor, target, glob) for glob in only) if only else not stem)
    ]
    trained = [target for target in chosen if target.parameter.requires_grad]
    if not trained:
        raise UsageError("a regularizer acts on matrices that are trained, and none of these is; leave it out")
    return trained


def _stored(decoder: Decoder, role: str, layer: int) -> Iterable[tuple[str, Target]]:
    """A role's matrix in a layer and the tensor that holds it; nothing where factors take its place."""
    spot, held = decoder.description["roles"][role], decoder.stored
    name, part = spot["name"].format(layer=layer), spot["part"]
    slot = name if part is None else f"{name}.{part}"
    if f"{slot}.weight" in held:
        yield f"{slot}.weight", Target(slot, held[f"{slot}.weight"])
    elif f"{name}.weight" in held:
        yield f"{name}.weight", Target(slot, held[f"{name}.weight"], part, spot["parts"], int(spot["transposed"]))


def check_target_rank(chosen: Iterable[Target], regularizer: Regularizer) -> None:
    """UsageError for a target rank that every matrix is below already: nothing would ever be done."""
    ranks = {target.name: min(target.of(torch.empty(target.parameter.shape, device="meta")).shape) for target in chosen}
    name = max(ranks, key=lambda each: ranks[each])
    if regularizer.target_rank is not None and regularizer.target_rank >= ranks[name]:
        raise UsageError(
            f"--target-rank {regularizer.target_rank}: no matrix has a rank above {ranks[name]}, which {name} has, so "
            "nothing would be done; take less than that"
        )


@torch.no_grad()
def regularize(chosen: Iterable[Target], regularizer: Regularizer, *, rate: float, step: int) -> dict[str, float]:
    """One step on every matrix, in place, behind step number `step`, from 0, of an optimizer at the learning rate.

    Returns the penalty, summed over the matrices, and their mean participation ratio, both before the step; nothing at
    steps that are not its turn. Sharded parameters (DTensor) are gathered one at a time: every rank computes the same
    step and keeps its own shard. The arithmetic is float32, or float64 where the weights are; weights in bfloat16 lose
    steps of less than about 1/500, so act on them rarely (`every`).
    """
    if (step + 1) % regularizer.every:
        return {}
    by_parameter: dict[int, list[Target]] = {}
    for target in chosen:
        by_parameter.setdefault(id(target.parameter), []).append(target)
    penalties, ratios = [], []
    for together in by_parameter.values():
        whole = _gathered(together[0].parameter)
        for target in together:
            matrix = target.of(whole)
            moved, before = stepped(matrix, regularizer, rate=rate * regularizer.every)
            matrix.copy_(moved)
            penalties.append(before.penalty)
            ratios.append(before.participation)
        _keep(together[0].parameter, whole)
    return {"penalty": math.fsum(penalties), "participation": math.fsum(ratios) / len(ratios)}


@dataclass(frozen=True)
class Before:
    """A matrix before a step: its penalty, strength included, and its participation ratio."""

    penalty: float
    participation: float


def stepped(matrix: Tensor, regularizer: Regularizer, *, rate: float) -> tuple[Tensor, Before]:
    """The matrix [m, n] after one step at this learning rate, in float32 or float64; a zero matrix stays as it is."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    gram = _gram(wide)
    energy, square = float(gram.diagonal().sum()), float(gram.square().sum())
    if not square:
        return wide, Before(0.0, 0.0)
    ratio, target, strength = energy**2 / square, regularizer.target_rank or 1, regularizer.strength
    if regularizer.form == NUCLEAR:
        moved, penalty = _soften(wide, gram, rate * strength, regularizer.target_rank or 0)
        return moved, Before(strength * penalty, ratio)
    if regularizer.form == CONCENTRATION:
        share, penalty = rate * strength / ratio, 1 - 1 / ratio
    else:
        share, penalty = rate * strength, max(math.log(ratio / target), 0.0)
    moved = _sharpen(wide, gram, energy, square, share=min(share, 1.0), target=target)
    return moved, Before(strength * penalty, ratio)


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _times(gram: Tensor, matrix: Tensor) -> Tensor:
    return gram @ matrix if matrix.shape[0] <= matrix.shape[1] else matrix @ gram


def _sharpen(matrix: Tensor, gram: Tensor, energy: float, square: float, *, share: float, target: int) -> Tensor:
    """(1 - share) A + share (S / Q) G A at the length of A, with less of a share where PR would fall below target."""
    ratio = energy**2 / square
    if ratio <= target:
        return matrix
    # No singular value is multiplied by less than 1 - w, or by more than 1 + w (sqrt(PR) - 1) since p_1^2 <= c.
    if target > 1 and ratio * ((1 - share) / (1 + share * (math.sqrt(ratio) - 1))) ** 4 < target:
        share = _largest_share(gram, energy, square, share, target)
    moved = torch.lerp(matrix, _times(gram, matrix) * (energy / square), share)
    moved *= math.sqrt(energy) / torch.linalg.vector_norm(moved)
    return moved


def _largest_share(gram: Tensor, energy: float, square: float, share: float, target: int) -> float:
    """The share, cut to where the participation ratio meets the target; it falls as the share grows.

    A step weighs energies g_i anew, by (1 - w + w g_i S / Q)^2: the sums over them are those of g^2 to g^6.
    """
    second = gram @ gram / energy**2
    first = gram / energy
    third = second @ first
    moments = [1.0, square / energy**2, *(float((x * y).sum()) for x, y in
               ((first, second), (second, second), (second, third), (third, third)))]  # fmt: skip

    def ratio(share: float) -> float:
        here, cube = 1 - share, share / moments[1]
        total = sum(math.comb(2, k) * here ** (2 - k) * cube**k * moments[k] for k in range(3))
        squares = sum(math.comb(4, k) * here ** (4 - k) * cube**k * moments[k + 1] for k in range(5))
        return total**2 / squares

    if ratio(share) >= target:
        return share
    low, high = 0.0, share
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) >= target else (low, middle)
    return low


def _soften(matrix: Tensor, gram: Tensor, share: float, leading: int) -> tuple[Tensor, float]:
    """Singular values behind the `leading` ones less `share` times their unit, none below zero; and their sum."""
    values, vectors = torch.linalg.eigh(gram)  # ascending
    singular = values.clamp_min(0).sqrt()
    tail = singular[: max(len(singular) - leading, 0)]
    trace = float(tail.sum())
    if not trace:
        return matrix, 0.0
    lost = (share * float(tail.square().sum()) / trace / tail).nan_to_num(0.0, posinf=1.0).clamp_max(1.0)
    some = vectors[:, : len(tail)]
    # What is lost is taken off, not what is kept put together: so rounding is in proportion to the step.
    return matrix - _times((some * lost) @ some.T, matrix), trace


@torch.no_grad()
def spectra(chosen: Iterable[Target]) -> dict[str, float]:
    """Means over the matrices of three ranks of a spectrum, each at most the next: exp of Renyi entropies of p.

    Stable rank 1 / p_1, participation ratio 1 / sum p^2, effective rank exp(-sum p log p) (Roy and Vetterli 2007). It
    takes all eigenvalues: for evaluations, not for every step.
    """
    found = []
    for target in chosen:
        matrix = target.of(_gathered(target.parameter))
        values = torch.linalg.eigvalsh(_gram(matrix if matrix.dtype == torch.float64 else matrix.float()))
        share = values.clamp_min(0).double() / values.clamp_min(0).sum()
        found.append([1 / share.max(), 1 / share.square().sum(), torch.special.entr(share).sum().exp()])
    means = torch.tensor(found, dtype=torch.float64).mean(0)
    return dict(zip(("stable_rank", "participation", "effective_rank"), means.tolist(), strict=True))


def _gathered(parameter: Tensor) -> Tensor:
    """The values of a whole parameter: its own, or where it is sharded, a copy gathered from all ranks."""
    whole: Tensor = parameter.full_tensor() if _sharded(parameter) else parameter
    return whole.detach()


def _keep(parameter: Tensor, whole: Tensor) -> None:
    """Write the whole's values into this rank's shard; an unsharded parameter has them already."""
    if _sharded(parameter):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.to_local().copy_(same.redistribute(mesh, parameter.placements).to_local())


def _sharded(parameter: Tensor) -> TypeGuard[DTensor]:
    return hasattr(parameter, "full_tensor")
