"""Prefixes of the embedding: the losses against brute force, the scores by hand, and what training makes of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_zoo import ZOO, make_checkpoint, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import content, interrupted, log, refused, stock, tlt, train  # noqa: F401
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers
from torch.nn import functional

import tlt_cli
from tlt_cli.cli import training
from tlt_cli.errors import TltError, UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.text import Tokenizer
from tlt_cli.training import objective as objectives
from tlt_cli.training.categories import Categories, read_categories
from tlt_cli.training.clusters import (
    adjusted_rand,
    clustered,
    cosine_distances,
    mutual_information,
    numbered,
    silhouette,
)
from tlt_cli.training.hierarchy import EMERGENT, IMPOSED, Groups, Hierarchy, category_loss, hierarchy_objective
from tlt_cli.training.objective import Loss, next_token
from tlt_cli.training.prefixes import (
    parsed_prefixes,
    prefix_cosines,
    prefix_logits,
    shown_prefixes,
    stated_prefixes,
    usual_prefixes,
)
from tlt_cli.training.windows import IGNORED, Batch
from tlt_cli.training.world import ALONE

CPU = torch.device("cpu")
# of the alphabet by turns: nothing in a text suggests them
CATEGORIES = {"one": list("adgjmpsvy"), "two": list("behknqtwz"), "three": list("cfilorux"), "rest": list(".,;:!? 012")}
SHAPE = ("--context", "32", "--batch-size", "8", "--lr", "1e-2")
MODEL = ("--init", "llama:dim=32,layers=1,heads=2,ffn=64,tie_word_embeddings=true")


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "peak_flops", lambda device: (1e12, "not measured"))
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.chdir(tmp_path)
    Path("categories.json").write_text(json.dumps(CATEGORIES))
    # words, marks and numbers in which every character is followed by many others
    drawn = np.random.default_rng(0)
    words = ["".join(drawn.choice(list("bcdfghjklmnpqrstvwxyz")) + drawn.choice(list("aeiou")) for _ in range(2))
             for _ in range(60)]  # fmt: skip
    some = [f"{drawn.choice(words)}{drawn.choice(list('.,;:!?') + [''] * 6)}" if drawn.random() < 0.9
            else str(drawn.integers(10000)) for _ in range(3000)]  # fmt: skip
    Path("text.txt").write_text(" ".join(some))


def batch_of(rows: torch.Tensor, documents: torch.Tensor | None = None) -> Batch:
    none = torch.zeros(len(rows), dtype=torch.int64)
    return Batch(rows, documents, none, none)


# --- the losses --------------------------------------------------------------------------------------------------


def kl_by_hand(logits: torch.Tensor, wanted: torch.Tensor, labels: np.ndarray) -> float:
    """KL(uniform over the category || softmax), one row and one token after the other, in float64."""
    total = 0.0
    for row, token in zip(logits.double().tolist(), wanted.tolist(), strict=True):
        if token == IGNORED:
            continue
        group = [token] if labels[token] < 0 else np.flatnonzero(labels == labels[token]).tolist()
        most = max(row)
        whole = most + math.log(sum(math.exp(each - most) for each in row))
        total += sum((math.log(1 / len(group)) - (row[each] - whole)) / len(group) for each in group)
    return total


@settings(max_examples=25, deadline=None)
@given(vocab=st.integers(2, 20), count=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_loss_is_the_divergence_from_the_category(vocab: int, count: int, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    labels = numbered(drawn.integers(-1, count, vocab))  # some categories may be of one token
    labels[drawn.random(vocab) < 0.3] = -1
    labels[labels >= 0] = numbered(labels[labels >= 0])
    logits = torch.from_numpy(3 * drawn.normal(size=(9, vocab)))
    wanted = torch.from_numpy(drawn.integers(vocab, size=9))
    wanted[drawn.random(9) < 0.3] = IGNORED
    found = category_loss(logits, wanted, Groups.of(labels, CPU))
    assert float(found) == pytest.approx(kl_by_hand(logits, wanted, labels), abs=1e-5)


def test_the_category_alone_is_not_the_loss() -> None:
    """-log of the category's probability leaves free which of its tokens stands for it; the divergence does not."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    alike, apart_ = torch.tensor([[2.0, 2, 2, 0, 0, 0]]), torch.tensor([[2 + math.log(3), -30, -30, 0, 0, 0]])
    wanted, groups = torch.tensor([1]), Groups.of(labels, CPU)
    shares = [float(logits.softmax(-1)[0, :3].sum()) for logits in (alike, apart_)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)
    assert float(category_loss(apart_, wanted, groups)) > float(category_loss(alike, wanted, groups)) + 10
    assert float(category_loss(alike, wanted, groups)) == pytest.approx(-math.log(shares[0]), abs=1e-6)


def test_categories_of_one_token_are_the_cross_entropy() -> None:
    logits, wanted = torch.randn(7, 11), torch.randint(0, 11, (7,))
    plain = functional.cross_entropy(logits, wanted, reduction="sum")
    for labels in (np.arange(11), np.full(11, -1), np.where(np.arange(11) < 4, np.arange(11), -1)):
        assert float(category_loss(logits, wanted, Groups.of(labels, CPU))) == pytest.approx(float(plain), abs=1e-4)
    assert abs(float(category_loss(logits, wanted, Groups.of(np.arange(11) // 2, CPU)) - plain)) > 0.1


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("tied", [False, True])
def test_a_prefix_is_what_the_head_makes_of_it_alone(tmp_path: Path, family: str, tied: bool) -> None:
    """With zeros behind it; a prefix as long as the stream is the model itself. Its end, or rows laid out anew, is
    another thing."""
    if family == "gpt2" and not tied:
        pytest.skip("has no head of its own")
    decoder = tlt_cli.load(make_checkpoint(tmp_path / "model", family, tied), device="cpu", quiet=True)
    with torch.no_grad():
        x = decoder(some_ids(), read=lambda stream: decoder.normalize(stream, "final_norm"))
        whole = decoder.head(x)
        assert (prefix_logits(decoder, x, 32) - whole).abs().max() <= 1e-5 * whole.std()
        cut = torch.cat([x[..., :8], torch.zeros_like(x[..., 8:])], -1)
        wanted = decoder.head(cut)
        found = prefix_logits(decoder, x, 8)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.std()
        wrong = decoder.head(torch.cat([torch.zeros_like(x[..., 8:]), x[..., :8]], -1))
        assert (found - wrong).abs().max() > 0.1 * wanted.std()
        role = decoder.description["roles"]["embedding" if decoder.description["tied"] else "head"]["name"]
        rows = decoder.stored[f"{role}.weight"]
        cosines = functional.cosine_similarity(x[:, :, None, :8], rows[None, None, :, :8], dim=-1)
        assert (prefix_cosines(decoder, x, 8) - math.sqrt(8) * cosines).abs().max() <= 1e-5
        reshaped = rows.flatten()[: 97 * 8].view(97, 8)  # the same numbers in a row, of other tokens
        wrong = functional.cosine_similarity(x[:, :, None, :8], reshaped[None, None], dim=-1)
        assert (prefix_cosines(decoder, x, 8) - math.sqrt(8) * wrong).abs().max() > 1


def tiny(tmp_path: Path, *, unit: bool = False) -> Decoder:
    decoder = tlt_cli.load(make_checkpoint(tmp_path / "model", "llama", True), device="cpu", quiet=True)
    if unit:  # rows of length 1, and a stream of length sqrt(32): then logits are the cosines
        with torch.no_grad():
            rows = decoder.weight("model.embed_tokens.weight")
            rows.copy_(functional.normalize(rows, dim=-1))
            decoder.weight("model.norm.weight").fill_(1.0)
    return decoder


def test_at_full_width_it_is_the_cross_entropy(tmp_path: Path) -> None:
    """Of nested embeddings always; of categories of one token where lengths say nothing."""
    batch = batch_of(some_ids(), torch.tensor([[0] * 10 + [1] * 14] * 2, dtype=torch.int32))
    decoder = tiny(tmp_path).requires_grad_(False)
    plain = float(next_token(decoder, batch).nll)
    nested = hierarchy_objective([32], None)(decoder, batch)
    assert float(nested.numbers["loss_at_32"]) == pytest.approx(plain, rel=1e-5)
    assert float(nested.nll) == pytest.approx(plain, rel=1e-5)
    assert float(nested.total) == pytest.approx(2 * plain, rel=1e-5)
    alone = {32: Groups.of(np.arange(97), CPU)}
    assert abs(float(hierarchy_objective([32], alone)(decoder, batch).numbers["loss_at_32"]) - plain) > 0.1
    unit = tiny(tmp_path, unit=True).requires_grad_(False)
    found = hierarchy_objective([32], alone, weight=0.5)(unit, batch)
    assert float(found.numbers["loss_at_32"]) == pytest.approx(float(found.nll), rel=1e-4)
    assert float(found.total) == pytest.approx(1.5 * float(found.nll), rel=1e-4)


def test_chunks_and_pieces_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers and gradients where logits are made a few tokens at a time."""
    decoder, batch = tiny(tmp_path), batch_of(some_ids())
    groups = {8: Groups.of(np.arange(97) % 5, CPU)}

    def run() -> tuple[list[float], torch.Tensor]:
        decoder.zero_grad()
        loss = hierarchy_objective([8, 16], groups)(decoder, batch)
        loss.total.backward()
        gradient = decoder.weight("model.embed_tokens.weight").grad
        assert gradient is not None
        return [loss.total.item(), *map(float, loss.numbers.values())], gradient.clone()

    (whole, one), _ = run(), monkeypatch.setattr(objectives, "LOGIT_BYTES", 4 * 97 * 7)
    found, other = run()
    assert found == pytest.approx(whole, rel=1e-5) and (one - other).abs().max() <= 1e-5 * one.abs().max()
    assert (one[:, 16:].abs().max() > 0) and not torch.equal(one, torch.zeros_like(one))


# --- the scores --------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    """[0 0 1 1] and [0 0 1 2]: of 6 pairs 1 is in both, 2 and 1 are in each; entropies ln 2 and 1.5 ln 2, I = ln 2."""
    one, other = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    assert adjusted_rand(one, other) == pytest.approx((1 - 1 / 3) / (1.5 - 1 / 3))
    assert mutual_information(one, other) == pytest.approx(2 / 2.5)
    crossed = np.array([0, 1, 0, 1])
    assert adjusted_rand(one, crossed) == pytest.approx(-0.5)  # no pair together where 2/3 are by chance
    assert mutual_information(one, crossed) == pytest.approx(0.0, abs=1e-12)
    same = np.zeros(4, dtype=int)
    assert adjusted_rand(same, same) == mutual_information(same, same) == 1.0
    assert adjusted_rand(np.arange(4), np.arange(4)) == 1.0


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=40), seed=st.integers(0, 9)
)
def test_agreement_knows_no_names_and_no_order(labels: list[tuple[int, int]], seed: int) -> None:
    one, other = (np.array(each) for each in zip(*labels, strict=True))
    order = np.random.default_rng(seed).permutation(len(one))
    for score in (adjusted_rand, mutual_information):
        found = score(one, other)
        assert score(other, one) == pytest.approx(found, abs=1e-9)
        assert score(one[order], other[order]) == pytest.approx(found, abs=1e-9)
        assert score(7 - 3 * one, other**2 + other) == pytest.approx(found, abs=1e-9)
        assert score(one, one) == pytest.approx(1.0) and -1 <= found <= 1 + 1e-9


def test_chance_agrees_by_nothing() -> None:
    drawn = np.random.default_rng(0)
    one = drawn.integers(5, size=2000)
    shuffled = drawn.permutation(one)
    assert abs(adjusted_rand(one, shuffled)) < 0.02 and mutual_information(one, shuffled) < 0.02


def test_silhouette_is_that_of_rousseeuw() -> None:
    drawn = np.random.default_rng(1)
    distances = cosine_distances(drawn.normal(size=(12, 5)))
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3])  # the last one is alone
    each = []
    for row, label in enumerate(labels):
        near = {other: [distances[row, place] for place in np.flatnonzero(labels == other) if place != row]
                for other in range(4)}  # fmt: skip
        if label == 3:
            each.append(0.0)
            continue
        own = np.mean(near[label])
        nearest = min(np.mean(near[other]) for other in range(4) if other != label)
        each.append((nearest - own) / max(nearest, own))
    assert silhouette(distances, labels) == pytest.approx(np.mean(each))
    assert silhouette(distances, 9 - labels) == pytest.approx(np.mean(each))
    assert silhouette(distances, np.zeros(12, dtype=int)) == 0.0


def planted(groups: int, members: int, width: int, behind: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, width + behind] that point to the places of their groups by their first entries alone, at any length."""
    drawn = np.random.default_rng(seed)
    labels = np.repeat(np.arange(groups), members)
    centres = np.linalg.qr(drawn.normal(size=(width, width)))[0][:groups]
    rows = centres[labels] + 0.15 * drawn.normal(size=(len(labels), width))
    whole = np.concatenate([rows, 3 * drawn.normal(size=(len(labels), behind))], 1)
    return whole * np.exp(drawn.normal(size=(len(labels), 1))), labels


def test_clusters_are_found_where_they_are() -> None:
    """In the first entries, by angle: not in all of them, nor in the same numbers laid out anew."""
    rows, labels = planted(6, 10, 8, 24)
    found = clustered(rows[:, :8]).scores(labels)
    assert found["clusters"] == 6 and found["ari"] == found["nmi"] == 1.0 and found["silhouette"] > 0.7
    assert found["category_silhouette"] == pytest.approx(found["silhouette"])
    reshaped = rows.ravel()[: 60 * 8].reshape(60, 8)
    for wrong in (clustered(rows, 6, 6), clustered(reshaped, 6, 6)):
        assert wrong.scores(labels)["ari"] < 0.2
    shuffled = np.random.default_rng(0).permutation(labels)
    assert abs(clustered(rows[:, :8]).scores(shuffled)["ari"]) < 0.1
    order = clustered(rows[:, :8]).order()
    assert sorted(order) == list(range(60)) and len(list(itertools.groupby(labels[order]))) == 6
    zero = rows[:, :8].copy()
    zero[0] = 0.0
    assert np.isfinite(cosine_distances(zero)).all() and clustered(zero).labels.shape == (60,)


# --- lengths and files -------------------------------------------------------------------------------------------


def test_lengths() -> None:
    assert usual_prefixes(64) == (8, 16, 32) and usual_prefixes(5) == (2,) and usual_prefixes(3) == ()
    assert parsed_prefixes("16, 8") == (8, 16)
    for wrong in ("8,8", "1", "a", "", "8,", "-8", "1/2"):
        with pytest.raises(UsageError, match="--prefixes"):
            parsed_prefixes(wrong)
    assert stated_prefixes({"prefixes": [8, 64, 4, "x", True]}, 64) == (4, 8)
    assert stated_prefixes({"nested": {"levels": [{"dim": 32}, {"ffn": 3}, {"dim": 16}]}}, 64) == (16, 32)
    for odd in ({}, {"prefixes": 3}, {"nested": {"levels": 2}}, {"nested": [1]}, {"prefixes": []}):
        assert stated_prefixes(odd, 64) == ()
    assert shown_prefixes({}, 64) == (8, 16, 32, 64) and shown_prefixes({"prefixes": [4]}, 64) == (4, 64)
    assert shown_prefixes({}, 12) == (12,)


def words_tokenizer() -> Tokenizer:
    engine = Engine(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2, "b": 3, "Ċ": 4}, [("Ġ", "a")]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return Tokenizer("tokenizer.json", 5, engine)


def file_of(content: Any) -> Path:
    path = Path("file.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_tokens_are_named_by_text_or_id() -> None:
    found = read_categories(file_of({"one": ["Ġa", 3], "two": ["\n"]}), words_tokenizer(), vocab=5)
    assert found.flat is not None and found.flat.names == ("one", "two")
    assert found.flat.labels.tolist() == [-1, -1, 0, 0, 1]
    again = read_categories(file_of({"8": {"one": [" a", " a"]}, "16": {"x": ["b"]}}), words_tokenizer(), vocab=5)
    assert again.flat is None and again.levels[8].labels.tolist() == [-1, -1, 0, -1, -1]
    assert again.prefixes(None, (1, 2)) == (8, 16) and again.prefixes((4, 8, 16), ()) == (4, 8, 16)
    assert found.prefixes(None, (4, 8)) == (4, 8) and found.sha256 != again.sha256
    byte = read_categories(file_of({"x": ["a", "\n", 200]}), Tokenizer("bytes", 256), vocab=256)
    assert byte.flat is not None and byte.flat.tokens.tolist() == [10, 97, 200]


@pytest.mark.parametrize(
    ("content_", "told"),
    [
        ({"x": ["ab"]}, "x holds 'ab', which is 2 bytes, and every byte is a token; expected one, or ids: 97, 98"),
        ({"x": [""]}, "which is 0 bytes"),
        ({"x": ["a"], "y": ["b", "a"]}, "'a' is in x and in y; a token has one category"),
        ({"8": {"x": [97], "y": ["a"]}}, "prefix 8: 'a' is in x and in y"),
        ({"x": [256]}, "x holds token 256, but the vocabulary has 256 tokens"),
        ({"x": [-1]}, "x holds token -1"),
        ({"x": [True]}, "x holds True; expected tokens as strings or as ids"),
        ({"x": []}, "x is []; expected a list of tokens"),
        ({"8": {"x": "abc"}}, "x is 'abc'; expected a list of tokens"),
        ({"8": {"x": ["a"]}, "y": ["b"]}, "'y' holds ['b']; expected lengths of prefixes"),
        ({"half": {"x": ["a"]}}, "'half' holds"),
        ({"8": {}}, "the prefix of 8 holds no categories"),
        ({}, "holds no categories"),
        ([1], "must be an object"),
        ('{"x": ["a"], "x": ["b"]}', "'x' occurs 2 times"),
        ("{", "not valid JSON"),
    ],
)
def test_files_that_are_none(content_: Any, told: str) -> None:
    with pytest.raises(TltError) as error:
        read_categories(file_of(content_), Tokenizer("bytes", 256), vocab=256)
    assert told in str(error.value) and "file.json" in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_token_is_told_the_nearest() -> None:
    engine = Engine(models.WordLevel({"apple": 0, "pear": 1, "?": 2}, unk_token="?"))
    with pytest.raises(TltError, match=r"x holds 'appel', which is no token of t.json \(did you mean 'apple'\?\)"):
        read_categories(file_of({"x": ["appel"]}), Tokenizer("t.json", 3, engine), vocab=3)


# --- training ----------------------------------------------------------------------------------------------------


def agreement(folder: str, categories: str = "categories.json", prefix: int = 8) -> dict[str, Any]:
    result = tlt("inspect", folder, "--categories", categories, "--prefixes", prefix, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["maps"]
    return dict(found)


def test_imposed_categories_come_to_be(tmp_path: Path) -> None:
    """A prefix knows them, as it does not after plain training; other groups of the same sizes it does not know."""
    data = (*MODEL, "--data", "text.txt", "--steps", "100", *SHAPE)
    report = train(*data, "--hierarchy", "imposed:categories.json", "--prefixes", "8,16", "-o", "imposed")
    train(*data, "-o", "plain")
    evaluation = report["evaluation"]
    found, plain = agreement("imposed"), agreement("plain")
    assert found["ari"] > 0.5 and found["category_silhouette"] > 0.3
    assert plain["ari"] < 0.2 and plain["category_silhouette"] < 0
    for name in ("clusters", "silhouette", "nmi", "ari", "category_silhouette"):
        assert evaluation[f"{name}_at_8"] == pytest.approx(found[name], abs=1e-5)
    assert {"clusters_at_16", "silhouette_at_16", "loss_at_16"} <= evaluation.keys() and "ari_at_16" not in evaluation
    drawn = np.random.default_rng(0)
    every = drawn.permutation([token for tokens in CATEGORIES.values() for token in tokens]).tolist()
    shuffled = {name: [every.pop() for _ in tokens] for name, tokens in CATEGORIES.items()}
    Path("shuffled.json").write_text(json.dumps(shuffled))
    assert abs(agreement("imposed", "shuffled.json")["ari"]) < 0.2
    # what was recorded of it, and stock transformers reads it
    config = json.loads(Path("imposed/config.json").read_text())
    assert config["prefixes"] == [8, 16] and "hierarchy" not in config
    assert report["hierarchy"]["categories"] == {"8": {name: len(tokens) for name, tokens in CATEGORIES.items()}}
    assert "--hierarchy imposed:categories.json" in report["command"]
    logits = stock(Path("imposed"))(some_ids(256)).logits
    assert (logits - tlt_cli.load("imposed", device="cpu", quiet=True)(some_ids(256))).abs().max() <= 1e-4
    steps = [entry for entry in log("imposed") if "loss" in entry]
    assert steps[-1]["loss_at_8"] < steps[0]["loss_at_8"] - 0.5
    # the losses on the text held out are those of the objective
    assert evaluation["loss_at_8"] < evaluation["loss_at_16"]


def test_nested_embeddings_predict_by_themselves() -> None:
    """The head cut to a prefix reads the text better than that of a model that was trained plainly."""
    data = (*MODEL, "--data", "text.txt", "--steps", "60", *SHAPE)
    report = train(*data, "--nested-only", "embeddings", "-o", "nested")
    train(*data, "-o", "plain")
    assert report["hierarchy"] == {"kind": "embeddings", "prefixes": [4, 8, 16], "weight": 1.0}
    text = torch.tensor(list(Path("text.txt").read_bytes()[-640:])).view(-1, 32)
    found: dict[str, dict[int, float]] = {}
    for name in ("nested", "plain"):
        decoder = tlt_cli.load(name, device="cpu", quiet=True)
        with torch.no_grad():
            x = decoder(text[:, :-1], read=lambda stream, d=decoder: d.normalize(stream, "final_norm"))
            found[name] = {
                size: float(functional.cross_entropy(
                    prefix_logits(decoder, x, size).flatten(0, 1), text[:, 1:].flatten()
                )) for size in (4, 8, 16)
            }  # fmt: skip
    assert all(found["nested"][size] < found["plain"][size] - 0.3 for size in (4, 8, 16))


def hierarchy(decoder: Decoder, **more: Any) -> Hierarchy:
    return Hierarchy(
        kind=EMERGENT, prefixes=(4, 8), frequencies=np.r_[np.full(60, 3), np.zeros(37)].astype(int), device=CPU, **more
    )  # fmt: skip


def test_emergent_categories_are_those_of_the_rows(tmp_path: Path) -> None:
    """Found behind every tenth of the second half, among tokens that the text has; then they are what is learned."""
    decoder = tiny(tmp_path)
    rows, labels = planted(4, 15, 4, 28)
    with torch.no_grad():
        decoder.weight("model.embed_tokens.weight")[:60] = torch.from_numpy(rows)
    made = hierarchy(decoder)
    batch = batch_of(some_ids(60))
    before = made.objective(decoder, batch).numbers["loss_at_4"]
    found_at = []
    for step in range(20):
        old = dict(made.groups)
        made.after(decoder, step, 20, ALONE)
        if made.groups != old:
            found_at.append(step + 1)
    assert found_at == [10, 12, 14, 16, 18]
    found = made.groups[4].labels.numpy()
    assert adjusted_rand(found[:60], labels) == 1.0 and (found[60:] == -1).all()
    assert made.groups[8].labels.max() >= 3  # longer prefixes are finer: 4 to 8 categories
    assert abs(float(made.objective(decoder, batch).numbers["loss_at_4"] - before)) > 1
    scores = made.scores(decoder)
    assert scores["clusters_at_4"] == 4 and scores["silhouette_at_4"] > 0.5 > scores["silhouette_at_8"]
    # as a state holds them
    again = hierarchy(decoder)
    again.restore(json.loads(json.dumps(made.data())))
    for prefix in (4, 8):
        assert torch.equal(again.groups[prefix].labels, made.groups[prefix].labels)
    assert torch.equal(again.objective(decoder, batch).total, made.objective(decoder, batch).total)
    counted = hierarchy(decoder, counts={4: 7, 8: 9})
    counted.after(decoder, 9, 20, ALONE)
    assert [int(counted.groups[prefix].labels.max()) + 1 for prefix in (4, 8)] == [7, 9]
    given = Hierarchy(
        kind=IMPOSED, prefixes=(4,), frequencies=np.ones(97, dtype=int), device=CPU,
        given={4: Categories(("x",), np.where(np.arange(97) < 9, 0, -1))},
    )  # fmt: skip
    given.after(decoder, 9, 20, ALONE)
    assert given.data() == {} and given.groups[4].labels.tolist() == [0] * 9 + [-1] * 88


def test_of_many_tokens_the_frequent_ones_are_clustered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlt_cli.training.hierarchy.MOST_TOKENS", 5)
    monkeypatch.setattr("tlt_cli.cli.training_prefixes.MOST_TOKENS", 5)
    made = Hierarchy(kind=EMERGENT, prefixes=(4,), frequencies=np.array([0, 5, 1, 9, 2, 2, 7, 2]), device=CPU)
    assert made.tokens.tolist() == [1, 3, 4, 5, 6]
    result = tlt("train", *MODEL, "--data", "text.txt", "--steps", "2", *SHAPE, "--hierarchy", "emergent", "-o", "out")
    assert result.exit_code == 0 and "among the 5 most frequent of the text's" in result.stderr


def test_what_is_resumed_ends_in_the_same_bytes(interrupted: Callable[..., None]) -> None:  # noqa: F811
    """Categories that were found before the interruption are gone on with: those of the weights of then, not of now."""
    arguments = (*MODEL, "--data", "text.txt", "--steps", "20", *SHAPE, "--save-every", "3", "--eval-every", "10",
                 "--hierarchy", "emergent")  # fmt: skip
    train(*arguments, "-o", "whole")
    interrupted(17, *arguments, "-o", "cut")  # found behind step 14, saved behind step 15
    state = json.loads(Path("cut.training/step-00000015/state.json").read_text())
    assert state["found"].keys() == {"4", "8", "16"} and len(set(state["found"]["4"])) >= 2
    report = train(*arguments, "-o", "cut", "--resume")
    assert report["resumed_at"] == 15 and content(Path("cut")) == content(Path("whole"))
    told = [[{key: value for key, value in entry.items() if "loss" in key} for entry in log(name)]
            for name in ("whole", "cut")]  # fmt: skip
    assert told[0] == told[1] and "loss_at_4" in told[0][1]
    # without what the state holds it is another run
    interrupted(17, *arguments, "-o", "lost")
    file = Path("lost.training/step-00000015/state.json")
    file.write_text(json.dumps({**state, "found": {}}))
    train(*arguments, "-o", "lost", "--resume")
    assert content(Path("lost")) != content(Path("whole"))


def test_a_prefix_whose_loss_is_no_number_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a text's loss does: an evaluation tells of it, whatever the loss of the text is."""

    def broken(decoder: Decoder, batch: Batch) -> Loss:
        loss = next_token(decoder, batch)
        return Loss(loss.total, loss.nll, {f"loss_at_{prefix}": loss.nll * math.inf for prefix in (4, 8, 16)})

    monkeypatch.setattr(Hierarchy, "objective", staticmethod(broken))
    result = tlt("train", *MODEL, "--data", "text.txt", "--steps", "1", *SHAPE, "--hierarchy", "emergent", "-o", "out")
    assert result.exit_code == 1 and "held out of text is inf" in result.stderr and not Path("out").exists()


def test_other_categories_are_another_run(interrupted: Callable[..., None]) -> None:  # noqa: F811
    arguments = (*MODEL, "--data", "text.txt", "--steps", "6", *SHAPE, "--save-every", "2", "-o", "out",
                 "--hierarchy", "imposed:categories.json")  # fmt: skip
    interrupted(3, *arguments)
    Path("categories.json").write_text(json.dumps({"some": ["a", "b"]}))
    refused(1, "cannot go on from a run with hierarchy", *arguments, "--resume")
    Path("categories.json").write_text(json.dumps(CATEGORIES))
    assert train(*arguments, "--resume")["resumed_at"] == 2
    assert train(*arguments, "--resume")["finished"]
    Path("categories.json").write_text(json.dumps({"some": ["a", "b"]}))
    refused(1, "exists", *arguments, "--resume")


@pytest.mark.parametrize(
    ("code", "told", "more"),
    [
        (2, "--hierarchy grown: expected emergent, or imposed:FILE", ("--hierarchy", "grown")),
        (2, "--hierarchy imposed: expected", ("--hierarchy", "imposed")),
        (2, "--hierarchy emergent:4: expected", ("--hierarchy", "emergent:4")),
        (2, "--nested-only heads is not known; embeddings is", ("--nested-only", "heads")),
        (2, "give one of them", ("--nested-only", "embeddings", "--hierarchy", "emergent")),
        (2, "--prefixes says nothing without --hierarchy or --nested-only", ("--prefixes", "8")),
        (2, "--prefix-weight says nothing without", ("--prefix-weight", "2")),
        (2, "--clusters says nothing without --hierarchy", ("--clusters", "5")),
        (2, "it goes with --hierarchy emergent", ("--hierarchy", "imposed:categories.json", "--clusters", "5")),
        (2, "--clusters 1: expected", ("--hierarchy", "emergent", "--clusters", "1")),
        (2, "--clusters 5,6: 2 numbers for 3 prefixes", ("--hierarchy", "emergent", "--clusters", "5,6")),
        (2, "--clusters: 200 at a prefix of 4, but the text has", ("--hierarchy", "emergent", "--clusters", "200")),
        (2, "--prefix-weight 0.0: expected", ("--hierarchy", "emergent", "--prefix-weight", "0")),
        (2, "--prefixes 8,8: expected", ("--hierarchy", "emergent", "--prefixes", "8,8")),
        (2, "a prefix of 32 is not shorter than the stream's 32", ("--hierarchy", "emergent", "--prefixes", "8,32")),
        (1, "cannot read nothing.json: No such file", ("--hierarchy", "imposed:nothing.json")),
        (1, "prefix of 8, but --prefixes are 4", ("--hierarchy", "imposed:eight.json", "--prefixes", "4")),
        (2, "a prefix of 99 is not shorter", ("--hierarchy", "imposed:wide.json")),
        (2, "--distill and prefixes are two objectives", ("--hierarchy", "emergent", "--distill", "model")),
        (2, "train it without models inside: --nested none", ("--hierarchy", "emergent", "--nested", "1/2")),
    ],
)  # fmt: skip
def test_refused(code: int, told: str, more: tuple[str, ...]) -> None:
    Path("eight.json").write_text(json.dumps({"8": {"x": ["a"]}}))
    Path("wide.json").write_text(json.dumps({"99": {"x": ["a"]}}))
    refused(code, told, *MODEL, "--data", "text.txt", "--steps", "1", *SHAPE, "-o", "out", *more)


def test_an_embedding_that_stands_still_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama", vocab_size=256, num_hidden_layers=1)
    data = ("--steps", "1", *SHAPE, "--data", "text.txt")
    train("model", *data, "--lora", "2", "-o", "adapter")
    for source, more in (("nowhere", ("--lora", "2")), ("adapter", ())):  # before its text is looked for
        refused(2, "stands still beside an adapter", source, *data[:-1], "nowhere.txt", *more, "-o", "out",
                "--hierarchy", "emergent")  # fmt: skip
    result = tlt("train", "model", "--data", "text.txt", "--steps", "1", *SHAPE, "--hierarchy", "emergent", "-o", "out")
    assert result.exit_code == 0 and "a head of its own: the hierarchy comes to be in its rows" in result.stderr
