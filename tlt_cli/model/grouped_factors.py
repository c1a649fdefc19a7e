"""One of several models side by side, where some of them store matrices as factors.

What the models have under one name is stacked, [n, ...] for the n of them that have it, each filled up with zeros to
the largest. So no model's factors take room for another that has none, and each model is as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlt_cli.model.decoder import STEM, Decoder, FetchRows


class OnePart(Decoder):
    """The part `number` of a whole, which holds all weights: this reads its slices of them, without what fills them up.

    It has the sizes of axes that slices are stored at, but ranks, rows kept as they are, and neurons of its own.
    """

    slices: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]  # by name: which of the stack, own and stored shape

    def __init__(self, whole: Decoder, number: int) -> None:
        nn.Module.__init__(self)
        own = whole.description["groups"]["parts"][number]
        self.description = {**whole.description, **{key: own[key] for key in ("ffn", "lowrank") if key in own}}
        self.layers: int = own.get("layers", whole.description["layers"])
        self._whole, self._held, self.slices = (whole,), None, {}  # in a tuple: it is no module of this one
        self._read_factors()

    @property
    def _fetch_rows(self) -> FetchRows | None:  # type: ignore[override]
        return self._whole[0]._fetch_rows

    def has(self, role: str, layer: int) -> bool:
        """Whether it has this role's matrix at all."""
        return role in STEM or layer < self.layers

    def stores_apart(self, role: str, layer: int) -> bool:
        """Whether it stores the matrix in another way than the family, or one that is fused with it."""
        spot = self.description["roles"][role]
        name, _, slot = self._slot(spot, layer)
        return self.has(role, layer) and (slot in self._ranks or self._apart(spot, name))

    def weight(self, name: str) -> Tensor:
        """Its own slice of a stored tensor; where nothing is held in memory no other's is fetched."""
        whole, (at, shape, stored) = self._whole[0], self.slices[name]
        if self._fetch_rows is not None and len(shape) == 2:
            found = whole.rows(name, torch.arange(at * stored[1], at * stored[1] + shape[0]))
        else:
            found = whole.weight(name)[at]
        return found[tuple(slice(size) for size in shape)]

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` [...] of its slice of a stored matrix -> [..., n]."""
        at, shape, stored = self.slices[name]
        found, scale = self._whole[0].rows(name, ids + at * stored[1])[..., : shape[1]], self._scale(name)
        return found if scale is None else found * self.weight(scale)[ids, None]


class Stacked(Decoder):
    """A decoder of K parts whose linears may be one part after the other's; `Grouped` is the rest of it."""

    @property
    def count(self) -> int:
        """K."""
        return len(self.description["groups"]["weights"])

    def _split(self, x: Tensor) -> Tensor:
        """[..., K n] -> [..., K, n]."""
        return torch.unflatten(x, -1, (self.count, -1))

    def _read_factors(self) -> None:
        super()._read_factors()
        parts = self.description["groups"]["parts"]
        self._own: tuple[OnePart, ...] = ()
        if not any(part.get("lowrank") for part in parts):
            return
        self._own = tuple(OnePart(self, number) for number in range(len(parts)))
        self._coded = any(part._coded for part in self._own)
        for layer in self._layers():
            self._ffn[str(layer)] = max(part._stored_sizes(layer)["up"][0] for part in self._own)
        for role in self.description["roles"]:
            for layer in [0] if role in STEM else self._layers():
                stored = dict(self._shapes_of(role, layer))
                for name, found in self._stacked(role, layer).items() if self._by_itself(role, layer) else ():
                    for at, (part, shape) in enumerate(found.items()):
                        which = part if name.endswith(".bias") else at
                        self._own[part].slices[name] = which, shape, stored[name]

    def _by_itself(self, role: str, layer: int) -> bool:
        """Whether each part multiplies this matrix by itself, for some store it as factors."""
        return any(part.stores_apart(role, layer) for part in self._own)

    def _stacked(self, role: str, layer: int) -> dict[str, dict[int, tuple[int, ...]]]:
        """The tensors of one role's matrices by name, and of each by part the shape that it has there."""
        found: dict[str, dict[int, tuple[int, ...]]] = {}
        for number, part in enumerate(self._own):
            for name, shape in part._shapes_of(role, layer) if part.has(role, layer) else ():
                found.setdefault(name, {})[number] = shape
        return found

    def row_numbers(self, name: str, stored: Tensor) -> Iterator[tuple[Tensor, int]]:
        """As of one model, part by part."""
        for part in self._own:
            if name in part.slices:
                (at, (kept,), _), left = part.slices[name], f"{name.removesuffix('.lowrank_rows')}.lowrank_b.weight"
                yield stored[at, :kept], part.slices[left][1][0] + kept

    def _scale(self, name: str) -> str | None:
        return None  # a part scales its own

    def _one_by_one(self, x: Tensor, role: str, layer: int, inner: dict[str, Any] | None) -> Tensor:
        """As `_matrix`, each part by what it stores. A part that lacks the layer says nothing in it."""
        size, found = self._stored_sizes(layer)[role][0], []
        for number, (part, stream) in enumerate(zip(self._own, self._split(x).unbind(-2), strict=True)):
            if not part.has(role, layer):
                found.append(x.new_zeros(*stream.shape[:-1], size))
                continue
            own = None if inner is None else inner.setdefault(f"part {number}", {})
            y = part._matrix(stream[..., : part._stored_sizes(layer)[role][1]], role, layer, own)
            found.append(functional.pad(y, (0, size - y.shape[-1])))
        return torch.cat(found, dim=-1)
