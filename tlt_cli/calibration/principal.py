"""The stream turned onto its principal directions, of which the first ones stay: R [m, d] with R RT = I.

SliceGPT (arXiv:2401.15024) turns every block's stream by a matrix of its own and keeps the changes between them as
products at run time. With one R for all blocks everything folds into the weights and the file stays a stock model:
what reads the stream becomes W diag(g) RT, what writes it R W, gains become one, and the head is no embedding any more.

LayerNorm takes the mean off first. The directions are then those of the mean-free stream, and R's rows lie where the
mean of the new entries is zero: m - 1 of them. The one left is where the norms' biases go: nothing else is ever there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place
from tlt_cli.model.cut import Cut
from tlt_cli.surgery.grow import READS_NORM
from tlt_cli.surgery.matrices import head_name

_BLOCK = 1 << 20  # elements that are computed at a time


def directions(normed: Tensor, keep: int, *, layer_norm: bool) -> Tensor:
    """R [keep, d] from the stream's normed second moment [d, d]: its first eigenvectors."""
    turned = torch.linalg.eigh(normed.double())[1].flip(1)  # largest first
    turned = turned * torch.where(turned.sum(0) < 0, -1.0, 1.0)  # a sign of their own, whatever the solver's
    if not layer_norm:
        first: Tensor = turned[:, :keep].T.contiguous()
        return first
    found: Tensor = mean_free(keep) @ turned[:, : keep - 1].T
    return found - found.mean(1, keepdim=True)  # what rounding leaves of the mean


def mean_free(size: int) -> Tensor:
    """[size, size - 1], orthonormal columns whose entries sum to zero (Helmert)."""
    found = torch.zeros(size, size - 1, dtype=torch.float64)
    for column in range(size - 1):
        count = column + 1
        found[:count, column] = 1.0
        found[count, column] = -count
        found[:, column] /= math.sqrt(count * (count + 1))
    return found


def untied(fit: Fit) -> tuple[Fit, dict[str, str]]:
    """The fit with a head of its own, and which stored tensor those are that the file does not have by their name. A
    turned stream has no tied head: it reads with the final norm's gain, and the embedding writes without.

    Raises TltError where nothing can be turned.
    """
    family = fit.family
    if any(role.endswith("post_norm") for role in family.roles):
        raise TltError(
            f"--order pca: {family.name} norms what its blocks write, and the gains of those norms cannot be folded "
            "through a rotation; take --order importance"
        )
    if not fit.tied:
        return fit, {}
    embedding = fit.places[head_name(fit)]
    names = {role: f"{family.roles[role].name}.weight" for role in ("head", "embedding")}
    row = names["head"]
    head = replace(embedding, name=row, pattern=row, arrow=family.rows[row], roles=("head",))
    own = names["embedding"]  # a tied file may keep the one matrix under the head's name
    kept = embedding if embedding.name != row else replace(embedding, name=own, pattern=own, arrow=family.rows[own])
    places = {name: place for name, place in fit.places.items() if name != embedding.name}
    places = {kept.name: kept, **places, head.name: head}
    config: dict[str, Any] = {**fit.config, "tie_word_embeddings": False}
    stored = {head.name: embedding.name, kept.name: embedding.name}
    return replace(fit, places=places, tied=False, config=config), stored


@dataclass(frozen=True, eq=False)
class Turned:
    """One tensor of a turned model: a cut along everything but the stream, then R along the stream, its dim `at`.

    `gain` and `shift` name the norm in front of what reads, of whose shift every new entry takes `share`; `norm` is the
    gain of a norm itself, or 1 for its bias.
    """

    cut: Cut
    rotation: Tensor
    at: int
    gain: str | None = None
    shift: str | None = None
    gain_offset: float = 0.0
    norm: float | None = None
    scale: float = 1.0
    share: float = 0.0

    @property
    def source(self) -> str:
        """The parent's tensor that it comes from."""
        return self.cut.source

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return self.cut.shape

    def between(self, start: int, stop: int) -> Turned:
        """The rows from `start` to `stop` of the result alone."""
        rotation = self.rotation[start:stop] if self.at == 0 else self.rotation
        return replace(self, cut=self.cut.between(start, stop), rotation=rotation)

    def __call__(self, tensors: Tensors) -> Iterator[Tensor]:
        """Consecutive blocks of rows, in float32."""
        if self.norm is not None:
            yield torch.full(self.shape, self.norm, dtype=torch.float64)
            return
        cut = self._along_others()
        gain = None if self.gain is None else tensors.read(self.gain).double() + self.gain_offset
        shift = None if self.shift is None else tensors.read(self.shift).double()
        if self.at == 0:
            whole = cut.of(tensors.read(self.source).double())
            yield self._turn(whole.movedim(0, -1), gain, shift).movedim(-1, 0).float().contiguous()
            return
        step = max(1, _BLOCK // self.rotation.shape[1])
        for start in range(0, self.shape[0], step):
            piece = cut.between(start, min(self.shape[0], start + step)).read(tensors, torch.float64)
            yield self._turn(piece, gain, shift).float().contiguous()

    def _along_others(self) -> Cut:
        kept = tuple(None if dim == self.at else index for dim, index in enumerate(self.cut.kept))
        factors = {dim: by for dim, by in self.cut.factors.items() if dim != self.at}
        return replace(self.cut, kept=kept, factors=factors, offset=0.0)

    def _turn(self, value: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        """value [..., d] -> [..., m]."""
        found = (value if gain is None else value * gain) @ self.rotation.T * self.scale
        if shift is not None:  # the norm's new bias is all ones
            found = found + (value @ shift)[..., None] * self.share
        return found


Piece = Cut | Turned


def turned_cuts(
    parent: Fit, child: Fit, cuts: Mapping[str, Cut], rotation: Tensor, stored: Mapping[str, str]
) -> dict[str, Piece]:
    """The tensors of the child by name: `cuts` are those of a part that keeps as many entries of the stream, of which
    only the factors count here. `parent` and `stored` are what `untied` gives."""
    by_role: dict[tuple[str, str, int | None], str] = {}
    for place in parent.places.values():
        for role in place.roles:
            by_role[role, place.kind, place.layer] = place.name
    offset = float(parent.family.rules.get("gain_offset", 0.0))
    found: dict[str, Piece] = {}
    for name, place in child.places.items():
        old = parent.places[cuts[name].source]
        cut = replace(cuts[name], source=stored.get(old.name, old.name))
        found[name] = _turned(place, old, cut, rotation, by_role, offset)
    return found


def _turned(
    place: Place, old: Place, cut: Cut, rotation: Tensor, by_role: Mapping[tuple[str, str, int | None], str],
    offset: float,
) -> Piece:  # fmt: skip
    dims = place.arrow.dims
    if ("hidden",) not in dims:
        return cut
    at = dims.index(("hidden",))
    factor = cut.factors.get(at)
    scale = 1.0 if factor is None else float(factor[0])
    if place.roles[0].endswith("_norm"):
        value = 1.0 if place.kind == "bias" else scale - offset
        return Turned(cut, rotation, at, norm=value)
    norm = READS_NORM.get(place.roles[0])
    if norm is None:
        return Turned(cut, rotation, at, scale=scale)
    layer = old.layer
    return Turned(
        cut, rotation, at, gain=by_role[norm, "weight", layer], shift=by_role.get((norm, "bias", layer)),
        gain_offset=offset, scale=scale, share=1 / len(rotation),
    )  # fmt: skip
