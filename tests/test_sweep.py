"""`tlt factor --rank-sweep`: one decomposition tells the truth about every rank."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from family_zoo import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tlt_cli.cli import app
from tlt_cli.cli.plotting import drawn
from tlt_cli.surgery import factorizations
from tlt_cli.surgery.matrices import Matrix
from tlt_cli.surgery.spectrum_shape import CLUSTERS, GRADUAL, NOTHING, SHARP, knee, shape_of
from tlt_cli.surgery.sweep import POINTS, grid

TEXT = "Ein Satz nach dem anderen, und jeder so gut wie der davor. " * 20


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", vocab_size=300, num_hidden_layers=2)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def tlt(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def swept(*arguments: str | Path) -> dict[str, Any]:
    result = tlt("factor", *arguments, "--rank-sweep", "--json")
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_every_point_is_what_writing_it_gives(llama: Path, tmp_path: Path) -> None:
    """Parameters, bytes, error and perplexity against files that were really written."""
    text = llama.parent / "text.txt"
    report = swept(llama, "--ranks", "2,9,12", "--eval", text, "--context", "32")
    assert [point["rank"] for point in report["points"]] == [2, 9, 12, None]
    for point in report["points"][:-1]:
        path = tmp_path / str(point["rank"])
        written = json.loads(tlt("factor", llama, "--rank", str(point["rank"]), "-o", path, "--json").stdout)
        tensors = load_file(path / "model.safetensors")
        assert point["parameters"] == sum(t.numel() for t in tensors.values()) == written["parameters"]
        assert point["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
        assert point["keep"] == pytest.approx(written["keep"])
        read = json.loads(tlt("eval", path, "--data", text, "--context", "32", "--json").stdout)
        assert point["perplexity"] == pytest.approx(read["perplexity"], rel=1e-4)
        assert point["tokens"] == read["tokens"] and report["corpus_sha256"] == read["corpus_sha256"]
        old = load_file(llama / "model.safetensors")
        total = sum(float(old[f"{m['name']}.weight"].double().square().sum()) for m in report["matrices"])
        errors = written["verification"]["errors"]
        lost = sum((e * float(old[f"{slot}.weight"].double().norm())) ** 2 for slot, e in errors.items())
        assert point["error"] == pytest.approx(math.sqrt(lost / total), rel=1e-5)
    dense = report["points"][-1]
    base = json.loads(tlt("eval", llama, "--data", text, "--context", "32", "--json").stdout)
    assert dense["error"] == 0 and dense["keep"] == 1 and dense["perplexity"] == pytest.approx(base["perplexity"])


@pytest.mark.parametrize("rank", [2, 5])
def test_large_matrices_at_a_low_rank(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Looked for alone or picked from a sweep the bytes are the same; what is not proven goes the whole way."""
    whole, few = [], []
    right, quick = factorizations.factorize, factorizations.truncated
    monkeypatch.setattr(factorizations, "LARGE", 16)
    monkeypatch.setattr(factorizations, "_SHARE", 8)
    monkeypatch.setattr(factorizations, "factorize", lambda *given: (whole.append(1), right(*given))[1])
    monkeypatch.setattr(factorizations, "truncated", lambda *given: (few.append(quick(*given)), few[-1])[1])
    tlt("factor", llama, "--rank", str(rank), "-o", tmp_path / "alone", "--json")
    assert bool(few) == (rank == 2) and len(whole) == 14 - sum(one is not None for one in few[:14])
    text = ("--eval", llama.parent / "text.txt", "--context", "32", "--max-perplexity", "1e9")
    tlt("factor", llama, "--ranks", str(rank), *text, "-o", tmp_path / "picked")
    assert load_file(tmp_path / "alone" / "model.safetensors").keys()
    for name, value in load_file(tmp_path / "alone" / "model.safetensors").items():
        assert torch.equal(value, load_file(tmp_path / "picked" / "model.safetensors")[name]), name


def test_one_decomposition_per_matrix(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    right = factorizations.factorize
    monkeypatch.setattr(factorizations, "factorize", lambda w, *rest: (made.append(w.shape), right(w, *rest))[1])
    report = swept(llama, "--eval", llama.parent / "text.txt", "--context", "32")
    assert len(made) == len(report["matrices"]) == 14
    assert len(report["points"]) > 5


def test_nothing_but_a_file_is_needed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40))[0]
    low = basis[:, :6] @ torch.randn(6, 60) + 1e-3 * torch.randn(40, 60)
    save_file({"any.weight": low, "other": torch.randn(30, 90), "bias": torch.ones(40)}, tmp_path / "any.st")
    result = tlt("factor", tmp_path / "any.st", "--rank-sweep")
    assert result.exit_code == 0
    header, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert header == ["rank", "factored", "parameters", "keep", "bytes", "error", "note"]
    assert rows[-1][0] == "dense" and [int(row[0]) for row in rows[:-1]] == list(range(1, 24))
    assert "│" in result.stderr  # the curve, beside the data
    found = {one["name"]: one for one in swept(tmp_path / "any.st")["matrices"]}
    assert found["any"]["shape"] == SHARP and found["any"]["drops"] == [6]
    assert found["other"]["shape"] == GRADUAL
    assert found["any"]["break_even"] == 24 and found["any"]["effective"] < 6.1


def test_the_smallest_that_reads_well_enough(llama: Path, tmp_path: Path) -> None:
    text = llama.parent / "text.txt"
    common = (llama, "--eval", text, "--context", "32", "--ranks", "1,4,8,12,16")
    points = swept(*common)["points"]
    wanted = sorted(point["perplexity"] for point in points[:-1])[2]
    best = min((p for p in points[:-1] if p["perplexity"] <= wanted), key=lambda p: p["parameters"])
    result = tlt("factor", *common, "--max-perplexity", repr(wanted), "-o", tmp_path / "picked")
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'picked'}\n"
    config = json.loads((tmp_path / "picked" / "config.json").read_text())
    assert set(config["lowrank"]["ranks"].values()) == {best["rank"]}
    read = json.loads(tlt("eval", tmp_path / "picked", "--data", text, "--context", "32", "--json").stdout)
    assert read["perplexity"] <= wanted * 1.0001
    missed = tlt("factor", *common, "--max-perplexity", "1.5", "-o", tmp_path / "none")
    assert missed.exit_code == 1 and "no rank keeps the perplexity within 1.5" in missed.stderr
    assert not (tmp_path / "none").exists()


def test_a_plot_or_one_line_on_what_it_takes(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        refused = tlt("factor", llama, "--rank-sweep", "--plot", tmp_path / "a.png")
    assert refused.exit_code == 1 and "pip install 'tlt[plot]'" in refused.stderr and refused.stdout == ""
    pytest.importorskip("matplotlib")
    swept(llama, "--plot", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    again = tlt("factor", llama, "--rank-sweep", "--plot", tmp_path / "a.svg")
    assert again.exit_code == 1 and "--force" in again.stderr


def test_a_text_needs_a_model_that_can_run(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(9, 9)}, tmp_path / "a.st")
    (tmp_path / "t.txt").write_text(TEXT)
    result = tlt("factor", tmp_path / "a.st", "--rank-sweep", "--eval", tmp_path / "t.txt", "-q")
    assert result.exit_code == 1 and "no family fits" in result.stderr


# --- the grid, spectra, the knee, the curve --------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 20000), st.integers(3, 20000))
def test_a_grid_spans_what_saves(rows: int, columns: int) -> None:
    matrix = Matrix("a", "a", rows, columns, False)
    ranks = grid([matrix])
    assert ranks == sorted(set(ranks)) and ranks[0] == 1 and len(ranks) <= POINTS
    most = matrix.break_even - 1
    assert most - 8 < ranks[-1] <= most
    assert all(b - a <= max(8, most / 8) for a, b in pairwise(ranks))


def spectra() -> Iterator[tuple[str, list[float], tuple[int, ...]]]:
    yield SHARP, [10.0, 9, 8, 7, *[0.1] * 12], (4,)
    yield SHARP, [50.0, *[2.0 - i / 20 for i in range(20)]], (1,)
    yield CLUSTERS, [9.0] * 4 + [3.0] * 4 + [1.0] * 4, (4, 8)
    yield GRADUAL, [0.9**i for i in range(40)], ()
    yield GRADUAL, [0.3**i for i in range(10)], ()  # steep, but no step stands out
    yield GRADUAL, torch.linalg.svdvals(torch.randn(50, 50, generator=torch.Generator().manual_seed(0))).tolist(), ()
    yield GRADUAL, [1.0] * 10, ()
    yield NOTHING, [0.0] * 5, ()


@pytest.mark.parametrize("name, values, drops", list(spectra()))
def test_shapes_by_name(name: str, values: list[float], drops: tuple[int, ...]) -> None:
    found = shape_of(torch.tensor(values))
    assert (found.name, found.drops) == (name, drops)


def test_ranks_that_are_no_whole_numbers_keep_their_order() -> None:
    for seed in range(20):
        values = torch.rand(30, generator=torch.Generator().manual_seed(seed)).sort(descending=True)[0]
        found = shape_of(values)
        assert 1 <= found.stable <= found.participation <= found.effective <= found.rank == 30
    flat = shape_of(torch.ones(7))
    assert flat.stable == pytest.approx(7) and flat.effective == pytest.approx(7) == flat.participation


def test_the_knee() -> None:
    costs = list(range(11))
    assert knee(costs, [100.0, 50, 10, 9, 8, 7, 6, 5, 4, 3, 2]) == 2
    assert knee(costs, [float(-cost) for cost in costs]) is None  # a straight line has none
    assert knee([0, 1], [1.0, 0.0]) is None and knee(costs, [1.0] * 11) is None


def test_a_curve_in_characters() -> None:
    lines = drawn([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0], across="parameters", up="error", mark=2)
    assert sum(line.count("•") for line in lines) == 3 and sum(line.count("◆") for line in lines[1:]) == 1
    points = [line.partition("│")[2].find("•") for line in lines if "•" in line]
    assert points == sorted(points), "it falls from left to right"
    assert "log scale" in drawn([1, 2, 3], [1e5, 1e3, 10.0], across="p", up="perplexity", mark=None)[0]
    assert drawn([1, 2, 3], [math.inf, 1.0, math.nan], across="p", up="e", mark=None) == []
