"""What a GPU computes is what the CPU computes: models of every kind, training in all its forms, and going on with it.

`python -m pytest -m gpu` runs this file; in any other run no GPU is seen (conftest.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from sysconfig import get_path
from typing import Any

import pytest
import torch
from adapting import decoder_of, write_lora
from factored import modules_cache  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids
from growing import opened
from test_train import (  # noqa: F401
    content,
    evaluated,
    interrupted,
    log,
    losses,
    stock,
    stock_loss,
    tlt,
    train,
    words,
    write_some_tree,
)

from tlt_cli.model.weights import load_checkpoint

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here, or hidden: see conftest.py"),
    pytest.mark.usefixtures("modules_cache"),
]
FLOAT32, CPU, GPU = ("--precision", "float32"), ("--device", "cpu"), ("--device", DEVICE)
SHAPE = ("--context", "32", "--batch-size", "4")
COMPILES = any(map(shutil.which, ("cc", "gcc", "clang"))) and Path(get_path("include"), "Python.h").is_file()
NEAR, FAR = 1e-4, 1e-2  # nats: float32 on one device and another, and what is another run


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A terminal that is none, and a folder of its own."""
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.delenv("TLT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes and texts, and beside them what surgery on the CPU makes of that model: one of every kind."""
    folder = tmp_path_factory.mktemp("models")
    bytes_of = {"vocab_size": 256, "num_hidden_layers": 2}
    model = make_checkpoint(folder / "model", "llama", **bytes_of)
    other = make_checkpoint(folder / "other", "llama", seed=1, **bytes_of)
    text = folder / "text.txt"
    text.write_text(words(1500, 0))
    (folder / "held.txt").write_text(words(200, 1))
    write_lora(folder, model, "adapter", torch.float32, rank=3)
    write_some_tree(folder / "tree", model)
    make_checkpoint(folder / "fractal", "llama", **bytes_of)
    config = json.loads((folder / "fractal" / "config.json").read_text())
    config["fractal"] = {"norm": "sliced", "levels": 3, "split": 2}
    (folder / "fractal" / "config.json").write_text(json.dumps(config))
    on_text = ("--calibration", text, "--context", "32")
    for name, command in {
        "factored": ("factor", model, "--keep", "0.6", "--refine", "drift", *on_text, *CPU),
        "8 bits": ("factor", model, "--rank", "8", "--bits", "8", *CPU),
        "sliced": ("slice", model, "--dim", "24", "--order", "importance", "--refit", *on_text),
        "merged": ("merge", model, other),
        "glued": ("merge", model, other, "--glue", "lowrank", "--glue-init", "fit", "--calibration", text),
        "folded": ("fold", folder / "glued"),
    }.items():
        result = tlt(*command, "-o", folder / name, "-q")
        assert result.exit_code == 0, result.stderr
    return folder


def trained(here: Path, output: str, what: tuple[str, ...], *more: str) -> list[float]:
    """A run of six steps: the loss of each, and the last evaluation's."""
    train(*filled(here, what), "--data", here / "text.txt", "--steps", "6", *SHAPE, *more, "-o", output)
    return [entry["loss"] for entry in log(output) if "loss" in entry] + losses(output)[-1:]


def filled(here: Path, what: tuple[str, ...]) -> list[str]:
    return [str(here / word[1:-1]) if word.startswith("{") else word for word in what]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


# --- running -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
@torch.no_grad()
def test_every_family_computes_the_same(tmp_path: Path, family: str) -> None:
    made, ids = opened(make_checkpoint(tmp_path / "model", family)), some_ids()
    expected = decoder_of(made.folder)(ids)
    for stream in (False, True):
        for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.3)):
            decoder = load_checkpoint(made.checkpoint, made.fitted, stream=stream, dtype=dtype, device=DEVICE)
            found = decoder(ids.to(DEVICE))
            assert found.device.type == DEVICE
            distance = (found.cpu().double() - expected).abs().max() / expected.std()
            assert distance <= bound, (stream, dtype)


@pytest.mark.parametrize(
    "kind", ["model", "adapter", "tree", "factored", "8 bits", "sliced", "fractal", "merged", "glued", "folded"]
)
def test_every_kind_of_model_reads_and_writes_the_same(here: Path, kind: str) -> None:
    wanted, whole = (evaluated(here / name, here / "held.txt", *CPU) for name in (kind, "model"))
    assert (kind == "fractal") == (wanted == whole) or kind == "model", "it must be another model"
    for more in ((), ("--stream",)):
        assert evaluated(here / kind, here / "held.txt", *GPU, *more) == pytest.approx(wanted, abs=NEAR)
    for drawn in (("--temperature", "0"), ("--temperature", "0.7", "--seed", "3")):
        said = [
            tlt("generate", here / kind, "--prompt", "one two", "--max-tokens", "16", *drawn, *place, "-q")
            for place in (CPU, GPU)
        ]
        assert said[0].exit_code == said[1].exit_code == 0, said[1].stderr
        assert said[0].stdout_bytes == said[1].stdout_bytes


def test_parts_of_a_model_read_the_same(here: Path) -> None:
    for kind, which in (("fractal", "--levels"), ("glued", "--streams")):
        tables = []
        for place in (CPU, GPU):
            result = tlt("eval", here / kind, which, "--data", here / "held.txt", "--context", "32", *place, "--json")
            assert result.exit_code == 0, result.stderr
            tables.append(numbers(json.loads(result.stdout)))
        assert len(tables[0]) > 3 and apart(*tables) <= NEAR * max(map(abs, tables[0]))


def numbers(found: Any) -> list[float]:
    """All floats of a JSON value, in order."""
    if isinstance(found, dict | list):
        return [each for value in (found.values() if isinstance(found, dict) else found) for each in numbers(value)]
    return [found] if isinstance(found, float) else []


def test_factoring_measures_the_same(here: Path) -> None:
    """And what is written does not depend on where it is measured."""
    read = ("--eval", here / "held.txt", "--context", "32")
    for what in (
        ("--keep", "0.6", "--refine", "drift", "--calibration", here / "text.txt"),
        ("--rank-sweep", "--ranks", "2,8,16"),
    ):
        found = []
        for name, place in {"one": CPU, "other": GPU}.items():
            output = () if "--rank-sweep" in what else ("-o", name)
            result = tlt("factor", here / "model", *what, *read, *place, *output, "--json", "-q")
            assert result.exit_code == 0, result.stderr
            found.append(perplexities(json.loads(result.stdout)))
        assert len(found[0]) in (1, 3, 4) and found[1] == pytest.approx(found[0], rel=NEAR)
    assert content(Path("one")) == content(Path("other"))


def perplexities(found: Any) -> list[float]:
    if isinstance(found, dict):
        own = [value for key, value in found.items() if key == "perplexity" and isinstance(value, float)]
        return own + [each for value in found.values() for each in perplexities(value)]
    return [each for value in found for each in perplexities(value)] if isinstance(found, list) else []


# --- training ----------------------------------------------------------------------------------------------------

TRAINED: dict[str, tuple[str, ...]] = {
    "all": ("{model}",),
    "from nothing": ("--init", "gpt2:dim=32,layers=1,heads=2"),
    "muon": ("{model}", "--optimizer", "muon"),
    "some": ("{model}", "--only", "*.mlp.*"),
    "documents": ("{model}", "--separator", "ten ", "--micro-batch", "1"),
    "lora": ("{model}", "--lora", "2"),
    "lora trained on": ("{adapter}",),
    "tree": ("{model}", "--lora-tree", "2", "--rank", "2"),
    "tree of tokens": ("{model}", "--lora-tree", "2", "--rank", "2", "--route", "token", "--tree-nodes", "leaf"),
    "tree trained on": ("{tree}",),
    "nested": ("{model}", "--nested", "1/2,1/4"),
    "fractal": ("{model}", "--fractal", "3", "--split", "2"),
    "ordered": ("{model}", "--hierarchy", "emergent", "--clusters", "4"),
    "prefixes": ("{model}", "--nested-only", "embeddings"),
    "regularized": ("{model}", "--regularizer", "participation", "--target-rank", "8"),
    "taught": ("{model}", "--distill", "{other}", "--distill-share", "0.5"),
    "merged": ("{merged}",),
    "glue": ("{glued}", "--only", "*glue*"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINED)
def test_training_in_float32_takes_the_cpus_steps(here: Path, case: str) -> None:
    """Within what rounding makes of the steps. Negative control: other windows."""
    if case == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    on_cpu = trained(here, "cpu", TRAINED[case], *CPU)
    assert apart(trained(here, "gpu", TRAINED[case], *GPU, *FLOAT32), on_cpu) <= 10 * NEAR
    if case in ("all", "tree"):
        assert apart(trained(here, "else", TRAINED[case], *GPU, *FLOAT32, "--seed", "1"), on_cpu) > FAR


@pytest.mark.parametrize("case", ["all", "tree", "nested", "glue"])
def test_training_in_bfloat16_products_learns(here: Path, case: str) -> None:
    """The default: near float32 at first, though not the same, and it learns; what is written is whole weights."""
    how = ("--data", here / "text.txt", "--eval-data", here / "held.txt", "--steps", "30", *SHAPE, "--lr", "1e-2")
    what = filled(here, TRAINED[case])
    train(*what, *how, *GPU, "-o", "out")
    train(*what, *how, *GPU, *FLOAT32, "-o", "float32")
    mixed, plain = ([entry for entry in log(name) if "loss" in entry] for name in ("out", "float32"))
    assert 1e-6 < abs(mixed[0]["loss"] - plain[0]["loss"]) < 0.05
    assert losses("out")[-1] < losses("out")[0] - (0.1 if case == "glue" else 0.5)
    assert abs(losses("out")[-1] - losses("float32")[-1]) < 0.2
    base = ("--base", str(here / "model")) if case == "tree" else ()
    assert evaluated("out", here / "held.txt", *base, *CPU) == pytest.approx(losses("out")[-1], abs=0.03)
    if case == "all":
        assert stock_loss(stock(Path("out")).float(), here / "held.txt", 32) == pytest.approx(
            losses("out")[-1], abs=0.03
        )
        assert opened(Path("out")).dtypes == opened(here / "model").dtypes
    assert all(0 < entry["mfu"] < 1 and entry["memory"] > 0 for entry in mixed)


@pytest.mark.parametrize("case", ["all", "lora", "tree", "fractal"])
def test_what_is_resumed_is_what_was_not_interrupted(
    here: Path,
    interrupted: Callable[..., None],  # noqa: F811
    case: str,
) -> None:
    """To the byte, where the device adds up in the same order every time; else as near as two whole runs are."""
    arguments = (
        *filled(here, TRAINED[case]), "--data", here / "text.txt", "--steps", "6", *SHAPE, "--save-every", "2", *GPU,
    )  # fmt: skip
    for output, seed in (("whole", "0"), ("again", "0"), ("other", "1")):
        train(*arguments, "--seed", seed, "-o", output)
    interrupted(3, *arguments, "-o", "cut")
    assert train(*arguments, "-o", "cut", "--resume")["resumed_at"] == 2
    whole, again, other, cut = (
        [entry["loss"] for entry in log(name) if "loss" in entry] for name in ("whole", "again", "other", "cut")
    )
    assert len(cut) == 6 and apart(cut, whole) <= NEAR < FAR < apart(other, whole)
    if again == whole:
        assert cut == whole
    if content(Path("again")) == content(Path("whole")):
        assert content(Path("cut")) == content(Path("whole"))


def test_glue_is_trained_and_folded(here: Path) -> None:
    """Better than where it began, and one model when it is folded."""
    how = ("--only", "*glue*", "--data", here / "text.txt", "--steps", "20", *SHAPE, "--lr", "1e-2", *GPU, *FLOAT32)
    train(here / "glued", *how, "-o", "trained")
    result = tlt("fold", "trained", "--data", here / "held.txt", "-o", "folded", "-q")
    assert result.exit_code == 0, result.stderr
    before, after, folded = (
        evaluated(model, here / "held.txt", *GPU) for model in (here / "glued", "trained", "folded")
    )
    assert after < before - 0.1 and folded == pytest.approx(after, abs=NEAR)


@pytest.mark.skipif(not COMPILES, reason="compiling needs a C compiler and Python's headers")
def test_compiled_it_takes_the_same_steps(here: Path) -> None:
    compiled = trained(here, "compiled", TRAINED["lora"], *GPU, *FLOAT32, "--compile")
    assert apart(compiled, trained(here, "plain", TRAINED["lora"], *GPU, *FLOAT32)) <= NEAR
