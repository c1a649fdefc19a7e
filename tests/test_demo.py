"""The tour keeps its word: growth loses nothing by any method, the exit code says so, and a person can read it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from family_zoo import some_ids, stock_logits
from typer.testing import CliRunner

from tlt_cli.cli import app, compressing, tour
from tlt_cli.cli.console import Output
from tlt_cli.surgery import verify
from tlt_cli.surgery.arrows import METHODS

STEPS = 12


def demo(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module", autouse=True)
def short_text() -> Any:
    """A text of a few seconds, and factors little tuned: the tour of the real ones is the README's first command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tour, "CALIBRATION", 2048)
        patch.setattr(compressing, "STEPS", 2)
        patch.setattr(tour, "built_in_text", lambda: "".join(f"{n} sheep, {n + 1} sheep. " for n in range(1200)))
        patch.setattr(tour, "BATCH", 4)
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tour's folder and what it says of it."""
    folder = tmp_path_factory.mktemp("demo") / "tour"
    result = demo("--steps", STEPS, "--json", "-o", folder)
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_nothing_is_lost(kept: tuple[Path, dict[str, Any]]) -> None:
    """What the table says of every method is what stock transformers sees."""
    folder, report = kept
    models = {model["model"]: model for model in report["models"]}
    assert report["kept"] is True and "nothing was lost" in report["verdict"]
    assert [*models] == ["small", *METHODS, "factored", "random"]
    logits = stock_logits(folder / "small", some_ids(256))
    for method in METHODS:
        model, grown = models[method], stock_logits(folder / method, some_ids(256))
        assert float((grown - logits).abs().max() / logits.std()) <= model["bound"]
        assert model["relative"] <= model["bound"] and 0 <= model["kl"] < 1e-9
        assert model["perplexity"] == pytest.approx(models["small"]["perplexity"], rel=1e-5)
        assert model["axes"]["hidden"] == 2 * models["small"]["axes"]["hidden"]
        assert f"--to-dim 128 --method {method}" in model["command"]


def test_it_trains_on(kept: tuple[Path, dict[str, Any]]) -> None:
    folder, report = kept
    models = {model["model"]: model for model in report["models"]}
    small, grown, random = (models[name] for name in ("small", "duplicate", "random"))
    for model in (small, grown, random):
        assert model["loss_trained_on"] < model["loss"]
        assert model["steps"] == len(model["losses"]) + (STEPS if model is grown else 0) == 2 * STEPS
    assert grown["losses"][0] == pytest.approx(small["losses"][STEPS], rel=1e-5)  # the same windows, the same function
    assert random["loss"] == pytest.approx(math.log(256), abs=0.2)
    assert small["flops"] < grown["flops"] < random["flops"] and random["parameters"] == grown["parameters"]
    assert small["continuation"] == grown["continuation"]
    for name in ("small-trained", "duplicate-trained", "random-trained"):
        assert (folder / name / "model.safetensors").is_file()


def test_the_same_seed_the_same_models(kept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, report = kept
    again, other = demo("--steps", STEPS, "--json", "-o", tmp_path / "again"), demo("--steps", 2, "--seed", 1, "--json")
    said = json.loads(again.stdout)
    assert said == report
    assert json.loads(other.stdout)["models"][0]["losses"][0] != report["models"][0]["losses"][0]
    for name in ("small", "spectral", "duplicate-trained"):
        one, two = (path / name / "model.safetensors" for path in (folder, tmp_path / "again"))
        assert one.read_bytes() == two.read_bytes()


def test_what_it_prints() -> None:
    result = demo("--steps", 2)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert result.exit_code == 0 and {len(line) for line in lines} == {len(lines[0])}
    assert [line[0] for line in lines] == ["model", "small", *METHODS, "factored", "random"]
    assert f"1 of {len(tour.STOPS)}: train a small model" in result.stderr
    assert "nothing was lost" in result.stderr and "One seed" in result.stderr
    assert demo("--steps", 2, "-q").stderr == ""
    assert "step 0, loss" in demo("--steps", 2, "-v").stderr


def test_a_growth_that_misses_its_bound_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No growth reaches a bound of nothing: exit 1, no table, and of the grown model nothing is there."""
    monkeypatch.setattr(verify, "BOUND", 0.0)
    result = demo("--steps", 2, "-o", tmp_path / "tour")
    assert result.exit_code == 1 and result.stdout == "" and "verification failed" in result.stderr
    assert sorted(path.name for path in (tmp_path / "tour").iterdir()) == ["held-out.txt", "small"]


def test_a_perplexity_that_moves_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look, at what was written: a stop that reports another loss turns the verdict and the exit code."""

    def worse(going: tour.Tour) -> None:
        going.models["rotate"]["loss"] += 0.01

    at = next(place for place, (_, stop) in enumerate(tour.STOPS) if stop is tour._evaluate) + 1
    monkeypatch.setattr(tour, "STOPS", (*tour.STOPS[:at], ("spoil it", worse), *tour.STOPS[at:]))
    result = demo("--steps", 2, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 1 and said["kept"] is False and "SOMETHING WAS LOST" in said["verdict"]
    assert [model["model"] for model in said["models"] if model.get("kept") is False] == ["rotate"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for place in (tmp_path, tmp_path / "mine"):
        result = demo("--steps", 2, "-o", place)
        assert result.exit_code == 1 and "exists already" in result.stderr and result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert demo("--steps", 0).exit_code == demo("--seed", -1).exit_code == 2


def test_threads_are_given_back() -> None:
    import torch

    before = torch.get_num_threads()
    with tour._one_core():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before and Output().leads
