"""`tlt factor`: the ranks asked for, honest counts, files that hold what was computed, refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tlt_cli.cli import app
from tlt_cli.errors import UsageError
from tlt_cli.surgery.factor import allocated, at_energy, at_keep, at_rank, choices, losses
from tlt_cli.surgery.matrices import Matrix

TEXT = "Es war einmal ein Modell, das wurde immer kleiner und konnte doch noch lesen. " * 30
MATRICES = [Matrix("a", "a", 24, 40, False), Matrix("b", "b", 40, 24, False), Matrix("c", "c", 8, 40, False)]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", vocab_size=300)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def tlt(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def factored(*arguments: str | Path) -> dict[str, Any]:
    result = tlt("factor", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


# --- ranks ----------------------------------------------------------------------------------------------------


def test_break_even_keeps_a_matrix_dense() -> None:
    ranks = at_rank(MATRICES, 10)
    assert ranks.by_slot == {"a": 10, "b": 10, "c": None}  # 8 x 40 breaks even at 7, the others at 15
    assert ranks.parameters == 2 * 10 * 64 + 320 and ranks.before == 2 * 960 + 320
    assert at_rank(MATRICES, 6).by_slot["c"] == 6
    assert at_rank(MATRICES, 7).by_slot["c"] is None
    assert at_rank(MATRICES, 20, saving=False).by_slot == {"a": 20, "b": 20, "c": None}


@pytest.mark.parametrize("rank, says", [(0, "at least 1"), (-3, "at least 1"), (15, "the most .* is 14"), (99, "14")])
def test_ranks_that_cannot_be(rank: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        at_rank(MATRICES, rank)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.8, 0.999])
def test_a_share_of_each_matrix_is_never_exceeded(keep: float) -> None:
    for matrix in MATRICES:
        (rank,) = at_keep([matrix], keep).by_slot.values()
        if rank is not None and rank > 1:
            assert rank * (matrix.rows + matrix.columns) <= keep * matrix.size
            assert (rank + 1) * (matrix.rows + matrix.columns) > keep * matrix.size


def test_a_share_of_the_energy_is_reached_and_not_before() -> None:
    spectrum = torch.tensor([4.0, 2.0, 1.0, 0.5, *[0.01] * 20])
    for energy in (0.5, 0.8, 0.95, 0.99):
        ranks = at_energy(MATRICES[:1], {"a": spectrum}, energy)
        rank = ranks.by_slot["a"]
        assert rank is not None
        held = spectrum.square().cumsum(0) / spectrum.square().sum()
        assert held[rank - 1] >= energy and (rank == 1 or held[rank - 2] < energy)


def test_allocation_honours_the_budget_and_beats_equal_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for matrix, size in zip(MATRICES, (1.0, 5.0, 0.3), strict=True):
        errors[matrix.name] = losses(size * torch.rand(matrix.full_rank, generator=generator).sort(descending=True)[0])
    for keep in (0.4, 0.6, 0.8):
        best, same = allocated(MATRICES, errors, keep), at_keep(MATRICES, keep)
        assert best.parameters <= keep * best.before
        loss = {
            which: sum(float(errors[slot][rank]) for slot, rank in ranks.factored.items())
            for which, ranks in (("best", best), ("same", same))
        }
        assert loss["best"] < loss["same"] and best.bound == pytest.approx(loss["best"])
        aligned = allocated(MATRICES, errors, keep, align=4)
        assert all(rank % 4 == 0 for rank in aligned.factored.values())


def test_options_never_reach_break_even() -> None:
    for rows, columns in ((2, 2), (3, 4), (24, 40)):
        matrix = Matrix("a", "a", rows, columns, False)
        for align in (1, 8):
            offered = choices(matrix, torch.zeros(min(rows, columns) + 1), align=align)
            assert all(one.parameters < matrix.size for one in offered[:-1])
            assert offered[-1].rank is None and offered[-1].parameters == matrix.size


def test_aligned_ranks() -> None:
    spectrum = torch.tensor([4.0, 2.0, 1.0, 0.5, *[0.01] * 20])
    assert at_keep(MATRICES, 0.7, align=4).by_slot == {"a": 8, "b": 8, "c": 4}
    assert at_keep(MATRICES, 0.7).by_slot == {"a": 10, "b": 10, "c": 4}
    assert at_keep(MATRICES, 0.1, align=8).by_slot == {"a": 8, "b": 8, "c": None}, "8 saves nothing in c"
    assert at_energy(MATRICES[:1], {"a": spectrum}, 0.95).by_slot == {"a": 3}
    assert at_energy(MATRICES[:1], {"a": spectrum}, 0.95, align=4).by_slot == {"a": 4}
    assert at_rank(MATRICES, 8, align=4).by_slot == {"a": 8, "b": 8, "c": None}
    with pytest.raises(UsageError, match="no multiple of --align 4; take 8"):
        at_rank(MATRICES, 10, align=4)
    (whole,) = choices(MATRICES[2], torch.zeros(9), align=16)
    assert whole.rank is None


@pytest.mark.parametrize("options", [(), ("--allocate", "global"), ("text",), ("text", "--refine", "none")], ids=str)
def test_an_aligned_file(llama: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    text = ("--calibration", llama.parent / "text.txt", "--context", "32") if "text" in options else ()
    more = ("--method", "whiten") if options == ("text",) else ()
    words = (*(word for word in options if word != "text"), *text, *more, "--keep", "0.6")
    found = [factored(llama, *words, *align, "-o", tmp_path / f"out{len(align)}") for align in ((), ("--align", "4"))]
    plain, aligned = ({rank for rank in report["ranks"].values() if rank} for report in found)
    assert any(rank % 4 for rank in plain) and aligned and all(rank % 4 == 0 for rank in aligned)
    assert "--align 4" in found[1]["command"] and found[1]["keep"] <= 0.6


def test_losses_are_the_tails() -> None:
    assert losses(torch.tensor([3.0, 2.0, 1.0])).tolist() == [14.0, 5.0, 1.0, 0.0]


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
def test_factors_and_their_product_are_the_same_model(tmp_path: Path, family: str) -> None:
    """--format lowrank, run by tlt, and --format dense, run by stock transformers, compute the same."""
    import tlt_cli

    source = make_checkpoint(tmp_path / "model", family)
    thin = factored(source, "--keep", "0.6", "-o", tmp_path / "thin")
    factored(source, "--keep", "0.6", "--format", "dense", "-o", tmp_path / "product")
    ids = some_ids()
    with torch.no_grad():
        product, original = stock_logits(tmp_path / "product", ids), stock_logits(source, ids)
        run = tlt_cli.load(tmp_path / "thin", quiet=True)(ids)
    assert float((run - product).abs().max() / product.std()) < 1e-4
    assert float((run - original).abs().max() / original.std()) > 1e-2, "the control: something was cut off"
    stored = sum(t.numel() for t in load_file(tmp_path / "thin" / "model.safetensors").values())
    before = sum(t.numel() for t in load_file(source / "model.safetensors").values())
    told = thin["linear_parameters"]
    assert thin["parameters"] == stored == before - told["from"] + told["to"]
    assert thin["keep"] == told["to"] / told["from"] <= 0.6


def test_the_reported_error_is_that_of_the_file(llama: Path, tmp_path: Path) -> None:
    report = factored(llama, "--rank", "5", "-o", tmp_path / "out")
    old, new = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert report["verification"]["errors"].keys() == report["ranks"].keys()
    assert all((error == 0) == (report["ranks"][s] is None) for s, error in report["verification"]["errors"].items())
    for slot, error in report["verification"]["errors"].items():
        if report["ranks"][slot] is None:
            continue
        weight = old[f"{slot}.weight"].double()
        product = (new[f"{slot}.lowrank_b.weight"] @ new[f"{slot}.lowrank_a.weight"]).double()
        measured = float((weight - product).norm() / weight.norm())
        assert error == pytest.approx(measured, rel=1e-6)
        assert measured == pytest.approx(float(torch.linalg.svdvals(weight)[5:].norm() / weight.norm()), rel=1e-5)


def test_a_wrong_factor_is_not_written(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the check: factors that lose more than they say."""
    from tlt_cli.surgery.factorizations import Factorizations

    right = Factorizations.factors
    monkeypatch.setattr(
        Factorizations, "factors", lambda self, m, r: (right(self, m, r)[0], 1.1 * right(self, m, r)[1])
    )
    result = tlt("factor", llama, "--rank", "5", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "verification failed: model.layers.0" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["whiten", "activation", "fisher", "kfac", "weighted"])
def test_every_method_on_a_text(llama: Path, tmp_path: Path, method: str) -> None:
    text = llama.parent / "text.txt"
    common = ("--keep", "0.5", "--allocate", "uniform", "--context", "32")
    report = factored(llama, "--method", method, "--calibration", text, *common, "-o", tmp_path / method)
    plain = factored(llama, *common, "-o", tmp_path / "svd")
    assert report["method"] == method and report["ranks"] == plain["ranks"]
    assert report["verification"]["error"] > plain["verification"]["error"]  # plain SVD is the best in its own metric


def test_a_text_means_the_best_way_known(llama: Path, tmp_path: Path) -> None:
    report = factored(llama, "--keep", "0.5", "--calibration", llama.parent / "text.txt", "-o", tmp_path / "out")
    assert report["method"] != "svd" and len(set(report["ranks"].values())) > 2
    assert report["keep"] <= 0.5
    assert "--allocate global" in report["command"]


def test_one_matrix_written_back_dense(llama: Path, tmp_path: Path) -> None:
    report = factored(llama, "--rank", "2", "--only", "*1.mlp.down_proj", "--format", "dense", "-o", tmp_path / "one")
    old, new = load_file(llama / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors")
    assert report["ranks"] == {"model.layers.1.mlp.down_proj": 2}
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["model.layers.1.mlp.down_proj.weight"]
    assert int(torch.linalg.matrix_rank(new["model.layers.1.mlp.down_proj.weight"], rtol=1e-5)) == 2


def test_any_file_at_all(tmp_path: Path) -> None:
    tensors = {"conv.weight": torch.randn(12, 4, 3, 3), "head": torch.randn(20, 30), "scale": torch.randn(7)}
    save_file(tensors, tmp_path / "any.st")
    factored(tmp_path / "any.st", "--rank", "4", "-o", tmp_path / "thin.st")
    thin = load_file(tmp_path / "thin.st")
    assert thin["conv.lowrank_a.weight"].shape == (4, 36) and thin["conv.lowrank_b.weight"].shape == (12, 4)
    assert torch.equal(thin["scale"], tensors["scale"])
    factored(tmp_path / "any.st", "--rank", "4", "--format", "dense", "-o", tmp_path / "product.st")
    product = load_file(tmp_path / "product.st")
    assert product["conv.weight"].shape == (12, 4, 3, 3)
    torch.testing.assert_close(
        thin["conv.lowrank_b.weight"] @ thin["conv.lowrank_a.weight"], product["conv.weight"].flatten(1)
    )


def test_a_dry_run_says_what_the_real_one_writes(llama: Path, tmp_path: Path) -> None:
    dry = factored(llama, "--keep", "0.5", "-o", tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()
    real = factored(llama, "--keep", "0.5", "-o", tmp_path / "out")
    assert {key: dry[key] for key in ("tensors", "ranks", "parameters")} == {
        key: real[key] for key in ("tensors", "ranks", "parameters")
    }


def test_the_same_command_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        factored(llama, "--rank", "4", "-o", tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_a_bound_on_the_perplexity(llama: Path, tmp_path: Path) -> None:
    text = ("--eval", llama.parent / "text.txt", "--context", "32")
    report = factored(llama, "--rank", "5", *text, "-o", tmp_path / "out")
    read = json.loads(tlt("eval", tmp_path / "out", "--data", text[1], "--context", "32", "--json").stdout)
    perplexity = report["verification"]["perplexity"]
    assert perplexity == pytest.approx(read["perplexity"])
    within = ("factor", llama, "--rank", "5", *text, "--max-perplexity")
    missed = tlt(*within, str(0.99 * perplexity), "-o", tmp_path / "missed")
    assert missed.exit_code == 1 and "--max-perplexity allows" in missed.stderr
    assert not (tmp_path / "missed").exists()
    assert tlt(*within, str(1.01 * perplexity), "-o", tmp_path / "met").exit_code == 0


WRONG = {
    (): "say how small",
    ("--rank", "4", "--keep", "0.5"): "--rank and --keep",
    ("--rank", "0"): "at least 1",
    ("--rank", "500"): "no matrix gets smaller",
    ("--keep", "1.5"): "--keep 1.5",
    ("--energy", "0"): "--energy 0",
    ("--keep", "0.5", "--method", "svdd"): "did you mean 'svd'",
    ("--keep", "0.5", "--format", "sparse"): "--format sparse",
    ("--rank", "4", "--allocate", "global"): "say --keep with it",
    ("--rank", "5", "--align", "4"): "no multiple of --align 4",
    ("--rank-sweep", "--ranks", "3,5", "--align", "4"): "--align 4: none of the ranks",
    ("--rank", "4", "--only", "*.mlp.dwn"): "--only *.mlp.dwn",
    ("--rank", "4", "--rank-sweep"): "give one of them",
    ("--rank", "4", "--plot", "a.png"): "--rank-sweep",
    ("--rank-sweep", "--ranks", "1,x"): "--ranks 1,x",
    ("--rank-sweep", "--ranks", "0"): "--ranks 0",
    ("--rank-sweep", "--plot", "a.doc"): "--plot a.doc",
    ("--rank-sweep", "-o", "out"): "--max-perplexity",
}  # fmt: skip


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_bad_usage_is_one_line(
    llama: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tlt("factor", llama, *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert WRONG[options] in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
