"""Proof that a part computes what it does inside its parent: the parent is run with everything else zeroed.

That run is another path than the one that made the part: it reads the parent's own weights at the parent's sizes, turns
positions and scales scores as the parent does, and has of the part only a mask for every axis and, in norms, the
convention. A part that runs by rules of its own is run in place instead, inside the parent, and held against the file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlt_cli.axes import split
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.families import Fit
from tlt_cli.model.compare import Distance, distance
from tlt_cli.model.decoder import HEAD_NORMS, Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.part import Child, Part, inside
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.verify import Verification, bound_of, check, planned_decoder, rounded, sample_tokens, twice


@dataclass(frozen=True)
class Proof:
    """`found` holds the part against its parent; `lost` is how far the part is from the whole model, on a text."""

    found: Verification
    lost: Distance | None = None

    def report(self) -> dict[str, Any]:
        """As JSON has it."""
        lost = None if self.lost is None else {"relative": self.lost.relative, **asdict(self.lost)}
        return {**self.found.report(), **({} if lost is None else {"lost": lost})}


class Masked(Decoder):
    """A model with every entry zeroed that a part does not keep: ids of the part's vocabulary in, its logits out."""

    part: Part

    @classmethod
    def of(cls, values: Checkpoint, fit: Fit, part: Part, dtype: torch.dtype = torch.float32) -> Masked:
        """Streams the parent's weights."""
        whole = load_checkpoint(values, fit, stream=True, dtype=dtype)
        fetch, fetch_rows = whole._fetch, whole._fetch_rows
        assert fetch is not None and fetch_rows is not None
        hidden = _mask(part.hidden, fit.sizes["hidden"])
        decoder = cls.stream(
            describe(fit),
            lambda name: masked(fit, part, name, fetch(name)),
            lambda name, ids: torch.where(hidden, fetch_rows(name, ids), 0.0),
            dtype=dtype,
        )
        assert isinstance(decoder, cls)
        decoder.part = part
        return decoder

    def run(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of ids [B, T], both over the words that are kept, through the layers that are."""
        vocab = torch.from_numpy(self.part.vocab)
        step = self.begin(ids.shape[1])
        x = self.embed(vocab[ids], step)
        for layer in self.part.layers:
            x = self.block(x, layer, step)
        return self.logits(x)[..., vocab]

    def normalize(self, x: Tensor, role: str, layer: int = 0) -> Tensor:
        """Over the kept entries alone, or all of which the rest are zero: x [..., n] -> [..., n]."""
        spot, offset = self.description["roles"][role], self.description["gain_offset"]
        name, heads = spot["name"].format(layer=layer), role in HEAD_NORMS
        kept = torch.from_numpy(self._head_entries(x.shape[-1]) if heads else self.part.hidden)
        gain = (self.weight(f"{name}.weight") + offset) * self.part.gains.get(
            (role, None if role == "final_norm" else layer), 1.0
        )
        wide = (x if x.dtype == torch.float64 else x.float())[..., kept]
        if self.description["norm"] == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        count = len(kept) if self.part.norm == "sliced" else x.shape[-1]
        power = (wide * wide).sum(-1, keepdim=True) / count
        scaled = wide / (power + self.description["epsilon"]).sqrt() * gain[kept]
        scaled = scaled + self.weight(f"{name}.bias")[kept] if spot["bias"] else scaled
        return torch.zeros_like(x).index_copy_(-1, kept, scaled.to(x.dtype))

    def _head_entries(self, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        pairs = bool(self.description["ropes"])
        return np.concatenate([self.part.entries, self.part.entries + size // 2]) if pairs else self.part.entries


def masked(fit: Fit, part: Part, name: str, stored: Tensor) -> Tensor:
    """A tensor of the parent with zeros in the place of everything that the part does not keep."""
    place = fit.places[name]
    at = None if place.layer is None else part.layers.index(place.layer)
    whole = stored.clone().reshape(split(place.arrow, fit.sizes))
    position = 0
    for dim in place.arrow.dims:
        for factor in dim:
            if factor == "kv" and "group" in dim:
                assert at is not None
                kept = _mask(part.heads[at], fit.heads).reshape(fit.sizes["kv"], fit.sizes["group"])
                whole = _keep(whole, kept, position)
            elif isinstance(factor, str) and factor not in ("group", "vocab", "position"):
                whole = _keep(whole, _mask(_entries(part, factor, at), fit.sizes[factor]), position)
            position += 1
    return whole.reshape(stored.shape)


def _entries(part: Part, axis: str, at: int | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    if axis in ("ffn", "kv"):
        assert at is not None
        return part.ffn[at] if axis == "ffn" else part.kv[at]
    return part.hidden if axis == "hidden" else part.entries


def _mask(kept: np.ndarray[Any, np.dtype[np.int64]], size: int) -> Tensor:
    found = torch.zeros(size, dtype=torch.bool)
    found[torch.from_numpy(kept)] = True
    return found


def _keep(values: Tensor, kept: Tensor, position: int) -> Tensor:
    """Zeros where `kept` [...] over the dims from `position` on says no."""
    return torch.where(kept.reshape(*kept.shape, *[1] * (values.dim() - position - kept.dim())), values, 0)


@torch.no_grad()
def verify_slice(
    fitted: Fit,
    part: Part,
    made: Child,
    plan: Plan,
    values: Checkpoint,
    written: Checkpoint,
    *,
    text: Tensor | None = None,
    seed: int = 0,
) -> Proof:
    """The part inside its parent against what was written, on random tokens and the first windows of `text` [N].

    Streams: memory is one tensor and the logits. A miss in float32 is measured again in float64 before it counts. Where
    the file was rounded to a coarser dtype than the parent's, the plan is held against the parent, and the file too.
    """
    if text is not None and part.vocab[-1] + 1 < fitted.sizes["vocab"]:
        text = text[text < len(part.vocab)]
    ids = sample_tokens(made.fit, text, seed=seed)
    coarse, bound = bool(rounded(plan, values)), bound_of(made.fit)

    def measured(dtype: torch.dtype) -> Verification:
        file = load_checkpoint(written, made.fit, stream=True, dtype=dtype)
        if part.rules == "own":
            whole = load_checkpoint(values, fitted, stream=True, dtype=dtype)
            wanted = inside(whole, made)(ids)
        else:
            wanted = Masked.of(values, fitted, part, dtype).run(ids)
        after = (planned_decoder(plan, made.fit, values, dtype=dtype) if coarse else file)(ids)
        second = distance(wanted, file(ids)) if coarse else None
        return Verification(distance(wanted, after), bound, second)

    found = twice(measured)
    if text is None:
        return Proof(found)
    vocab = torch.from_numpy(part.vocab)
    whole = load_checkpoint(values, fitted, stream=True)(vocab[ids[2:]])[..., vocab]
    return Proof(found, distance(whole, load_checkpoint(written, made.fit, stream=True)(ids[2:])))


def check_slice(plan: Plan, proof: Proof) -> None:
    """TltError where the part does not compute what it does inside its parent; `--no-verify` would write it anyway."""
    check(replace(plan, exact=True), proof.found)


@torch.no_grad()
def verify_written(
    plan: Plan,
    values: Checkpoint,
    written: Checkpoint,
    small: Fit,
    *,
    of: tuple[Checkpoint, Fit] | None = None,
    lost: tuple[Checkpoint, Fit] | None = None,
    text: Tensor | None = None,
    seed: int = 0,
) -> Proof:
    """What was written, read as `small`, against the plan as its dtypes store it, or against the model `of` which it
    must compute, over its own words; and how far it is from the model that it `lost` something of, on the first windows
    of `text` [N]. Where the file was rounded to a coarser dtype, what that moves is told too."""
    vocab = small.sizes["vocab"]
    text = text if text is None else text[text < vocab]
    ids, coarse, bound = sample_tokens(small, text, seed=seed), bool(rounded(plan, values)), bound_of(small)

    def measured(dtype: torch.dtype) -> Verification:
        file = load_checkpoint(written, small, stream=True, dtype=dtype)(ids)
        planned = planned_decoder(plan, small, values, dtype=dtype)(ids) if coarse else file
        if of is not None:
            wanted = load_checkpoint(*of, stream=True, dtype=dtype)(ids)[..., :vocab]
            return Verification(distance(wanted, planned), bound, distance(wanted, file) if coarse else None)
        stored = planned_decoder(plan, small, values, dtype=dtype, as_stored=True)(ids)
        return Verification(distance(stored, file), bound, distance(planned, file) if coarse else None)

    found = twice(measured)
    if lost is None or text is None:
        return Proof(found)
    whole = load_checkpoint(*lost, stream=True)(ids[2:])[..., :vocab]
    return Proof(found, distance(whole, load_checkpoint(written, small, stream=True)(ids[2:])))
