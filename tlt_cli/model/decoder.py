"""One decoder for every family: what a block computes is data, the weights keep the checkpoint's own names.

It needs torch and `step`, and nothing else. The shapes that the docstrings use: B sequences of T tokens, S keys seen so
far (S = T without a cache), hidden entries H, heads of D entries, V words in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tlt_cli.model.step import Cache, Step, frequencies, rotate

Fetch = Callable[[str], Tensor]
FetchRows = Callable[[str, Tensor], Tensor]

HEAD_ROWS = 16384  # words of the vocabulary whose logits a decoder without weights computes at a time
_STREAMED_ENTRIES = 1 << 20  # of the head that a decoder without weights fetches at a time
STEM = ("embedding", "positions", "final_norm", "head")
HEAD_NORMS = ("query_norm", "key_norm")  # over a head's entries; all others are over the stream's
NORMS = ("attention_norm", *HEAD_NORMS, "attention_post_norm", "ffn_norm", "ffn_post_norm", "final_norm")


def _tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": functional.relu,
}


class Adapter(Protocol):
    """What changes a decoder's linears without touching its weights. Its own weights are no part of the decoder."""

    def begin(self, x: Tensor, step: Step) -> None:
        """Called once per pass with the stream behind the embedding [B, T, H]."""

    def add(self, y: Tensor, x: Tensor, role: str, layer: int) -> Tensor:
        """What takes the place of a linear's output y [B, T, out]; x [B, T, in] is what it read."""


class _Room(nn.Module):
    """A part of the tree of names. Called, it runs what it is given: sharding hangs its hooks on such calls."""

    def forward(self, run: Callable[..., Any], *given: Any) -> Any:
        return run(*given)


def unpivot(rows: Tensor, size: int) -> Tensor:
    """Where each of `size` rows is when those numbered by `rows` [k], ascending, stand before all others: [size]."""
    kept = torch.zeros(size, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
    return torch.where(kept, kept.cumsum(0) - 1, len(rows) - 1 + (~kept).cumsum(0))


class _RootMeanSquare(torch.autograd.Function):
    """x [..., n] over its root-mean-square, times a gain [n]: for the way back x is kept and nothing else of its size.

    With r = (mean x^2 + epsilon)^(-1/2) and h = gradient * gain the gradient of x is r h - x r^3 sum(h x) / n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, gain, inverse = ctx.saved_tensors
        own = gradients[0] * gain
        along = (own * x).sum(-1, keepdim=True) * inverse.pow(3) / -x.shape[-1]
        of_gain = (gradients[0] * x * inverse).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return own.mul_(inverse).addcmul_(x, along), of_gain, None


class Decoder(nn.Module):
    """A causal language model as its description says: ids [B, T] in, logits [B, T, V] out.

    `description` is plain data, as `describe` makes it. All parameters are named as in the checkpoint's file and kept
    as stored there, fused and transposed ones too, so `load_state_dict` takes a file's tensors as they are. Every use
    of a weight goes through `weight` or `rows`: a streaming decoder holds none and fetches each one there.

    A matrix may be two factors, b @ a: `<slot>.lowrank_a.weight` [r, in] and `<slot>.lowrank_b.weight` [out, r], a slot
    being a module's name, with ".0", ".1", ... where the module holds several fused. `description["lowrank"]` has
    "ranks" by slot; "shared", whose lowrank_a a slot uses; "pivoted", the entries [from, to] of its rank that are rows
    of the matrix as they are, which lowrank_b lacks and `<slot>.lowrank_rows` numbers; "ffn", the size of the
    feed-forward in layers that have their own; and "bits", with which factors are int8 buffers and each has a parameter
    `<slot>.lowrank_a.scale` [r] or `<slot>.lowrank_b.scale` [out], a factor for every row.
    """

    def __init__(
        self,
        description: dict[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.description = description
        self.observe: Callable[[str, int, Tensor], None] | None = None  # sees role, layer and input of every linear
        self._adapter: tuple[Adapter, ...] = ()  # in a tuple: a module in an attribute would be registered
        self._fetch: Fetch | None = None
        self._fetch_rows: FetchRows | None = None
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._held: tuple[str, Tensor] | None = None
        self._leaves: dict[str, tuple[nn.Module, str]] = {}
        self._read_factors()
        for name, shape in self._shapes():
            if name.endswith(".lowrank_rows"):
                self._add(name, torch.arange(shape[-1], device=device).expand(shape).contiguous())
            elif self._codes(name):
                self._add(name, torch.zeros(shape, device=device, dtype=torch.int8))
            else:
                self._add(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._rooms = self._found_rooms()
        self._act = ACTIVATIONS[description["activation"]]
        if self._like.device.type != "meta":
            self.initialize()

    def _read_factors(self) -> None:
        """What the description says of matrices that are factors."""
        lowrank = self.description.get("lowrank") or {}
        self._ranks: dict[str, int] = lowrank.get("ranks", {})
        self._shared: dict[str, str] = lowrank.get("shared", {})
        self._pivoted: dict[str, list[int]] = lowrank.get("pivoted", {})
        self._ffn: dict[str, int] = lowrank.get("ffn", {})
        self._coded: bool = lowrank.get("bits") is not None

    @classmethod
    def stream(
        cls,
        description: dict[str, Any],
        fetch: Fetch,
        fetch_rows: FetchRows | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Decoder:
        """A decoder without weights: `fetch(name)` brings a tensor just before its use, and it is dropped after.

        `fetch_rows(name, ids)` brings rows of a matrix alone: the embeddings of the words in use, the head in chunks.
        Memory is one tensor and the activations. Such a decoder cannot be trained.
        """
        decoder = cls(description, device="meta", dtype=dtype)
        decoder._fetch, decoder._fetch_rows = fetch, fetch_rows
        decoder._like = torch.empty(0, device=device, dtype=dtype)
        return decoder

    @property
    def device(self) -> torch.device:
        """Where ids must be."""
        return self._like.device if self._fetch is not None else next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._like.dtype if self._fetch is not None else next(self.parameters()).dtype

    @property
    def adapter(self) -> Adapter | None:
        """What changes the linears, if anything."""
        return self._adapter[0] if self._adapter else None

    @adapter.setter
    def adapter(self, value: Adapter | None) -> None:
        self._adapter = () if value is None else (value,)

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module does, but an adapter that is a module becomes no part of this one."""
        if name == "adapter":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def longest(self) -> int | None:
        """The number of positions the model has; None where any length runs."""
        limits = [self.description["positions"], *(rope.get("limit") for rope in self.description["ropes"].values())]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    @property
    def stored(self) -> dict[str, Tensor]:
        """All tensors of the checkpoint by name: parameters, row numbers of pivoted factors, codes of coded ones."""
        return {name: getattr(module, leaf) for name, (module, leaf) in self._leaves.items()}

    def row_numbers(self, name: str, stored: Tensor) -> Iterator[tuple[Tensor, int]]:
        """What a tensor of a pivoted factor numbers, and the rows of the matrix that it may."""
        module, leaf = self._leaves[f"{name.removesuffix('.lowrank_rows')}.lowrank_b.weight"]
        yield stored, len(getattr(module, leaf)) + len(stored)

    @property
    def vectors(self) -> set[str]:
        """The names of gains and biases: what is stored and no matrix."""
        return {name for name, shape in self._shapes() if len(shape) < 2}

    def initialize(self, deviation: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Start values for training from nothing: normal matrices, unit gains, zero biases."""
        roles = self.description["roles"]
        norms = {roles[role]["name"].format(layer=layer) for role in NORMS if role in roles for layer in self._layers()}
        gain = 1.0 - self.description["gain_offset"]
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                module, _, kind = name.rpartition(".")
                if kind == "bias":
                    parameter.zero_()
                elif module in norms:
                    parameter.fill_(gain)
                elif kind == "scale":
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, deviation, generator=generator)

    # --- weights -----------------------------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """A stored tensor by its name in the file: the parameter itself, or fetched for this use."""
        if self._fetch is None:
            module, leaf = self._leaves[name]
            parameter: Tensor = getattr(module, leaf)
            return parameter
        if self._held is not None and self._held[0] == name:
            return self._held[1]
        self._held = None if not name.endswith(".bias") else self._held  # room first, then the next tensor
        tensor = self._fetch(name)
        tensor = tensor.to(self._like) if tensor.is_floating_point() else tensor.to(self._like.device)
        if tensor.dim() > 1:
            self._held = (name, tensor)  # query, key and value may be one fused tensor, read three times in a row
        return tensor

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` [...] of a stored matrix [rows, H] -> [..., H]."""
        scale = self._scale(name)
        if self._fetch_rows is None:
            found = functional.embedding(ids, self.weight(name))
        else:
            self._held = None
            wanted, inverse = torch.unique(ids, return_inverse=True)
            found = self._fetch_rows(name, wanted).to(self._like)
            if not torch.equal(wanted, ids):  # a stretch of rows is not copied once more
                found = found[inverse]
        return found if scale is None else found * self.weight(scale)[ids, None]

    def linear(self, x: Tensor, role: str, layer: int, inner: dict[str, Any] | None = None) -> Tensor:
        """One of a block's linears: x [B, T, in] -> [B, T, out], with what the adapter makes of it.

        `inner` remembers what right factors made of this x, for the linears that share them.
        """
        if self.observe is not None:
            self.observe(role, layer, x)
        y = self._matrix(x, role, layer, inner)
        return y if not self._adapter else self._adapter[0].add(y, x, role, layer)

    def _matrix(self, x: Tensor, role: str, layer: int, inner: dict[str, Any] | None) -> Tensor:
        spot = self.description["roles"][role]
        name, part, slot = self._slot(spot, layer)
        bias = self.weight(f"{name}.bias") if spot["bias"] else None
        bias = bias if bias is None or part is None else bias.chunk(spot["parts"])[part]
        if slot in self._ranks:
            return self.factored(x, slot, bias, inner)
        if self._apart(spot, name):
            return functional.linear(x, self.weight(f"{slot}.weight"), bias)
        weight = self.weight(f"{name}.weight")
        weight = weight.T if spot["transposed"] else weight
        return functional.linear(x, weight if part is None else weight.chunk(spot["parts"])[part], bias)

    def factored(self, x: Tensor, slot: str, bias: Tensor | None = None, inner: dict[str, Any] | None = None) -> Tensor:
        """x [..., in] times a matrix that is stored as two factors -> [..., out]."""
        owner = self._shared.get(slot, slot)
        narrow = None if inner is None else inner.get(owner)
        if narrow is None:
            narrow = functional.linear(x, self.factor(f"{owner}.lowrank_a.weight"))
            if inner is not None:
                inner[owner] = narrow
        left = self.factor(f"{slot}.lowrank_b.weight")
        if slot not in self._pivoted:
            return functional.linear(narrow, left, bias)
        start, stop = self._pivoted[slot]
        both = torch.cat([narrow[..., start:stop], functional.linear(narrow, left)], dim=-1)
        place = unpivot(self.weight(f"{slot}.lowrank_rows"), both.shape[-1])
        wide = both.index_select(-1, place)
        return wide if bias is None else wide + bias

    def factor(self, name: str) -> Tensor:
        """A stored factor as numbers: from codes each row times its scale."""
        stored, scale = self.weight(name), self._scale(name)
        return stored if scale is None else stored * self.weight(scale)[:, None]

    def _scale(self, name: str) -> str | None:
        """What the scales of a matrix's rows are called; None where it is no codes."""
        return f"{name.removesuffix('.weight')}.scale" if self._codes(name) else None

    def _codes(self, name: str) -> bool:
        """Whether a tensor is codes."""
        return self._coded and name.endswith((".lowrank_a.weight", ".lowrank_b.weight"))

    def normalize(self, x: Tensor, role: str, layer: int = 0) -> Tensor:
        """x [..., n] with unit root-mean-square (arXiv:1910.07467) or unit variance, times the gain; dtype kept."""
        spot, epsilon = self.description["roles"][role], self.description["epsilon"]
        name, offset = spot["name"].format(layer=layer), self.description["gain_offset"]
        gain = self.weight(f"{name}.weight")
        bias = self.weight(f"{name}.bias") if spot["bias"] else None
        if self.description["norm"] == "layer":
            gain = gain + offset if offset else gain
            return functional.layer_norm(x, (x.shape[-1],), gain, bias, epsilon)
        wide = x if x.dtype == torch.float64 else x.float()
        if wide is x and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            scaled: Tensor = _RootMeanSquare.apply(x, offset + gain.to(x.dtype) if offset else gain, epsilon)  # type: ignore[no-untyped-call]
            return scaled if bias is None else scaled + bias
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        # where gains are stored as 1 + w the sum needs the wide type: near 1 a bfloat16 loses most of w
        scaled = (unit * (offset + gain.to(wide.dtype))).to(x.dtype) if offset else gain * unit.to(x.dtype)
        return scaled if bias is None else scaled + bias

    # --- the pass ----------------------------------------------------------------------------------------------

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        present: Tensor | None = None,
        documents: Tensor | None = None,
        read: Callable[[Tensor], Any] | None = None,
    ) -> Any:
        """Logits [B, T, V] of ids [B, T]; with a cache the ids continue what it has seen.

        `present` [B, S] is False where a row of what was seen so far, ids included, is padding. `documents` [B, T]
        numbers the texts that share a row: none sees another, and each counts its positions from 0. `read`, given the
        stream behind the last block [B, T, H], returns something else in the place of `logits` of it.
        """
        step = self.begin(ids.shape[1], cache, present, documents)
        x = self.embed(ids, step)
        if self._adapter:
            self._adapter[0].begin(x, step)
        for layer in self._layers():
            room = self.rooms.get(layer)
            x = self.block(x, layer, step) if room is None else room(self.block, x, layer, step)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.logits(x) if read is None else read(x)

    @property
    def rooms(self) -> dict[int, nn.Module]:
        """The module that holds a layer's parameters, by layer; `forward` runs the layer by calling it."""
        return self._rooms

    def new_cache(self) -> Cache:
        """An empty cache for this decoder."""
        return Cache(self.description["layers"])

    def begin(
        self,
        length: int,
        cache: Cache | None = None,
        present: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Step:
        """What `embed` and every `block` of a pass over T = `length` tokens share; the rest as for `forward`."""
        start = 0 if cache is None else cache.length
        if self.longest is not None and start + length > self.longest:
            raise ValueError(f"{start + length} tokens, but this model has {self.longest} positions")
        like = self._like if self._fetch is not None else next(self.parameters())
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        positions = torch.arange(start, start + length, device=like.device)
        if present is not None:  # a padded row counts from its first token on
            present = present.to(like.device).bool()
            positions = (present.long().cumsum(-1) - 1).clamp(min=0)[:, start:]
        if documents is not None:  # and so does each document; a cache or padding never comes with them
            assert cache is None and present is None
            first = torch.ones_like(documents, dtype=torch.bool)
            first[:, 1:] = documents[:, 1:] != documents[:, :-1]
            positions = positions - torch.where(first, positions, 0).cummax(-1).values
        rotations = {}
        for name in self.description["ropes"]:
            angles = self.angles(name, positions.to(wide))
            rotations[name] = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        return Step(start, length, positions, rotations, cache, present, documents)

    def angles(self, name: str, positions: Tensor) -> Tensor:
        """How far each pair of a head turns at positions [T] or [B, T]: [T, D/2] or [B, 1, T, D/2]."""
        rope, head_dim = self.description["ropes"][name], self.description["head_dim"]
        turned = positions[..., None] * frequencies(rope, head_dim, positions.dtype, positions.device)
        return turned if positions.dim() == 1 else turned[:, None]

    def embed(self, ids: Tensor, step: Step) -> Tensor:
        """ids [B, T] -> the residual stream [B, T, H], learned positions included."""
        roles = self.description["roles"]
        x = self.words("embedding", ids)
        if self.description["embedding_scale"] is not None:
            x = x * torch.tensor(self.description["embedding_scale"], dtype=x.dtype, device=x.device)
        if "positions" in roles:
            x = x + self.words("positions", step.positions.to(ids.device))
        return x

    def words(self, role: str, ids: Tensor) -> Tensor:
        """Rows `ids` [...] of a table of embeddings -> [..., H]."""
        name = self.description["roles"][role]["name"]
        if name not in self._ranks:
            return self.rows(f"{name}.weight", ids)
        left = self.rows(f"{name}.lowrank_b.weight", ids)
        return left @ self.factor(f"{self._shared.get(name, name)}.lowrank_a.weight")

    def block(self, x: Tensor, layer: int, step: Step) -> Tensor:
        """One layer: the residual stream [B, T, H] in and out."""
        roles = self.description["roles"]
        attended = self.attention(self.normalize(x, "attention_norm", layer), layer, step)
        x = x + (self.normalize(attended, "attention_post_norm", layer) if "attention_post_norm" in roles else attended)
        read = self.normalize(x, "ffn_norm", layer)
        inner: dict[str, Any] = {}
        if "gate" in roles:
            neurons = self._act(self.linear(read, "gate", layer, inner)) * self.linear(read, "up", layer, inner)
        else:
            neurons = self._act(self.linear(read, "up", layer, inner))
        written = self.linear(neurons, "down", layer)
        return x + (self.normalize(written, "ffn_post_norm", layer) if "ffn_post_norm" in roles else written)

    def attention(self, x: Tensor, layer: int, step: Step) -> Tensor:
        """Attention where `heads / kv_heads` queries share a key and a value (GQA, arXiv:2305.13245). x [B, T, H]."""
        data = self.description
        inner: dict[str, Any] = {}
        query, key, value = (
            torch.unflatten(self.linear(x, role, layer, inner), -1, (-1, data["head_dim"])).transpose(1, 2)
            for role in ("query", "key", "value")
        )  # [B, heads or kv heads, T, D]
        if "query_norm" in data["roles"]:
            query = self.normalize(query, "query_norm", layer)
        if "key_norm" in data["roles"]:
            key = self.normalize(key, "key_norm", layer)
        query, key = self.turn(query, key, layer, step)
        if step.cache is not None:
            key, value = step.cache.extend(layer, key, value)
        group = data["heads"] // data["kv_heads"]
        if group > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        softcap, scale = data["attention_softcap"], data["softmax_scale"][layer]
        mask = step.mask(data["window"][layer], x.device, always=softcap is not None)
        mask = mask if mask is None else mask[..., -key.shape[2] :]  # a cache may have let go of what no window reaches
        if softcap is None:
            causal = mask is None and step.length > 1
            mixed = functional.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
        else:
            scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            mixed = scores.softmax(dim=-1, dtype=wide).to(x.dtype) @ value
        return self.linear(mixed.transpose(1, 2).flatten(2), "output", layer)

    def turn(self, query: Tensor, key: Tensor, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, heads, T, D] turned by their positions, where this layer turns them."""
        name = self.description["rotary"][layer]
        if name is None:
            return query, key
        return rotate(query, step.rotations[name]), rotate(key, step.rotations[name])

    def logits(self, x: Tensor) -> Tensor:
        """The residual stream [B, T, H] -> logits [B, T, V]."""
        return self.head(self.normalize(x, "final_norm"))

    def head(self, x: Tensor) -> Tensor:
        """The normalized stream [B, T, H] -> logits [B, T, V]; without weights a chunk of the vocabulary at a time."""
        data = self.description
        spot = data["roles"]["embedding" if data["tied"] else "head"]
        slot, name, vocab, transposed = spot["name"], spot["name"] + ".weight", data["vocab"], spot["transposed"]
        bias = self.weight(slot + ".bias") if spot["bias"] else None
        if slot in self._ranks:
            x = functional.linear(x, self.factor(f"{self._shared.get(slot, slot)}.lowrank_a.weight"))
            name, transposed = f"{slot}.lowrank_b.weight", False
        chunks = []
        for first in range(0, vocab, self._head_rows):
            last = min(first + self._head_rows, vocab)
            if self._fetch_rows is not None and not transposed:
                rows = self.rows(name, torch.arange(first, last, device=x.device))
            else:
                whole = self.factor(name)
                rows = some_rows(whole.T if transposed else whole, first, last)
            chunks.append(functional.linear(x, rows, bias if bias is None else bias[first:last]))
        self._held = None
        logits = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)
        cap = data["final_softcap"]
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def _head_rows(self) -> int:
        """Words whose logits are computed at a time: all, for the gradient of a slice is as large as the whole."""
        if self._fetch_rows is None:
            return int(self.description["vocab"])
        return min(HEAD_ROWS, max(256, _STREAMED_ENTRIES // int(self.description["hidden"])))

    # --- names and shapes --------------------------------------------------------------------------------------

    def _layers(self) -> range:
        return range(self.description["layers"])

    def _found_rooms(self) -> dict[int, nn.Module]:
        """Where every role of a layer lies below one name, as "model.layers.{layer}", its module by layer."""
        spots = [spot["name"] for role, spot in self.description["roles"].items() if role not in STEM]
        stem, found, _ = spots[0].partition("{layer}") if spots else ("", "", "")
        if not found or not all(name.startswith(f"{stem}{{layer}}.") for name in spots):
            return {}
        return {layer: self.get_submodule(f"{stem}{layer}") for layer in self._layers()}

    def _slot(self, spot: dict[str, Any], layer: int) -> tuple[str, int | None, str]:
        """A role's module in this layer, its part of it, and the name of its matrix alone."""
        name, part = spot["name"].format(layer=layer), spot["part"]
        return name, part, name if part is None else f"{name}.{part}"

    def _apart(self, spot: dict[str, Any], name: str) -> bool:
        """Whether a module's fused parts are stored one by one: some of them are factors."""
        return spot["part"] is not None and any(f"{name}.{part}" in self._ranks for part in range(spot["parts"]))

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every stored tensor's name and shape, as the file has them."""
        for role in self.description["roles"]:
            for layer in [0] if role in STEM else self._layers():
                yield from self._shapes_of(role, layer)

    def _shapes_of(self, role: str, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Those of one role's tensors in a layer."""
        spot, shape = self.description["roles"][role], self._stored_sizes(layer)[role]
        name, part, slot = self._slot(spot, layer)
        if slot in self._ranks:
            yield from self._factors(slot, shape)
        elif self._apart(spot, name):
            yield f"{slot}.weight", shape
        elif not part:  # the fused tensor comes with its first part
            whole = (shape[0] * (spot["parts"] or 1), *shape[1:])
            yield f"{name}.weight", whole[::-1] if spot["transposed"] else whole
        if spot["bias"] and not part:
            yield f"{name}.bias", (shape[0] * (spot["parts"] or 1),)

    def sizes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Outputs and inputs of every role's matrix in this layer, and the entries of every norm."""
        return self._stored_sizes(layer)

    def _stored_sizes(self, layer: int) -> dict[str, tuple[int, ...]]:
        data = self.description
        hidden, heads, kv = data["hidden"], data["heads"] * data["head_dim"], data["kv_heads"] * data["head_dim"]
        ffn = self._ffn.get(str(layer), data["ffn"])
        return {
            "embedding": (data["vocab"], hidden), "positions": (data["positions"] or 0, hidden),
            "head": (data["vocab"], hidden), "query": (heads, hidden), "key": (kv, hidden), "value": (kv, hidden),
            "output": (hidden, heads), "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn),
            **dict.fromkeys(NORMS, (hidden,)), **dict.fromkeys(HEAD_NORMS, (data["head_dim"],)),
        }  # fmt: skip

    def _factors(self, slot: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        rank, (start, stop) = self._ranks[slot], self._pivoted.get(slot, (0, 0))
        shapes = {"lowrank_b": (shape[0] - (stop - start), rank)}
        if slot not in self._shared:
            shapes = {"lowrank_a": (rank, shape[1]), **shapes}
        for kind, sizes in shapes.items():
            yield f"{slot}.{kind}.weight", sizes
            if self._coded:
                yield f"{slot}.{kind}.scale", sizes[:1]
        if slot in self._pivoted:
            yield f"{slot}.lowrank_rows", (stop - start,)

    def _add(self, name: str, value: Tensor) -> None:
        """Register a parameter, or a buffer, under a dotted name, a plain module for every part of it."""
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, _Room())
            module = module.get_submodule(part)
        if isinstance(value, nn.Parameter):
            module.register_parameter(leaf, value)
        else:
            module.register_buffer(leaf, value)
        self._leaves[name] = (module, leaf)


def some_rows(matrix: Tensor, first: int, last: int) -> Tensor:
    """Rows from..to of a matrix, itself where that is all: the gradient of a slice is filled up with zeros."""
    return matrix if last - first == len(matrix) else matrix[first:last]
