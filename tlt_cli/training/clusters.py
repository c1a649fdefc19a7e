"""Rows of an embedding by direction: a tree of them, its cuts, how well these stand apart, whether two groupings agree.

Labels are [n] integers, one per row; which number a group has says nothing. (scipy is imported where it is used: most
runs of `tlt train` need none of it.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MOST_GROUPS = 64  # that a number of groups is looked for among
_ORDERED = 512  # rows up to which the order of leaves is the best one: it costs their number cubed


def cosine_distances(rows: np.ndarray) -> np.ndarray:
    """1 - cosine of the angle between every two of rows [n, p] -> [n, n] float64, symmetric, 0 on the diagonal.

    A row of zeros has no direction: it is 1 away from all others.
    """
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(lengths > 0, lengths, 1.0)
    found = np.clip(1.0 - unit @ unit.T, 0.0, 2.0)
    found = (found + found.T) / 2
    np.fill_diagonal(found, 0.0)
    return found


def _condensed(distances: np.ndarray) -> np.ndarray:
    """[n, n] -> [n (n - 1) / 2], those above the diagonal."""
    from scipy.spatial.distance import squareform  # type: ignore[import-untyped]

    return np.asarray(squareform(distances, checks=False))


@dataclass(frozen=True, eq=False)
class Clustering:
    """Rows [n, p] in groups: their distances [n, n], scipy's tree of them, and the cut of it that `labels` [n] are."""

    distances: np.ndarray
    tree: np.ndarray
    labels: np.ndarray

    def order(self) -> np.ndarray:
        """Rows [n] as the tree lays them side by side, neighbours as near as can be; of more than 512 as it comes."""
        from scipy.cluster import hierarchy  # type: ignore[import-untyped]

        tree = self.tree
        if len(self.labels) <= _ORDERED:
            tree = hierarchy.optimal_leaf_ordering(tree, _condensed(self.distances))
        return np.asarray(hierarchy.leaves_list(tree))

    def scores(self, categories: np.ndarray | None = None) -> dict[str, float]:
        """How many groups, and their silhouette; with categories [n] also how well the groups agree with these, nmi and
        ari, and the categories' own silhouette."""
        found: dict[str, float] = {
            "clusters": int(self.labels.max()) + 1, "silhouette": silhouette(self.distances, self.labels),
        }  # fmt: skip
        if categories is not None:
            found["nmi"] = mutual_information(self.labels, categories)
            found["ari"] = adjusted_rand(self.labels, categories)
            found["category_silhouette"] = silhouette(self.distances, categories)
        return found


def clustered(rows: np.ndarray, least: int = 2, most: int | None = None) -> Clustering:
    """Average linkage (UPGMA) of rows [n, p], n > 1, by cosine distance, cut where the silhouette is largest.

    There are `least` to `most` groups, which is 64, but half of n at most, where nothing is said.
    """
    from scipy.cluster import hierarchy

    distances = cosine_distances(rows)
    tree = hierarchy.linkage(_condensed(distances), "average")
    most = min(MOST_GROUPS, len(rows) // 2) if most is None else min(most, len(rows))
    return Clustering(distances, tree, best_cut(tree, distances, least, max(least, most)))


def cut(tree: np.ndarray, groups: int) -> np.ndarray:
    """Labels [n] of the tree cut into so many groups, or fewer where branches part at one height."""
    from scipy.cluster import hierarchy

    return numbered(hierarchy.fcluster(tree, groups, "maxclust"))


def best_cut(tree: np.ndarray, distances: np.ndarray, least: int, most: int) -> np.ndarray:
    """Of the cuts into `least` to `most` groups the one whose silhouette is largest; of equal ones the coarsest."""
    finest = cut(tree, most)
    sums = _sums(distances, finest)
    best, chosen = -math.inf, finest
    for groups in range(least, most + 1):  # a coarser cut joins groups of the finest one, so their sums add up
        labels = cut(tree, groups)
        joins = np.zeros((finest.max() + 1, labels.max() + 1))
        joins[finest, labels] = 1.0
        score = _silhouette(sums @ joins, labels)
        if score > best + 1e-12:  # beyond rounding
            best, chosen = score, labels
    return chosen


def silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows of (b - a) / max(a, b): a the mean distance to the own group, b to the nearest other one.

    From -1 to 1 (Rousseeuw 1987). A row alone in its group counts as 0, and so does every row of a single group.
    """
    labels = numbered(labels)
    return _silhouette(_sums(distances, labels), labels)


def _sums(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The sum of every row's distances to the members of every group [n, groups]."""
    inside = (labels[:, None] == np.arange(labels.max() + 1)).astype(np.float64)
    return np.asarray(distances @ inside)


def _silhouette(sums: np.ndarray, labels: np.ndarray) -> float:
    sizes, rows = np.bincount(labels), np.arange(len(labels))
    if len(sizes) < 2:
        return 0.0
    own = sums[rows, labels] / np.maximum(sizes[labels] - 1, 1)
    others = sums / sizes
    others[rows, labels] = np.inf
    nearest = others.min(axis=1)
    larger = np.maximum(own, nearest)
    each = np.where((sizes[labels] > 1) & (larger > 0), (nearest - own) / np.where(larger > 0, larger, 1.0), 0.0)
    return float(each.mean())


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Normalized mutual information of two groupings: I / mean of the two entropies, from 0 to 1.

    1 means the same groups. It is above 0 by chance, the more so the more groups: see `adjusted_rand`.
    """
    joint = _table(one, other) / len(one)
    left, right = joint.sum(1), joint.sum(0)
    entropies = _entropy(left) + _entropy(right)
    if entropies == 0:
        return 1.0
    return float(max(0.0, 2 * (entropies - _entropy(joint.ravel())) / entropies))


def adjusted_rand(one: np.ndarray, other: np.ndarray) -> float:
    """Pairs that both groupings keep together, adjusted for chance (Hubert and Arabie 1985): 1 the same, 0 chance."""
    table = _table(one, other)
    both, left, right = (_pairs(counts) for counts in (table, table.sum(1), table.sum(0)))
    chance = left * right / max(_pairs(np.array(len(one))), 1.0)
    most = (left + right) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def _table(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = numbered(one), numbered(other)
    found = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(found, (one, other), 1.0)
    return found


def _entropy(shares: np.ndarray) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())


def _pairs(counts: np.ndarray) -> float:
    return float((counts * (counts - 1) / 2).sum())


def numbered(labels: Iterable[int] | np.ndarray) -> np.ndarray:
    """The same groups, numbered from 0 as they first appear.

    >>> numbered([7, 3, 7, 9]).tolist()
    [0, 1, 0, 2]
    """
    _, first, inverse = np.unique(np.asarray(labels), return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse.ravel()])
