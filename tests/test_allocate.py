"""The allocation of a budget is the best there is, and says so only where it is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlt_cli.errors import TltError
from tlt_cli.surgery import allocate as module
from tlt_cli.surgery.allocate import Choice, allocate, allocation

Groups = list[list[Choice]]

choice = st.builds(
    Choice,
    st.none() | st.integers(1, 9),
    st.integers(0, 25),
    st.floats(0, 10, allow_nan=False).map(lambda loss: round(loss, 2)),
)
groups = st.lists(st.lists(choice, min_size=1, max_size=6), min_size=1, max_size=5)


def least(options: Groups) -> int:
    return sum(min(one.parameters for one in group) for group in options)


def by_trying_all(options: Groups, budget: int) -> float:
    return min(
        sum(one.loss for one in picked)
        for picked in itertools.product(*options)
        if sum(one.parameters for one in picked) <= budget
    )


def curve(top: float, decay: float, size: int, cost: int) -> list[Choice]:
    """A matrix as it is: losses that fall with the rank, and dense beyond break-even."""
    found = [Choice(rank, rank * cost, top * decay**rank) for rank in range(1, size)]
    return [*found, Choice(None, size * cost, 0.0)]


@settings(max_examples=300, deadline=None)
@given(groups, st.integers(0, 60))
def test_equal_to_trying_all(options: Groups, spare: int) -> None:
    budget = least(options) + spare
    found = allocation(options, budget)
    assert found.exact
    assert found.loss == pytest.approx(by_trying_all(options, budget), abs=1e-9)
    assert found.parameters <= budget
    picked = [group[at] for group, at in zip(options, found.chosen, strict=True)]
    assert sum(one.parameters for one in picked) == found.parameters
    assert sum(one.loss for one in picked) == pytest.approx(found.loss)
    assert allocate(options, budget) == list(found.chosen)


def test_the_greedy_way_is_not_enough() -> None:
    """The control: the price alone leaves room that another pair of options fills better."""
    options = [
        [Choice(1, 0, 10.0), Choice(2, 5, 4.0), Choice(3, 7, 3.0)],
        [Choice(1, 0, 10.0), Choice(2, 4, 5.5), Choice(3, 6, 2.9)],
    ]
    budget = 10
    sizes = [[one.parameters for one in group] for group in options]
    losses = [[one.loss for one in group] for group in options]
    arrays = [module.np.array(size) for size in sizes], [module.np.array(loss) for loss in losses]
    _, greedy = module._greedy(*arrays, budget)
    assert sum(losses[group][at] for group, at in enumerate(greedy)) > by_trying_all(options, budget) + 0.1
    assert allocation(options, budget).loss == pytest.approx(by_trying_all(options, budget))


def test_a_bound_that_holds_without_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little room to search, the result is still allowed, its distance from the best is known, and said."""
    options = [curve(1 + i % 7, 0.9 + i / 1000, 40 + i, 31 + i) for i in range(40)]
    budget = int(0.6 * sum(group[-1].parameters for group in options))
    exact = allocation(options, budget)
    assert exact.exact and exact.bound == exact.loss
    monkeypatch.setattr(module, "_MOST_STATES", 1)
    rough = allocation(options, budget)
    assert not rough.exact
    assert rough.bound <= exact.loss <= rough.loss
    assert rough.loss - rough.bound < 0.05 * rough.loss
    assert rough.parameters <= budget


def test_room_for_everything_takes_the_best_and_no_more() -> None:
    options = [[Choice(1, 3, 1.0), Choice(None, 9, 0.0), Choice(2, 7, 0.0)]]
    assert allocation(options, 100).chosen == (2,)
    assert allocation(options, 7).chosen == (2,)
    assert allocation(options, 6).chosen == (0,)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(TltError, match=r"takes 12 parameters; the budget is 11"):
        allocate([[Choice(1, 5, 1.0)], [Choice(1, 7, 1.0), Choice(2, 9, 0.5)]], 11)
