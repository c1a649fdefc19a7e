"""`tlt inspect --heatmap`: the table and the picture are those of the rows that stock transformers has."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint
from safetensors.torch import load_file, save_file
from test_hierarchy import planted, words_tokenizer
from test_train import stock, tlt

from tlt_cli.cli.heatmap import token_name
from tlt_cli.model.text import Tokenizer
from tlt_cli.training.clusters import clustered

SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.chdir(tmp_path)


def looked_at(*arguments: str | Path | int) -> dict[str, Any]:
    result = tlt("inspect", *map(str, arguments), "--json", "-q")
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(code: int, told: str, *arguments: str) -> None:
    before = sorted(Path().rglob("*"))
    result = tlt("inspect", *arguments)
    (error,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert error.startswith("tlt: error: ") and told in error and result.exit_code == code and result.stdout == ""
    assert sorted(Path().rglob("*")) == before


def rows_of(model: Any, matrix: str) -> np.ndarray:
    module = model.get_input_embeddings() if matrix == "embedding" else model.get_output_embeddings()
    rows: np.ndarray = module.weight.detach().numpy()
    return rows


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_embedding_of_every_family(tmp_path: Path, family: str, tied: bool) -> None:
    """And a head of its own: their first entries, of the first tokens; not the same numbers laid out anew."""
    make_checkpoint(tmp_path / "model", family, tied)
    report = looked_at("model", "--prefixes", "4,16,32", "--tokens", "40")
    model = stock(tmp_path / "model")
    matrices = ["embedding"] if model.config.tie_word_embeddings else ["embedding", "head"]
    assert [(each["matrix"], each["prefix"]) for each in report["maps"]] == [
        (matrix, prefix) for matrix in matrices for prefix in (4, 16, 32)
    ]
    for each in report["maps"]:
        rows = rows_of(model, each["matrix"])[:40]
        wanted = clustered(rows[:, : each["prefix"]])
        assert each["clusters"] == wanted.labels.max() + 1
        assert each["silhouette"] == pytest.approx(wanted.scores()["silhouette"], abs=1e-6)
        assert sorted(each["order"]) == list(range(40)) and each["tokens"] == [str(token) for token in each["order"]]
        labels = [label for label, _ in itertools.groupby(each["labels"])]
        assert len(labels) == each["clusters"]  # side by side
        if each["prefix"] == 4:
            reshaped = rows.ravel()[: 40 * 4].reshape(40, 4)
            assert abs(clustered(reshaped).scores()["silhouette"] - each["silhouette"]) > 1e-3


def model_of_groups(tmp_path: Path, **config: Any) -> np.ndarray:
    """A model of bytes whose letters a to x lie in 4 groups of 6, by their first 8 entries; the group of each."""
    make_checkpoint(tmp_path / "model", "llama", True, vocab_size=256, **config)
    rows, labels = planted(4, 6, 8, 24)
    tensors = load_file("model/model.safetensors")
    tensors["model.embed_tokens.weight"][97:121] = torch.from_numpy(rows).float()
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    return labels


def test_it_agrees_with_categories_that_are_there(tmp_path: Path) -> None:
    labels = model_of_groups(tmp_path)
    groups = {str(group): [chr(97 + at) for at in np.flatnonzero(labels == group)] for group in range(4)}
    Path("groups.json").write_text(json.dumps(groups))
    drawn = np.random.default_rng(0).permutation(labels)
    Path("8.json").write_text(json.dumps({"8": {str(g): (97 + np.flatnonzero(drawn == g)).tolist() for g in range(4)}}))
    right, wrong = looked_at("model", "--categories", "groups.json"), looked_at("model", "--categories", "8.json")
    assert [each["prefix"] for each in right["maps"]] == [8, 16, 32]  # halves of the width, as nothing says others
    assert [each["prefix"] for each in wrong["maps"]] == [8]
    short, *longer = right["maps"]
    assert short["ari"] == short["nmi"] == 1.0 and short["clusters"] == 4 and short["category_silhouette"] > 0.6
    assert all(each["ari"] < 0.4 for each in longer)  # what stands behind is noise
    assert wrong["maps"][0]["ari"] < 0.2 and wrong["maps"][0]["category_silhouette"] < 0.1
    assert {frozenset(group) for group in groups.values()} == {
        frozenset(token for token, label in zip(short["tokens"], short["labels"], strict=True) if label == group)
        for group in range(4)
    }
    some = looked_at("model", "--categories", "groups.json", "--tokens", "7", "--prefixes", "8")["maps"][0]
    assert sorted(some["tokens"]) == list("abcdefg") and some["clusters"] == 2
    table = tlt("inspect", "model", "--categories", "groups.json", "--prefixes", "8,32", "-q").stdout.splitlines()
    assert table[0].split("\t") == ["matrix", "prefix", "tokens", "clusters", "silhouette", "nmi", "ari",
                                    "category silhouette"]  # fmt: skip
    assert table[1].startswith("embedding\t8\t24\t4\t") and len(table) == 3


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_the_picture(tmp_path: Path, suffix: str) -> None:
    """The same command draws the same bytes; other rows are another picture; nothing else is left."""
    model_of_groups(tmp_path)
    files = [f"{name}{suffix}" for name in ("one", "two", "other")]
    for file in files[:2]:
        report = looked_at("model", "--heatmap", file, "--tokens", "20", "--prefixes", "8,32")
        assert report["heatmap"] == file
    tensors = load_file("model/model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(1).contiguous()
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    looked_at("model", "--heatmap", files[2], "--tokens", "20", "--prefixes", "8,32")
    one, two, other = (Path(file).read_bytes() for file in files)
    assert one.startswith(SIGNATURES[suffix]) and one == two != other
    assert sorted(path.name for path in Path().iterdir()) == sorted(["model", *files])
    if suffix == ".png":
        refused(1, "--heatmap one.png: exists already", "model", "--heatmap", "one.png")
        assert tlt("inspect", "model", "--heatmap", "one.png", "--force", "-q", "--tokens", "5").exit_code == 0
        assert Path("one.png").read_bytes() != one


def test_names_that_a_picture_must_not_take_for_more(tmp_path: Path) -> None:
    """Dollars are no formulas, a name may be of any script, and names break no lines."""
    Path("odd.json").write_text(json.dumps({"odd": ["$", "_", "^", "\\", "\n", " ", 200], "even": ["a", "{", "}"]}))
    model_of_groups(tmp_path)
    result = tlt("inspect", "model", "--heatmap", "odd.png", "--categories", "odd.json", "--json")
    assert result.exit_code == 0 and result.stderr.splitlines()[-1] == "tlt: drawn: odd.png"
    names = {name for each in json.loads(result.stdout)["maps"] for name in each["tokens"]}
    assert names == {"$", "_", "^", "\\", "\\n", "\u2423", "0xc8", "a", "{", "}"}


def test_names_of_tokens() -> None:
    byte, words = Tokenizer("bytes", 300), words_tokenizer()
    assert [token_name(token, byte) for token in (97, 32, 10, 0, 255, 299)] == ["a", "␣", "\\n", "\\x00", "0xff", "299"]
    assert [token_name(token, words) for token in (0, 2, 4)] == ["a", "␣a", "\\n"]
    assert token_name(97, None) == "97"


def test_lengths_are_those_it_was_trained_with(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    config = json.loads(Path("model/config.json").read_text())
    for more, wanted in (
        ({}, [8, 16, 32]),
        ({"prefixes": [4, 12]}, [4, 12, 32]),
        ({"nested": {"norm": "sliced", "levels": [{"dim": 16}, {"dim": 8}]}}, [8, 16, 32]),
        ({"prefixes": "broken", "nested": 3}, [8, 16, 32]),
    ):
        Path("model/config.json").write_text(json.dumps({**config, **more}))
        assert [each["prefix"] for each in looked_at("model", "--tokens", "9")["maps"][:3]] == wanted
        assert type(transformers.AutoModelForCausalLM.from_pretrained("model")).__name__ == "LlamaForCausalLM"


def test_factors_have_prefixes_too(tmp_path: Path) -> None:
    """An embedding that is stored as factors is that of their product."""
    make_checkpoint(tmp_path / "model", "llama", True)
    result = tlt("factor", "model", "--only", "*embed_tokens*", "--rank", "4", "-q", "-o", "factored")
    assert result.exit_code == 0, result.stderr
    tlt("fold", "factored", "-q", "-o", "plain")
    one, other = (looked_at(name, "--tokens", "20", "--prefixes", "8")["maps"][0] for name in ("factored", "plain"))
    assert one["order"] == other["order"] and one["silhouette"] == pytest.approx(other["silhouette"], abs=1e-5)


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    Path("one.json").write_text(json.dumps({"x": [5]}))
    Path("eight.json").write_text(json.dumps({"8": {"x": [5, 6]}}))
    refused(2, "--heatmap out.gif: expected a name that ends in .png", "model", "--heatmap", "out.gif")
    refused(1, "no folder nowhere", "model", "--heatmap", "nowhere/out.png")
    refused(2, "a prefix of 64 is longer than the stream's 32", "model", "--prefixes", "64")
    refused(2, "--prefixes 1: expected", "model", "--prefixes", "1")
    refused(2, "--tokens 1: expected a number from 2", "model", "--tokens", "1")
    refused(2, "--tokens 5000: expected", "model", "--tokens", "5000")
    refused(1, "1 token in all categories", "model", "--categories", "one.json")
    refused(1, "prefix of 8, but --prefixes are 4", "model", "--categories", "eight.json", "--prefixes", "4")
    refused(1, "cannot read none.json", "model", "--categories", "none.json")
    refused(2, "--toml prints", "model", "--toml", "--prefixes", "8")
    refused(2, "--force says nothing without --heatmap", "model", "--force")
    refused(2, "--force says nothing without --heatmap", "model", "--prefixes", "8", "--force")
    refused(2, "--tokenizer says nothing without --prefixes, --categories, --tokens or --heatmap", "model",
            "--tokenizer", "x.json")  # fmt: skip
    save_file({"x": torch.zeros(3)}, "none.st")
    refused(1, "none.st", "none.st", "--prefixes", "8")
    tensors = load_file("model/model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] = float("nan")
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    refused(1, "model.embed_tokens.weight holds NaN", "model", "--prefixes", "8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(1, "--heatmap draws with matplotlib, which is not installed: pip install 'tlt[plot]'", "model",
            "--heatmap", "out.png")  # fmt: skip
