"""Several models run as one: side by side in a stream K times as wide, their logits averaged.

Every weight is stored with the K parts in front, [K, out, in] for a matrix, and multiplies its own K-th of what it
reads: the whole is block-diagonal, and no zero of it is stored or computed. Norms see the entries of one part. Glue may
stand in front of a linear and mix what all parts read there; where it was folded into one, that one matrix is dense.
The shapes that docstrings use are those of `decoder`; H is the width of one part, as wide as the widest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.model.decoder import STEM, Decoder, some_rows
from tlt_cli.model.grouped_factors import Stacked
from tlt_cli.model.step import Step, frequencies, rotate


class Grouped(Stacked):
    """A decoder of K parts: ids [B, T] in, the weighted mean of the parts' logits [B, T, V] out.

    The description is that of one part at the sizes that are stored, and "groups": "weights" of the parts, and "parts",
    in which each has what differs from that description. A narrower part's entries come first and the rest are zeros,
    which its norms do not count; its rotation, temperature and epsilon are its own.

    "groups" may have "glue": its "kind", its "rank" and its "sites", the modules in front of which it stands. G = I + D
    with D = `<site>.glue_b.weight` [K in, r] times `<site>.glue_a.weight` [r, K in] (lowrank), `<site>.glue.weight`
    [K in, K in] (full), or that one's [K, K] with every number in the place of an identity (blocks). "dense" are
    modules whose weight is [K out, K in], of the head [V, K H], the weights of the parts in it.

    A part with a "lowrank" of its own stores matrices as that says. Where one does, each multiplies that one by itself.
    """

    @property
    def longest(self) -> int | None:
        """The number of positions that all parts have; None where any length runs."""
        tables, ropes = self.each("positions"), self.each("ropes")
        limits = [*tables, *(rope.get("limit") for found in ropes for rope in found.values())]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    @property
    def vectors(self) -> set[str]:
        """The names of gains and biases [K, n]."""
        return {
            name
            for role, spot in self.description["roles"].items()
            for layer in ([0] if role in STEM else self._layers())
            for name, shape in self._shapes_of(role, layer)
            if len(shape) == 2 and not (spot["name"] in self._dense and name.endswith(".weight"))
        }

    def each(self, key: str) -> list[Any]:
        """What the description says for each part."""
        return [part.get(key, self.description[key]) for part in self.description["groups"]["parts"]]

    def _agreed(self, values: list[Any], like: Tensor) -> Any:
        """The number that all parts have, or a tensor of each one's [K, 1]."""
        if values.count(values[0]) == len(values):
            return values[0]
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]

    @property
    def _heads_differ(self) -> bool:
        pairs = [*zip(self.each("heads"), self.each("kv_heads"), strict=True)]
        return len({heads // kv for heads, kv in pairs}) > 1

    def _present_heads(self, like: Tensor) -> Tensor:
        """Ones, and zeros at the query heads that a part lacks [K heads D]: with no query they would see everything."""
        data = self.description
        found = like.new_zeros(self.count, data["kv_heads"], data["heads"] // data["kv_heads"], data["head_dim"])
        for part, (heads, kv) in enumerate(zip(self.each("heads"), self.each("kv_heads"), strict=True)):
            found[part, :kv, : heads // kv] = 1.0
        return found.flatten()

    # --- weights -----------------------------------------------------------------------------------------------

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Vectors `ids` [...] along the last dim of a stored tensor, counted through all parts -> [..., H]."""
        if self._fetch_rows is not None:
            return super().rows(name, ids)
        return functional.embedding(ids, self.weight(name).flatten(0, 1))

    def _matrix(self, x: Tensor, role: str, layer: int, inner: dict[str, Tensor] | None) -> Tensor:
        spot = self.description["roles"][role]
        name, part, _ = self._slot(spot, layer)
        x = x * self._present_heads(x) if role == "output" and self._heads_differ else x
        x = self._glued(x, spot["name"], layer, inner)
        if self._by_itself(role, layer):
            return self._one_by_one(x, role, layer, None if spot["name"] in self._glue["sites"] else inner)
        bias = self.weight(f"{name}.bias") if spot["bias"] else None
        bias = bias if bias is None or part is None else bias.chunk(spot["parts"], dim=1)[part]
        if bias is not None and layer >= min(self.each("layers")):  # a part that lacks the layer adds nothing in it
            bias = bias * torch.tensor([layer < own for own in self.each("layers")], device=x.device)[:, None]
        if spot["name"] in self._dense:
            weight = self.weight(f"{name}.weight")
            weight = weight.T if spot["transposed"] else weight
            weight = weight if part is None else weight.chunk(spot["parts"])[part]
            return functional.linear(x, weight, bias if bias is None else bias.flatten())
        if self._fetch_rows is not None:  # one part's matrix after the other: no more than that is held
            streams = self._split(x).unbind(-2)
            found = [functional.linear(stream, self._one(role, at, layer)) for at, stream in enumerate(streams)]
            y = torch.stack(found, dim=-2)
            return (y if bias is None else y + bias).flatten(-2)
        weight = self.weight(f"{name}.weight")
        weight = weight.mT if spot["transposed"] else weight
        weight = weight if part is None else weight.chunk(spot["parts"], dim=1)[part]
        each = self._split(x).flatten(0, -3).transpose(0, 1)  # [K, B T, in]
        y = torch.bmm(each, weight.mT) if bias is None else torch.baddbmm(bias[:, None], each, weight.mT)
        return torch.unflatten(y.transpose(0, 1).flatten(1), 0, x.shape[:-1])

    @property
    def _glue(self) -> dict[str, Any]:
        found: dict[str, Any] = self.description["groups"].get("glue") or {"kind": None, "sites": []}
        return found

    @property
    def _dense(self) -> list[str]:
        found: list[str] = self.description["groups"].get("dense") or []
        return found

    @property
    def _head_site(self) -> str | None:
        """What the glue in front of the head is called: of a tied one that is not the module that holds it."""
        return next((site for site in self._glue["sites"] if "{layer}" not in site), None)

    def _glued(self, x: Tensor, site: str | None, layer: int = 0, inner: dict[str, Tensor] | None = None) -> Tensor:
        """x [..., K in] behind the glue of a site, if it has any; `inner` remembers it for fused linears."""
        if site is None or site not in self._glue["sites"]:
            return x
        name, kind = site.format(layer=layer), self._glue["kind"]
        if inner is not None and f"{name}.glue" in inner:
            return inner[f"{name}.glue"]
        if kind == "lowrank":
            narrow = functional.linear(x, self.weight(f"{name}.glue_a.weight"))
            y = x + functional.linear(narrow, self.weight(f"{name}.glue_b.weight"))
        elif kind == "blocks":
            y = x + torch.einsum("...kn,jk->...jn", self._split(x), self.weight(f"{name}.glue.weight")).flatten(-2)
        else:
            y = x + functional.linear(x, self.weight(f"{name}.glue.weight"))
        if inner is not None:
            inner[f"{name}.glue"] = y
        return y

    def _one(self, role: str, at: int, layer: int) -> Tensor:
        """One part's matrix of a role [out, in], fetched for this use."""
        spot, (outputs, inputs) = self.description["roles"][role], self._stored_sizes(layer)[role]
        rows = inputs if spot["transposed"] else outputs * (spot["parts"] or 1)
        name, part, _ = self._slot(spot, layer)
        stored = self.rows(f"{name}.weight", torch.arange(at * rows, (at + 1) * rows))
        matrix = stored.T if spot["transposed"] else stored
        return matrix if part is None else matrix.chunk(spot["parts"])[part]

    def normalize(self, x: Tensor, role: str, layer: int = 0) -> Tensor:
        """x [..., K n], or [B, K heads, T, n] of a norm of heads: each part by itself; dtype kept."""
        spot, offset = self.description["roles"][role], self.description["gain_offset"]
        name, heads = spot["name"].format(layer=layer), role in ("query_norm", "key_norm")
        wide = x if x.dtype == torch.float64 else x.float()
        wide = torch.unflatten(wide, 1 if heads else -1, (self.count, -1))

        def spread(values: Any) -> Any:
            """[K, ...] so that it goes with [..., K, n] or [B, K, heads, T, n]."""
            return values[:, None, None] if heads and isinstance(values, Tensor) else values

        width = self._agreed(self.each("head_dim" if heads else "hidden"), wide)
        epsilon = spread(self._agreed(self.each("epsilon"), wide))
        gain = spread(self.weight(f"{name}.weight").to(wide.dtype))
        bias = spread(self.weight(f"{name}.bias").to(wide.dtype)) if spot["bias"] else None
        if self.description["norm"] == "layer":
            own: Any = 1.0  # entries that a part lacks count neither in its mean nor in its variance
            if isinstance(width, Tensor):
                own = spread(torch.arange(wide.shape[-1], device=x.device) < width)
            wide = (wide - (wide * own).sum(-1, keepdim=True) / spread(width)) * own
        unit = wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / spread(width) + epsilon)
        scaled = unit * (offset + gain) if offset else unit * gain
        scaled = scaled if bias is None else scaled + bias
        joined: Tensor = scaled.flatten(1, 2) if heads else scaled.flatten(-2)
        return joined.to(x.dtype)

    # --- the pass ----------------------------------------------------------------------------------------------

    def angles(self, name: str, positions: Tensor) -> Tensor:
        """[T, D/2] or [B, 1, 1, T, D/2] where all parts turn alike, else [K, 1, T, D/2] or [B, K, 1, T, D/2]."""
        ropes, sizes = [found[name] for found in self.each("ropes")], self.each("head_dim")
        if ropes.count(ropes[0]) == len(ropes) and min(sizes) == self.description["head_dim"]:
            turned = super().angles(name, positions)
            return turned if positions.dim() == 1 else turned[:, None]
        pairs = torch.zeros(self.count, self.description["head_dim"] // 2, dtype=positions.dtype)
        for part, (rope, size) in enumerate(zip(ropes, sizes, strict=True)):
            pairs[part, : size // 2] = frequencies(rope, size, positions.dtype, torch.device("cpu"))
        turned = positions[..., None, :, None] * pairs.to(positions.device)[:, None]  # [K, T, D/2] or [B, K, T, D/2]
        return turned.unsqueeze(-3)

    def turn(self, query: Tensor, key: Tensor, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """As of one model; queries also make up for a part's temperature that is not the kernel's."""
        name = self.description["rotary"][layer]
        query, key = (torch.unflatten(x, 1, (self.count, -1)) for x in (query, key))  # [B, K, heads, T, D]
        if name is not None:
            query, key = rotate(query, step.rotations[name]), rotate(key, step.rotations[name])
        scale = self.description["softmax_scale"][layer]
        warmth = self._agreed([scales[layer] / scale for scales in self.each("softmax_scale")], query)
        if isinstance(warmth, Tensor):
            query = query * warmth[:, None, None]
        elif warmth != 1.0:
            query = query * warmth
        return query.flatten(1, 2), key.flatten(1, 2)

    def embed(self, ids: Tensor, step: Step) -> Tensor:
        """ids [B, T] -> the parts' streams side by side [B, T, K H], learned positions included."""
        x = self._split(self.words("embedding", ids))
        scales = self.each("embedding_scale")
        if scales[0] is not None:
            x = x * torch.tensor(scales, dtype=x.dtype, device=x.device)[:, None]
        x = x.flatten(-2)
        if "positions" in self.description["roles"]:
            x = x + self.words("positions", step.positions.to(ids.device))
        return x

    def words(self, role: str, ids: Tensor) -> Tensor:
        """Rows `ids` [...] of every part's table -> [..., K H]."""
        if self._by_itself(role, 0):
            return torch.cat([part.words(role, ids) for part in self._own], dim=-1)
        size = self.description["vocab" if role == "embedding" else "positions"]
        first = torch.arange(self.count, device=ids.device) * size
        return self.rows(f"{self.description['roles'][role]['name']}.weight", ids[..., None] + first).flatten(-2)

    def head(self, x: Tensor) -> Tensor:
        """The normalized streams [B, T, K H] -> the weighted mean of the parts' logits [B, T, V]."""
        data = self.description
        spot, cap, vocab = data["roles"]["embedding" if data["tied"] else "head"], data["final_softcap"], data["vocab"]
        name, biases = f"{spot['name']}.weight", self.weight(f"{spot['name']}.bias") if spot["bias"] else None
        if spot["name"] in self._dense:
            return self._dense_head(x, name, biases, spot["transposed"])
        x = self._glued(x, self._head_site)
        streams, weights, chunks = self._split(x).unbind(-2), data["groups"]["weights"], []
        if self._by_itself("embedding" if data["tied"] else "head", 0):
            each = zip(self._own, streams, weights, strict=True)
            return sum((weight * part.head(stream) for part, stream, weight in each), start=x.new_zeros(()))
        by_rows = self._fetch_rows is not None and not spot["transposed"]
        heads = () if by_rows else self.weight(name).unbind()
        for first in range(0, vocab, self._head_rows):
            last, total = min(first + self._head_rows, vocab), None
            for part, (stream, weight) in enumerate(zip(streams, weights, strict=True)):
                if by_rows:
                    rows = self.rows(name, torch.arange(first, last, device=x.device) + part * vocab)
                else:
                    rows = some_rows(heads[part].T if spot["transposed"] else heads[part], first, last)
                logits = functional.linear(stream, rows, None if biases is None else biases[part, first:last])
                logits = weight * (logits if cap is None else torch.tanh(logits / cap) * cap)
                total = logits if total is None else total + logits
            assert total is not None
            chunks.append(total)
        self._held = None
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)

    def _dense_head(self, x: Tensor, name: str, biases: Tensor | None, transposed: bool) -> Tensor:
        """As `head`, by one matrix that has the weights in it."""
        chunks, vocab = [], self.description["vocab"]
        for first in range(0, vocab, self._head_rows):
            last = min(first + self._head_rows, vocab)
            if self._fetch_rows is not None and not transposed:
                rows = self.rows(name, torch.arange(first, last, device=x.device))
            else:
                whole = self.weight(name)
                rows = some_rows(whole.T if transposed else whole, first, last)
            chunks.append(functional.linear(x, rows))
        self._held = None
        logits = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)
        if biases is None:
            return logits
        return logits + torch.tensor(self.description["groups"]["weights"], dtype=x.dtype, device=x.device) @ biases

    # --- shapes ------------------------------------------------------------------------------------------------

    def sizes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of all parts together: what an adapter beside a linear reads and writes."""
        return {role: tuple(self.count * size for size in sizes) for role, sizes in self._stored_sizes(layer).items()}

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from super()._shapes()
        for role, spot in self.description["roles"].items():
            site = self._head_site if self._says(role) else spot["name"]
            for layer in [0] if role in STEM else self._layers():
                if site in self._glue["sites"] and not spot["part"]:
                    yield from self._glue_shapes(
                        str(site).format(layer=layer), self.count * self._stored_sizes(layer)[role][1]
                    )

    def _says(self, role: str) -> bool:
        """Whether the role's matrix makes the logits."""
        return role == "head" or (role == "embedding" and bool(self.description["tied"]))

    def _shapes_of(self, role: str, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        by_itself, dense = self._by_itself(role, layer), self.description["roles"][role]["name"] in self._dense
        for name, shape in super()._shapes_of(role, layer):
            if dense and name.endswith(".weight"):
                outputs, inputs = reversed(shape) if self.description["roles"][role]["transposed"] else shape
                across = (outputs if self._says(role) else self.count * outputs, self.count * inputs)
                yield name, across[::-1] if self.description["roles"][role]["transposed"] else across
            elif not by_itself or name.endswith(".bias"):
                yield name, (self.count, *shape)
        for name, shapes in self._stacked(role, layer).items() if by_itself else ():
            if not name.endswith(".bias"):
                yield name, (len(shapes), *map(max, *shapes.values(), [0] * len(next(iter(shapes.values())))))

    def _glue_shapes(self, name: str, width: int) -> list[tuple[str, tuple[int, ...]]]:
        if self._glue["kind"] == "lowrank":
            rank = self._glue["rank"]
            return [(f"{name}.glue_a.weight", (rank, width)), (f"{name}.glue_b.weight", (width, rank))]
        size = self.count if self._glue["kind"] == "blocks" else width
        return [(f"{name}.glue.weight", (size, size))]


def decoder_class(description: dict[str, Any]) -> type[Decoder]:
    """What runs a description."""
    return Decoder if description.get("groups") is None else Grouped
