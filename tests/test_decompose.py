"""Factors are the best there are in their metric, and say of themselves exactly what they lose."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tlt_cli.errors import TltError, UsageError
from tlt_cli.surgery import decompose as module
from tlt_cli.surgery.decompose import DAMPING, Decomposition, decompose, truncated
from tlt_cli.surgery.metrics import (
    METHODS,
    Factorization,
    Seen,
    Weighted,
    check_method,
    energy,
    factorize,
    needs_entries,
)

EXACT = 1e-6  # of the whole norm: what factors in float32 can tell

MOMENTS = (None, "diagonal", "one token", "few tokens", "dead", "full", "massive")
SHAPES = ((12, 20), (20, 12), (16, 16), (30, 5))


def moment(kind: str | None, size: int, seed: int) -> Tensor | None:
    """A second moment of each kind that calibration gives."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    draws = {"one token": 1, "few tokens": max(2, size // 3)}.get(kind, 4 * size)
    x = torch.randn(draws, size, generator=generator, dtype=torch.float64)
    if kind == "dead":
        x[:, ::3] = 0
    if kind == "massive":  # squares of what overflows half precision, beside ordinary channels
        x[:, 1] *= 1e5
    found = x.T @ x / draws
    return found.diagonal().clone() if kind == "diagonal" else found


def full(value: Tensor | None, size: int) -> Tensor:
    if value is None:
        return torch.eye(size, dtype=torch.float64)
    return torch.diag(value) if value.dim() == 1 else value


def damped(outputs: Tensor) -> Tensor:
    return outputs + DAMPING * outputs.diagonal().mean() * torch.eye(len(outputs), dtype=torch.float64)


def root(value: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(value)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class Case:
    """A random matrix, its metric, and the loss in it."""

    def __init__(self, shape: tuple[int, int], inputs: str | None, outputs: str | None, seed: int = 0) -> None:
        rows, columns = shape
        self.weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        self.inputs, self.outputs = moment(inputs, columns, seed + 1), moment(outputs, rows, seed + 2)
        left = full(self.outputs, rows)
        self.left = root(damped(left) if self.inputs is not None and self.outputs is not None else left)
        self.right = root(full(self.inputs, columns))
        self.best = torch.linalg.svdvals(self.left @ self.weight.double() @ self.right)

    def decomposed(self) -> Decomposition:
        return decompose(self.weight, inputs=self.inputs, outputs=self.outputs)

    def loss(self, a: Tensor, b: Tensor) -> float:
        return float((self.left @ (self.weight.double() - b.double() @ a.double()) @ self.right).norm())

    @property
    def norm(self) -> float:
        return float(self.best.norm())


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for inputs in MOMENTS:
            for outputs in (None, "diagonal", "few tokens", "full"):
                yield Case(shape, inputs, outputs)


def test_error_is_measured_is_the_tail_of_the_spectrum() -> None:
    for case in cases():
        found = case.decomposed()
        assert found.energy == pytest.approx(case.norm**2, rel=1e-6)
        for rank in range(1, len(found.singular) + 1):
            measured, tail = case.loss(*found.factors(rank)), float(case.best[rank:].norm())
            assert abs(measured - tail) <= EXACT * case.norm
            assert abs(found.error(rank) - tail) <= EXACT * case.norm


def test_full_rank_is_the_matrix_even_where_no_input_ever_went() -> None:
    for case in cases():
        a, b = case.decomposed().factors(min(case.weight.shape))
        torch.testing.assert_close(b @ a, case.weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("inputs, outputs", [("few tokens", "few tokens"), ("full", None), (None, "full")])
def test_nothing_near_is_better_and_other_metrics_are_worse(inputs: str | None, outputs: str | None) -> None:
    case, rank = Case((20, 24), inputs, outputs), 6
    a, b = case.decomposed().factors(rank)
    best = case.loss(a, b)
    generator = torch.Generator().manual_seed(9)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            moved = [x + size * x.std() * torch.randn(x.shape, generator=generator) for x in (a, b)]
            assert case.loss(*moved) > best
    plain = case.loss(*decompose(case.weight).factors(rank))
    assert plain > 1.05 * best, "the control: plain SVD must lose visibly more in this metric"
    wrong = decompose(case.weight, inputs=None if inputs is None else moment(inputs, 24, 77), outputs=case.outputs)
    if inputs is not None:
        assert case.loss(*wrong.factors(rank)) > 1.02 * best


def test_cholesky_fails_where_this_does_not() -> None:
    """The control for singular moments: the published way needs a factorization that does not exist here."""
    case = Case((12, 20), "few tokens", None)
    assert case.inputs is not None
    with pytest.raises(RuntimeError):
        torch.linalg.cholesky(case.inputs)
    assert case.decomposed().error(len(case.inputs) // 3) <= EXACT * case.norm  # as many directions as tokens: all kept


def test_unseen_directions_are_kept_in_the_order_of_plain_svd() -> None:
    """With one token every rank above 1 is free; a sane choice still comes close to plain SVD of the rest."""
    for shape in ((12, 20), (20, 12)):
        case = Case(shape, "one token", None)
        a, b = case.decomposed().factors(6)
        far = float((case.weight - b @ a).norm())
        assert far <= 1.02 * decompose(case.weight).error(5)
        assert far < 0.9 * decompose(case.weight).error(3), "the control: as good as that is not for free"


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e12, 1e30])
def test_sizes_that_square_out_of_range(scale: float) -> None:
    case = Case((12, 20), "full", None)
    found, scaled = case.decomposed(), decompose(case.weight * scale, inputs=case.inputs)
    assert scaled.error(4) == pytest.approx(scale * found.error(4), rel=1e-5)
    a, b = scaled.factors(12)
    torch.testing.assert_close((b @ a).double() / scale, case.weight.double(), rtol=0, atol=2e-5)


def test_large_plain_matrices_in_float32_keep_their_small_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values below the root of float32's precision: a Gram matrix's own eigenvalues lose them, the rows' energy not."""
    monkeypatch.setattr(module, "_SMALL", 8)
    left, right = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64))[0] for n in (40, 90))
    values = torch.logspace(0, -5, 40, dtype=torch.float64)
    weight = ((left * values) @ right.T).float()
    exact = torch.linalg.svdvals(weight.double())
    found = decompose(weight)
    assert abs(found.error(30) / float(exact[30:].norm()) - 1) < 0.02
    gram = torch.linalg.eigvalsh(weight @ weight.T).clamp_min(0).flip(0)
    assert abs(float(gram[30:].sum().sqrt() / exact[30:].norm()) - 1) > 0.1, "the control: a bare Gram matrix is off"


def test_float32_is_enough_where_values_are_near_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(60, 90)
    exact = torch.linalg.svdvals(weight.double())
    monkeypatch.setattr(module, "_SMALL", 8)
    seen_types = []
    monkeypatch.setattr(module, "_eigh", lambda gram: (seen_types.append(gram.dtype), torch.linalg.eigh(gram))[1])
    found = decompose(weight)
    assert seen_types == [torch.float32]
    for rank in (1, 20, 36, 59):
        a, b = found.factors(rank)
        assert float((weight - b @ a).norm()) == pytest.approx(float(exact[rank:].norm()), rel=1e-5)
        assert found.error(rank) == pytest.approx(float(exact[rank:].norm()), rel=1e-5)


def falling(gap: int) -> Tensor:
    """Singular values 2 down to 1, and behind `gap` of them a tenth of that."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 90, generator=generator))[0] for size in (90, 150))
    values = torch.linspace(2, 1, 90) * torch.where(torch.arange(90) < gap, 1.0, 0.1)
    return (left * values) @ right.T


def test_one_rank_alone_is_the_best_or_is_not_given() -> None:
    """Where values fall off behind the rank a quick look finds what all the work does; where they do not it says so."""
    for scale in (1.0, 1e-30):
        weight = scale * falling(gap=8)
        found, best = truncated(weight, 8), decompose(weight)
        assert found is not None and found.error(8) == pytest.approx(best.error(8), rel=1e-5)
        a, b = found.factors(8)
        assert float((weight.double() - b.double() @ a.double()).norm()) == pytest.approx(found.error(8), rel=1e-5)
        assert found.singular.tolist() == pytest.approx(best.singular[:8].tolist(), rel=1e-5)
        assert truncated(weight, 20) is None, "in the middle of a flat bulk"
    assert truncated(torch.zeros(30, 40), 2) is None
    assert torch.equal(truncated(weight, 8).factors(8)[0], a)


def test_zero_matrices_and_silent_moments() -> None:
    found = decompose(torch.zeros(4, 6), inputs=torch.eye(6, dtype=torch.float64))
    assert found.error(1) == 0 and not (found.factors(2)[1] @ found.factors(2)[0]).any()
    weight = torch.randn(6, 4)
    quiet = decompose(weight, inputs=torch.zeros(4, 4), outputs=torch.zeros(6, 6))
    assert quiet.error(1) == 0
    torch.testing.assert_close(torch.mm(*quiet.factors(2)[::-1]), torch.mm(*decompose(weight).factors(2)[::-1]))


@pytest.mark.parametrize("rank", [-1, 0, 5])
def test_ranks_that_a_matrix_cannot_have(rank: int) -> None:
    with pytest.raises(TltError, match=f"rank {rank} of a 4 x 7 matrix: expected 1 to 4"):
        decompose(torch.randn(4, 7)).factors(rank)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.sampled_from(MOMENTS), st.sampled_from(MOMENTS), st.integers(0, 99))
def test_any_size(rows: int, columns: int, inputs: str | None, outputs: str | None, seed: int) -> None:
    if "massive" in (inputs, outputs) and min(rows, columns) < 2:
        return
    case = Case((rows, columns), inputs, outputs, seed)
    found = case.decomposed()
    assert len(found.singular) == min(rows, columns)
    assert bool((found.singular.diff() <= 0).all())
    for rank in range(1, min(rows, columns) + 1):
        assert abs(case.loss(*found.factors(rank)) - float(case.best[rank:].norm())) <= 4 * EXACT * case.norm


# --- methods --------------------------------------------------------------------------------------------------


def seen(rows: int = 20, columns: int = 12, rank_one: bool = False) -> Seen:
    x = torch.randn(200, columns, dtype=torch.float64) * torch.logspace(-1, 1, columns, dtype=torch.float64)
    g = torch.randn(200, rows, dtype=torch.float64) * torch.logspace(-1, 1, rows, dtype=torch.float64).flip(0)
    importance = torch.outer((g**2).mean(0), (x**2).mean(0)) if rank_one else (g**2).T @ (x**2) / 200
    if not rank_one:
        importance = importance * torch.rand(rows, columns, dtype=torch.float64) ** 2
    return Seen(x.T @ x / 200, x.abs().mean(0), g.T @ g / 200, importance)


def test_each_method_is_the_best_in_what_it_minimises() -> None:
    torch.manual_seed(3)
    weight, told, rank = torch.randn(20, 12), seen(), 4
    assert told.inputs is not None and told.outputs is not None
    assert told.absolute is not None and told.importance is not None
    h, g = root(told.inputs), root(damped(told.outputs))
    scales = told.absolute.sqrt()
    columns = told.importance.sum(0).sqrt()
    measures = {
        "svd": lambda d: d.norm(),
        "activation": lambda d: (d * scales).norm(),
        "whiten": lambda d: (d @ h).norm(),
        "fisher": lambda d: (d * columns).norm(),
        "kfac": lambda d: (g @ d @ h).norm(),
        "weighted": lambda d: (told.importance.sqrt() * d).norm(),
    }
    assert set(measures) == set(METHODS)
    made: dict[str, Factorization] = {method: factorize(weight, method, told) for method in METHODS}
    for name, measure in measures.items():
        losses = {}
        for method, found in made.items():
            a, b = found.factors(rank)
            losses[method] = float(measure(weight.double() - (b @ a).double()))
        assert min(losses, key=losses.__getitem__) == name, losses
        assert made[name].error(rank) == pytest.approx(losses[name], rel=1e-5)
        assert made[name].energy == pytest.approx(float(measure(weight.double())) ** 2, rel=1e-5)


def test_energy_is_what_the_factors_say_they_lose() -> None:
    weight = torch.randn(14, 20, generator=torch.Generator().manual_seed(0))
    inputs, outputs = moment("few tokens", 20, 1), moment("full", 14, 2)
    importance = torch.rand(14, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 4
    assert inputs is not None
    seen = Seen(inputs, 3 * inputs.diagonal().square(), outputs, importance)
    for method in METHODS:
        found = factorize(weight, method, seen)
        a, b = found.factors(5)
        change = weight.double() - b.double() @ a.double()
        assert energy(change, method, seen) == pytest.approx(found.error(5) ** 2, rel=1e-5), method
        assert energy(weight, method, seen) == pytest.approx(found.energy, rel=1e-6), method
        for other in METHODS:
            assert (energy(change, other, seen) == pytest.approx(found.error(5) ** 2, rel=1e-2)) == (other == method)
    silent = Seen(inputs, outputs=torch.zeros(14, 14))
    assert energy(weight, "kfac", silent) == pytest.approx(energy(weight, "whiten", silent))
    assert {method for method in METHODS if needs_entries(method)} == {"weighted", "fisher"}


def test_fwsvd_is_weighed_by_row_sums_of_the_importance() -> None:
    """Not by a product of moments, which is another matrix's truncation where gradients and inputs go together."""
    weight = torch.randn(14, 20, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(14, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 8
    found = factorize(weight, "fisher", Seen(importance=importance))
    scale = importance.sum(0).sqrt()
    expected = float(torch.linalg.svdvals(weight.double() * scale)[5:].norm())
    assert found.error(5) == pytest.approx(expected, rel=1e-5)
    product = Seen(inputs=torch.ones(20), outputs=torch.ones(14))
    assert factorize(weight, "fisher", product).error(5) != pytest.approx(expected, rel=1e-2)


def test_weights_that_are_a_product_have_a_closed_form() -> None:
    torch.manual_seed(4)
    weight, told = torch.randn(20, 12), seen(rank_one=True)
    assert told.importance is not None
    rows, columns = told.importance.sum(1), told.importance.sum(0) / told.importance.sum()
    exact = torch.linalg.svdvals(rows.sqrt()[:, None] * weight.double() * columns.sqrt())
    for rank in (1, 5, 11):
        assert Weighted(weight.double(), told.importance).error(rank) == pytest.approx(
            float(exact[rank:].norm()), rel=1e-3
        )
    bare = factorize(weight, "weighted", Seen(told.inputs, None, told.outputs))  # the product stands for itself
    assert bare.error(5) > 0


def test_filling_in_never_raises_the_loss() -> None:
    torch.manual_seed(5)
    weight, told = torch.randn(20, 12).double(), seen()
    assert told.importance is not None
    rows, columns = told.importance.sum(1), told.importance.sum(0)
    start = decompose(weight, inputs=columns, outputs=rows, damping=0.0)  # the closed form for the sums
    found = Weighted(weight, told.importance)
    for rank in (1, 4, 8):
        a, b = start.factors(rank)
        loss = math.sqrt(float((told.importance * (weight - b.double() @ a.double()) ** 2).sum()))
        assert found.error(rank) < 0.995 * loss


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--method whitn: unknown \(did you mean 'whiten'\?\)"):
        check_method("whitn")
