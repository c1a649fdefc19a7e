"""Factored checkpoints in tests: planned, written, and beside them the dense model that they must equal.

The dense model is multiplied out here, by itself: nothing of what it is compared with is used to make it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import make_checkpoint
from growing import Source, opened
from safetensors.torch import load_file, save_file
from torch import Tensor

from tlt_cli.checkpoint.writer import write
from tlt_cli.model.modeling import MODELING, modeling_source
from tlt_cli.surgery.lowrank import Factored, factored_plan
from tlt_cli.surgery.matrices import Matrix, matrices, read_matrix
from tlt_cli.surgery.plan import Plan

READERS = ({"query", "key", "value"}, {"gate", "up"})


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where transformers copies the code of checkpoints to, for this session only."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        yield folder


@dataclass(frozen=True)
class How:
    """How a layer is stored: the rank as a share of each matrix's full rank, and which neurons are kept of 48."""

    share: float = 1.0
    shared: bool = False
    pivoted: bool = False
    neurons: int = 48
    roles: frozenset[str] | None = None


FULL = dict.fromkeys(range(4), How())
# Every way of storing in one model: layer after layer another one.
MIX = {
    0: How(0.5),
    1: How(0.75, shared=True, neurons=31),
    2: How(0.5, shared=True, pivoted=True),
    3: How(0.75, pivoted=True, neurons=40, roles=frozenset({"query", "value", "output", "down"})),
}
WAYS: dict[str, dict[int, How]] = {
    "plain": dict.fromkeys(range(4), How(0.5)),
    "shared": dict.fromkeys(range(4), How(0.6, shared=True)),
    "pivoted": dict.fromkeys(range(4), How(0.5, pivoted=True)),
    "full and pivoted": dict.fromkeys(range(4), How(1.0, pivoted=True)),
    "shared and pivoted": dict.fromkeys(range(4), How(0.9, shared=True, pivoted=True)),
    "narrow": dict.fromkeys(range(4), How(0.5, neurons=20)),
    "some parts": dict.fromkeys(range(4), How(0.5, roles=frozenset({"key", "down"}))),
}


@dataclass(frozen=True)
class Case:
    """A source, its Plan of factors, what the matrices then are, the neurons kept by layer, and what went in."""

    source: Source
    plan: Plan
    products: Mapping[Matrix, Tensor]
    kept: Mapping[int, Tensor]
    factored: Sequence[Factored] = ()
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def write(self, folder: Path, **files: bytes) -> Path:
        """The factored checkpoint in a folder, with the code that transformers runs it by."""
        beside = {MODELING: modeling_source(), **files}
        write(
            folder, self.plan.tensors, self.source.checkpoint, config=self.plan.config, metadata={"format": "pt"},
            files=beside, jobs=1,
        )  # fmt: skip
        return folder

    def dense(self, folder: Path) -> Path:
        """The source with b @ a in the place of every factored matrix, and zeros for the neurons that went."""
        tensors = load_file(self.source.folder / "model.safetensors")
        for matrix, product in self.products.items():
            target = tensors[matrix.tensor].T if matrix.transposed else tensors[matrix.tensor]
            whole = torch.zeros(matrix.rows, matrix.columns)
            rows, columns = kept_of(matrix, self.kept)
            whole[rows[:, None], columns] = product.float()
            start = (matrix.part or 0) * matrix.rows
            target[start : start + matrix.rows] = whole
        for name, place in self.source.fitted.places.items():
            if place.layer in self.kept:
                gone = torch.ones(48, dtype=torch.bool).index_fill(0, self.kept[place.layer], False)
                for index, dim in enumerate(place.arrow.dims):
                    if dim == ("ffn",):
                        tensors[name].index_fill_(index, gone.nonzero().flatten(), 0.0)
        folder.mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
            {"format": "pt"},
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(self.source.checkpoint.config))
        return folder


def kept_of(matrix: Matrix, kept: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The rows and columns of a matrix that stay where its layer lost neurons."""
    rows, columns = torch.arange(matrix.rows), torch.arange(matrix.columns)
    if matrix.layer in kept:
        rows = kept[matrix.layer] if matrix.role in ("gate", "up") else rows
        columns = kept[matrix.layer] if matrix.role == "down" else columns
    return rows, columns


def case(folder: Path, family: str, ways: Mapping[int, How], *, tied: bool = False, **options: Any) -> Case:
    """A small model made in `folder`, its matrices truncated by SVD and stored as `ways` say, by layer."""
    only: Sequence[str] = options.pop("only", ())
    source = opened(make_checkpoint(folder, family, tied, **options))
    return case_of(source, ways, only=only)


def case_of(source: Source, ways: Mapping[int, How], *, only: Sequence[str] = ()) -> Case:
    """As `case`, of a source that exists. Matrices outside of layers are stored as layer 0 is, where `only` names."""
    generator = torch.Generator().manual_seed(5)
    layers = range(source.fitted.sizes["layer"])
    kept = {
        layer: torch.randperm(48, generator=generator)[: ways[layer].neurons].sort().values
        for layer in layers
        if ways[layer].neurons < 48
    }
    shapes = {name: info.shape for name, info in source.checkpoint.tensors.items()}
    found = matrices(shapes, source.fitted, only=only)
    chosen = [m for m in found if (way := ways[m.layer or 0]).roles is None or m.role in way.roles]
    values = {matrix: cut(source, matrix, kept) for matrix in chosen}
    factored, factors = list[Factored](), dict[str, tuple[Tensor, Tensor]]()
    products = {}
    for group in grouped(chosen, ways):
        way = ways[group[0].layer or 0]
        stacked = torch.cat([values[matrix] for matrix in group])
        left, singular, right = torch.linalg.svd(stacked, full_matrices=False)
        rank = max(1, int(way.share * len(singular)))
        a, bs = singular[:rank, None] * right[:rank], left[:, :rank].split([len(values[m]) for m in group])
        for matrix, b in zip(group, bs, strict=True):
            owner = None if matrix is group[0] else group[0].name
            factored.append(Factored(matrix, rank, owner, way.pivoted and matrix.layer is not None))
            products[matrix] = b @ a
            factors[matrix.name] = (a, b)
    plan = factored_plan(source.fitted, source.dtypes, factored, factors.__getitem__, ffn=kept)
    return Case(source, plan, products, kept, tuple(factored), factors)


def cut(source: Source, matrix: Matrix, kept: Mapping[int, Tensor]) -> Tensor:
    """A matrix in float64, without the neurons that go."""
    rows, columns = kept_of(matrix, kept)
    return read_matrix(source.checkpoint, matrix, torch.float64)[rows][:, columns]


def grouped(chosen: Sequence[Matrix], ways: Mapping[int, How]) -> Iterator[list[Matrix]]:
    """The matrices one by one, or those together that read the same in a layer that shares right factors."""
    done = set[str]()
    for matrix in chosen:
        if matrix.name in done:
            continue
        peers = [matrix]
        if matrix.layer is not None and ways[matrix.layer].shared:
            (readers, *_) = [*[one for one in READERS if matrix.role in one], {matrix.role}]
            peers = [one for one in chosen if one.layer == matrix.layer and one.role in readers]
        done |= {one.name for one in peers}
        yield peers


def remote(folder: Path, **options: Any) -> Any:
    """The factored checkpoint as transformers loads it, by the code that lies beside it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
def apart(first: Tensor, second: Tensor) -> float:
    """Largest difference of two models' logits, in deviations of the second's."""
    return float((first - second).abs().max() / second.std())
