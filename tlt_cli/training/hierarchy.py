"""Hierarchies in the embedding: what its first entries alone say of a token, coarse in short prefixes, finer in long.

Beside the next token, prefixes of the stream learn to predict the next token's category. With q the distribution that
a prefix makes, and G the tokens of the category, what is minimized is

    KL(uniform over G || q) = -log q(G) + KL(uniform over G || q within G)

so besides the category's own likelihood, its tokens are drawn together until no prefix can tell them apart. (The first
term alone leaves that free: any one token can stand for its category.) Of a category of one token this is the
cross-entropy. Prefixes and rows are compared by their angle (`prefix_cosines`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.training.categories import Categories
from tlt_cli.training.clusters import MOST_GROUPS, clustered
from tlt_cli.training.corpus import Stream
from tlt_cli.training.cross_entropy import summed_cross_entropy
from tlt_cli.training.objective import Loss, Objective, in_chunks, read_stream
from tlt_cli.training.prefixes import head_rows, prefix_cosines, prefix_logits
from tlt_cli.training.windows import IGNORED, Batch, targets
from tlt_cli.training.world import World, replicate

EMBEDDINGS, IMPOSED, EMERGENT = "embeddings", "imposed", "emergent"
MOST_TOKENS = 4096  # that are clustered: memory grows with their square
_COUNTED = 1 << 24  # tokens of each stream whose frequencies are counted
_FOUND_ANEW = 10  # times in a run that emergent categories are looked for


@dataclass(frozen=True, eq=False)
class Groups:
    """Categories as the loss reads them: `labels` [V], -1 a category of its own; `members` [n] are the tokens in the
    others, of which `shares` [n, C] makes means."""

    labels: Tensor
    members: Tensor
    shares: Tensor

    @classmethod
    def of(cls, labels: np.ndarray, device: torch.device) -> Groups:
        """From labels [V]."""
        members = np.flatnonzero(labels >= 0)
        inside = labels[members]
        shares = (inside[:, None] == np.arange(inside.max(initial=-1) + 1)).astype(np.float32)
        shares /= np.maximum(shares.sum(0), 1)
        return cls(*(torch.from_numpy(each).to(device) for each in (labels, members, shares)))


def category_loss(logits: Tensor, wanted: Tensor, groups: Groups | None) -> Tensor:
    """The sum over rows of KL(uniform over the wanted token's category || softmax(logits)); logits [N, V], wanted [N].

    Without groups every token is a category: the cross-entropy. Rows whose wanted token is IGNORED do not count.
    """
    if groups is None or not groups.shares.numel():
        return summed_cross_entropy(logits, wanted, IGNORED)
    scored = wanted != IGNORED
    index = wanted.where(scored, 0)
    label = groups.labels[index]
    inside = label.clamp(min=0)[:, None]
    means = (logits.index_select(1, groups.members) @ groups.shares.to(logits.dtype)).gather(1, inside)[:, 0]
    own = logits.gather(1, index[:, None])[:, 0]
    sizes = (1 / groups.shares.max(0).values).to(logits.dtype)[inside[:, 0]]
    meant = torch.where(label < 0, own, means + sizes.log())
    return (logits.logsumexp(-1) - meant).where(scored, 0.0).sum()


def hierarchy_objective(
    prefixes: Sequence[int], groups: Mapping[int, Groups] | None, *, weight: float = 1.0
) -> Objective:
    """Cross-entropy of the next token, and `weight` times what each prefix loses of its category; `groups` by prefix,
    read anew in each step, of those that have any.

    None for `groups` nests the embeddings alone: every prefix predicts the token, with the head as it is (MRL-E,
    arXiv:2205.13147), so that the model can be cut there. The log has each prefix's loss as loss_at_<length>.
    """

    def losses(decoder: Decoder, stream: Tensor, wanted: Tensor) -> Tensor:
        x = decoder.normalize(stream, "final_norm")
        found = [summed_cross_entropy(_wide(decoder.head(x)), wanted, IGNORED)]
        for prefix in prefixes:
            if groups is None:
                found.append(summed_cross_entropy(_wide(prefix_logits(decoder, x, prefix)), wanted, IGNORED))
            else:
                found.append(category_loss(_wide(prefix_cosines(decoder, x, prefix)), wanted, groups.get(prefix)))
        return torch.stack(found)

    def objective(decoder: Decoder, batch: Batch) -> Loss:
        read = partial(in_chunks, partial(losses, decoder), decoder, wanted=targets(batch))
        nll, *nested = read_stream(decoder, batch, read).unbind()
        numbers = {loss_name(prefix): each.detach() for prefix, each in zip(prefixes, nested, strict=True)}
        return Loss(nll + weight * torch.stack(nested).sum(), nll.detach(), numbers)

    return objective


def loss_name(prefix: int) -> str:
    """What a prefix's loss is called in logs and reports."""
    return f"loss_at_{prefix}"


def _wide(logits: Tensor) -> Tensor:
    """[1, n, V] -> [n, V] in float32 or better."""
    flat = logits.squeeze(0)  # not [0]: that is a copy of all logits on the way back
    return flat if flat.dtype == torch.float64 else flat.float()


# --- the categories of a run -----------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Hierarchy:
    """The prefixes of one run and their categories: given ones, those found in the embedding as it is, or none.

    `given` are categories by prefix. `counts` says how many to find at each prefix; else they are between m/2 and m for
    a prefix of m entries, 64 at most, whichever stand apart best. Only tokens that the text has are clustered, which
    `frequencies` [V] says, and of many the most frequent.
    """

    kind: str
    prefixes: tuple[int, ...]
    frequencies: np.ndarray
    device: torch.device
    given: Mapping[int, Categories] = field(default_factory=dict)
    counts: Mapping[int, int] = field(default_factory=dict)
    weight: float = 1.0
    groups: dict[int, Groups] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = {prefix: Groups.of(each.labels, self.device) for prefix, each in self.given.items()}

    @cached_property
    def tokens(self) -> np.ndarray:
        """The tokens that are clustered, ascending."""
        return self._most_frequent(np.flatnonzero(self.frequencies))

    def _most_frequent(self, tokens: np.ndarray) -> np.ndarray:
        order = np.argsort(-self.frequencies[tokens], kind="stable")
        return np.sort(tokens[order[:MOST_TOKENS]])

    @property
    def objective(self) -> Objective:
        """What is minimized: it follows the categories as they change."""
        groups = None if self.kind == EMBEDDINGS else self.groups
        return hierarchy_objective(self.prefixes, groups, weight=self.weight)

    def after(self, decoder: Decoder, step: int, steps: int, world: World) -> None:
        """Behind every tenth of a run's second half find emergent categories anew. For every rank, behind each step.

        In the first half a prefix predicts the token itself: what is found is drawn together and so found again, and
        early on that would be the frequent tokens and the rare ones.
        """
        every, done = -(-steps // _FOUND_ANEW), step + 1
        if self.kind != EMERGENT or done % every or 2 * done < steps or done == steps:
            return
        rows = token_rows(head_rows(decoder), self.tokens)
        for prefix in self.prefixes:
            labels = torch.from_numpy(clustered(rows[:, :prefix], *self._bounds(prefix)).labels)
            replicate([labels], world)  # other ranks may round otherwise
            self._group(prefix, labels.numpy())

    def _group(self, prefix: int, found: np.ndarray) -> None:
        labels = np.full(len(self.frequencies), -1, dtype=np.int64)
        labels[self.tokens] = found
        self.groups[prefix] = Groups.of(labels, self.device)

    def _bounds(self, prefix: int) -> tuple[int, int]:
        """Fewest and most categories to find: m entries have room for m directions, so longer prefixes are finer."""
        most = max(2, min(prefix, MOST_GROUPS, len(self.tokens) // 2))
        count = self.counts.get(prefix)
        return (most // 2 if most > 3 else 2, most) if count is None else (count, count)

    def data(self) -> dict[str, list[int]]:
        """What a run that is resumed cannot know: the categories found last, as labels of `tokens` by prefix."""
        if self.kind != EMERGENT:
            return {}
        return {str(prefix): each.labels.cpu().numpy()[self.tokens].tolist() for prefix, each in self.groups.items()}

    def restore(self, data: Mapping[str, Sequence[int]]) -> None:
        """Go on with the categories of `data`."""
        for prefix, labels in data.items():
            self._group(int(prefix), np.array(labels, dtype=np.int64))

    def scores(self, decoder: Decoder) -> dict[str, float]:
        """How well every prefix is ordered, as silhouette_at_8 and so on: see `Clustering.scores`. For every rank."""
        found, head = {}, head_rows(decoder)  # gathered by all ranks
        for prefix in self.prefixes:
            categories = self.given.get(prefix)
            tokens = self.tokens if categories is None else self._most_frequent(categories.tokens)
            rows = token_rows(head, tokens)[:, :prefix]
            if len(tokens) > 1:
                labels = None if categories is None else categories.labels[tokens]
                if labels is not None:
                    bounds: tuple[int, ...] = (len(np.unique(labels)),) * 2
                else:
                    bounds = self._bounds(prefix) if self.kind == EMERGENT else ()
                scores = clustered(rows, *bounds).scores(labels)
                found.update({f"{name}_at_{prefix}": value for name, value in scores.items()})
        return found


def token_rows(head: Tensor, tokens: np.ndarray) -> np.ndarray:
    """Of the rows that logits are made with, [V, H], those of some tokens, [n, H] float32. TltError where they are no
    numbers."""
    rows = head[torch.from_numpy(tokens).to(head.device)].float().cpu().numpy()
    if not np.isfinite(rows).all():
        raise TltError("the embedding holds NaN or infinite values: train at a lower rate")
    return rows


def token_frequencies(streams: Sequence[Stream], vocab: int) -> np.ndarray:
    """How often each token stands in the streams' first 16 million tokens, [V] int64."""
    found = np.zeros(vocab, dtype=np.int64)
    for stream in streams:
        left = _COUNTED
        for part in stream.parts:
            found += np.bincount(part[:left].astype(np.int64), minlength=vocab)
            left = max(0, left - len(part))
    return found
