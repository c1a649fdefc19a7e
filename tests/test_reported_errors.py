"""What `tlt factor` says that its output loses is what the output loses: measured anew, with moments of stock torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import make_checkpoint
from safetensors.torch import load_file
from test_calibration import naive_importance, stock_moments
from torch import Tensor
from typer.testing import CliRunner

from tlt_cli.calibration import options
from tlt_cli.calibration.compress import Compressed
from tlt_cli.cli import app, compressing
from tlt_cli.surgery.decompose import DAMPING
from tlt_cli.surgery.metrics import METHODS

CONTEXT = 24
TEXT = "".join(f"{n} little words, {n * n % 97} of them said twice; " for n in range(16))


@dataclass(frozen=True)
class Known:
    """A checkpoint, its matrices, and what the text shows of each by its module's name."""

    folder: Path
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    absolute: Mapping[str, Tensor]
    importance: Mapping[str, Tensor]

    def lost(self, name: str, change: Tensor, method: str) -> float:
        """The squared norm of a change in a method's metric, written out."""
        if method == "svd":
            return float(change.square().sum())
        if method in ("whiten", "kfac"):
            felt = change
            if method == "kfac":
                outputs = self.outputs[name]
                felt = (outputs + DAMPING * outputs.diagonal().mean() * torch.eye(len(outputs))) @ change
            return float((felt @ self.inputs[name] @ change.T).trace())
        weights = {
            "weighted": self.importance[name],
            "fisher": self.importance[name].sum(0).expand_as(change),
            "activation": self.absolute[name].expand_as(change),
        }[method]
        return float((weights * change**2).sum())

    def errors(self, written: Mapping[str, Tensor], method: str) -> tuple[float, dict[str, float]]:
        """Of all matrices together, and of each."""
        lost = {n: self.lost(n, self.weights[n] - written[f"{n}.weight"].double(), method) for n in self.weights}
        whole = {name: self.lost(name, weight, method) for name, weight in self.weights.items()}
        total = (sum(lost.values()) / sum(whole.values())) ** 0.5
        return total, {name: (lost[name] / whole[name]) ** 0.5 for name in lost}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("model") / "llama", "llama", vocab_size=256, num_hidden_layers=2, hidden_size=24,
        intermediate_size=32, head_dim=8, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    (folder.parent / "text.txt").write_text(TEXT)
    stored = load_file(folder / "model.safetensors")
    names = [name.removesuffix(".weight") for name in stored if name.endswith("proj.weight")]
    ids = torch.tensor(list(TEXT.encode()))
    ids = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    moments = stock_moments(folder, ids, names)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    absolute: dict[str, Tensor] = {}
    for name in names:

        def hook(_: torch.nn.Module, given: tuple[Tensor], __: Tensor, name: str = name) -> None:
            absolute[name] = given[0].flatten(0, -2).abs().double().mean(0)

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model(ids)
    return Known(
        folder,
        {name: stored[f"{name}.weight"].double() for name in names},
        {name: inputs for name, (inputs, _) in moments.items()},
        {name: outputs for name, (_, outputs) in moments.items()},
        absolute,
        naive_importance(folder, ids, names),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressing, "STEPS", 3)


def tlt(*words: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def run(known: Known, out: Path, *words: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The report, and the tensors of the output multiplied out."""
    text = [] if "svd" in words else ["--calibration", known.folder.parent / "text.txt", "--context", str(CONTEXT)]
    size = [] if "--keep" in words else ["--keep", "0.6"]
    done = tlt("factor", known.folder, *size, *words, *text, "-o", out / "thin", "--json", "-q")
    tlt("fold", out / "thin", "-o", out / "plain", "-q")
    report: dict[str, Any] = json.loads(done.stdout)
    return report, load_file(out / "plain" / "model.safetensors")


WAYS = [
    (method, sharing, refinement)
    for method in METHODS
    for sharing, refinement in (("uniform", "none"), ("global", "none"), ("uniform", "drift"), ("global", "block"))
    if method != "svd" or refinement == "none"
]


@pytest.mark.parametrize("method, sharing, refinement", WAYS)
def test_reported_errors_are_measured(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, sharing: str, refinement: str
) -> None:
    """Plain and in the metric, for each matrix and in all; no neurons go, for a folded file does not say which."""
    monkeypatch.setattr(options, "_MOST_NEURONS", 0)
    report, written = run(
        known,
        tmp_path,
        "--method",
        method,
        "--allocate",
        sharing,
        *(["--refine", refinement] if method != "svd" else []),
    )
    assert report["method"] == method and report.get("refine", "none") == refinement
    told = report["verification"]
    for metric, key in (("svd", "error"), (method, "error" if method == "svd" else f"{method}_error")):
        total, each = known.errors(written, metric)
        exact = 1e-5 if metric == "svd" else 1e-3  # stock transformers' moments are float32's, summed another way
        assert told[key] == pytest.approx(total, rel=exact)
        assert told[f"{key}s"].keys() == known.weights.keys()
        for name, error in each.items():
            assert told[f"{key}s"][name] == pytest.approx(error, rel=exact, abs=1e-6), name
        moved = {name: 1.2 * value for name, value in written.items()}
        assert told[key] != pytest.approx(known.errors(moved, metric)[0], rel=exact), "the control: a fifth more"
    if method != "svd":
        assert told[f"{method}_error"] != pytest.approx(told["error"], rel=1e-2)
    seconds = report["matrix_seconds"]
    assert set(seconds) <= known.weights.keys() and all(value > 0 for value in seconds.values())
    assert report["seconds"] == pytest.approx(sum(seconds.values())) and report["total_seconds"] >= report["seconds"]


def test_errors_where_neurons_went(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron that went is a row of zeros in gate and up, which count plainly but not in the metric."""
    kept: dict[int, Tensor] = {}
    right = compressing.start_globally

    def recorded(*given: Any, **more: Any) -> Compressed:
        made = right(*given, **more)
        kept.update(made.kept)
        return made

    monkeypatch.setattr(compressing, "start_globally", recorded)
    report, written = run(known, tmp_path, "--keep", "0.3", "--refine", "none")
    assert kept, "at this share some neurons go"
    lost, whole = {"svd": 0.0, "kfac": 0.0}, {"svd": 0.0, "kfac": 0.0}
    for name, weight in known.weights.items():
        new = written[f"{name}.weight"].double()
        stays = kept.get(int(name.split(".")[2]))
        change = weight - new if stays is None or ".mlp." not in name else weight.clone()
        felt = change
        if stays is not None and name.endswith("down_proj"):
            change[:, stays] -= new[:, : len(stays)]
        elif stays is not None and ".mlp." in name:
            change[stays] -= new[: len(stays)]
            felt = torch.zeros_like(change)
            felt[stays] = change[stays]
        for metric, value in (("svd", change), ("kfac", felt)):
            lost[metric] += known.lost(name, value, metric)
            whole[metric] += known.lost(name, weight, metric)
    told = report["verification"]
    assert told["error"] == pytest.approx((lost["svd"] / whole["svd"]) ** 0.5, rel=1e-5)
    assert told["kfac_error"] == pytest.approx((lost["kfac"] / whole["kfac"]) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("method", ["weighted", "whiten"])
def test_factors_that_lose_more_than_they_say_are_not_written(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from tlt_cli.surgery.factorizations import Factorizations

    right = Factorizations.factors
    monkeypatch.setattr(
        Factorizations, "factors", lambda self, m, r: (right(self, m, r)[0], 1.1 * right(self, m, r)[1])
    )
    words = [
        "factor",
        known.folder,
        "--rank",
        "4",
        "--method",
        method,
        "--calibration",
        known.folder.parent / "text.txt",
    ]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--context", CONTEXT, "-o", tmp_path / "out"]])
    assert result.exit_code == 1 and f"in the metric of --method {method}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_global_allocation_is_over_the_methods_own_errors(known: Known, tmp_path: Path) -> None:
    """Each method shares out by what it measures itself, refined or not; only K-FAC's chooses among structures too."""
    found = {}
    for method in ("whiten", "activation", "kfac"):
        for refinement in ("none", "drift"):
            words = ["--method", method, "--allocate", "global", "--refine", refinement]
            report, _ = run(known, tmp_path / f"{method}-{refinement}", *words)
            found[method, refinement] = report["ranks"]
            assert bool(report.get("neurons")) <= (method == "kfac")
    for method in ("whiten", "activation", "kfac"):
        assert found[method, "none"] == found[method, "drift"]
    assert found["whiten", "none"] != found["activation", "none"] != found["kfac", "none"]
