"""Law 11: a tree of LoRAs routes by what came before and nothing else; soft, hard and leaf by leaf it is one model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from tlt_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tlt_cli.cli import app
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit, fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.peft_write import write_peft
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.step import Step
from tlt_cli.model.text import load_tokenizer, load_tokens
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_files import CONFIG, WEIGHTS, is_tree_folder, open_tree, write_tree
from tlt_cli.model.tree_leaf import leaf_lora
from tlt_cli.model.tree_routes import entropy, greedy, log_reach, path_nodes, unit
from tlt_cli.model.tree_shape import Schedule, Shape
from tlt_cli.model.tree_start import aim
from tlt_cli.model.weights import load_checkpoint

ROUTES, FORMS = ("running", "prefix", "token"), ("path", "leaf")
routes = pytest.mark.parametrize("route", ROUTES)
forms = pytest.mark.parametrize("form", FORMS)
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tree"), "llama")


def opened(folder: Path) -> tuple[Checkpoint, Fit]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)


def decoder_of(folder: Path, dtype: torch.dtype = torch.float64) -> Decoder:
    return load_checkpoint(*opened(folder), dtype=dtype)


def grown(decoder: Decoder, kind: type[Tree] = Tree, **shape: Any) -> Tree:
    """A tree beside the decoder in which everything matters: random B, routers of which no side starves."""
    tree = kind(decoder, Shape(**{"depth": 2, "rank": 3, "prefix": 6, **shape}), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for b in tree.b.values():
            b.copy_(0.5 * torch.randn(b.shape, generator=generator))
        tree.router.mul_(2.0)
    decoder.adapter = tree.eval()
    return tree


class LooksAhead(Tree):
    """The well-known wrong variant: the mean of the whole sequence."""

    def mean(self, x: Tensor, step: Step) -> Tensor:
        return unit(x.mean(1, keepdim=True).expand_as(x))


class LooksAround(Tree):
    """The other one: the mean over the rows of a batch."""

    def mean(self, x: Tensor, step: Step) -> Tensor:
        return unit(super().mean(x, step).mean(0, keepdim=True).expand_as(x))


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in standard deviations."""
    return float((one - other).abs().max() / other.std())


EXACT, WIDE = 1e-9, 1e-2
STOCK = 1e-4  # float32, or norms and a softmax in it


@torch.no_grad()
def later_tokens_matter(decoder: Decoder) -> float:
    ids = some_ids(length=LENGTH)
    other = ids.clone()
    other[:, 9:] = some_ids(length=LENGTH, seed=5)[:, 9:]
    return apart(decoder(other)[:, :9], decoder(ids)[:, :9])


@torch.no_grad()
def other_rows_matter(decoder: Decoder) -> float:
    ids = some_ids(batch=3, length=LENGTH)
    return max(apart(decoder(ids[row : row + 1])[0], decoder(ids)[row]) for row in range(3))


@torch.no_grad()
def neighbours_matter(decoder: Decoder) -> float:
    """How far documents packed into rows are from each of them alone."""
    ids, lengths = some_ids(length=LENGTH), ((5, 9, 10), (24,))
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    found, worst = decoder(ids, documents=documents), 0.0
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            alone = decoder(ids[row : row + 1, start : start + size])[0]
            worst = max(worst, apart(found[row, start : start + size], alone))
            start += size
    return worst


@torch.no_grad()
def pieces_matter(decoder: Decoder) -> float:
    """How far a text read through a cache, in pieces, is from the text read at once."""
    ids, cache = some_ids(length=LENGTH), decoder.new_cache()
    pieces = [decoder(piece, cache) for piece in ids.split([4, 1, 1, 11, 7], dim=1)]
    return apart(torch.cat(pieces, 1), decoder(ids))


@torch.no_grad()
def padding_matters(decoder: Decoder) -> float:
    """How far a row that starts with padding, to be as long as another, is from that row alone."""
    ids = some_ids(length=LENGTH)
    present = torch.ones_like(ids, dtype=torch.bool)
    present[0, :7] = False
    cache = decoder.new_cache()
    found = [decoder(ids[:, :15], cache, present[:, :15]), decoder(ids[:, 15:], cache, present)]
    return apart(torch.cat(found, 1)[0, 7:], decoder(ids[:1, 7:])[0])


@routes
@forms
@pytest.mark.parametrize("hard", [False, True])
def test_routing_looks_back_and_at_nothing_else(folder: Path, route: str, form: str, hard: bool) -> None:
    decoder = decoder_of(folder)
    tree = grown(decoder, route=route, form=form)
    tree.hard = hard
    for matters in (later_tokens_matter, other_rows_matter, neighbours_matter, pieces_matter, padding_matters):
        assert matters(decoder) <= EXACT, matters.__name__
    report = tree.report()
    assert sum(use > 0.02 for use in report["usage"]) > 2, "the law says nothing where all tokens go one way"


def test_the_mean_of_the_whole_sequence_looks_ahead(folder: Path) -> None:
    """The negative controls: each wrong mean breaks the law that it must, by far."""
    decoder = decoder_of(folder)
    grown(decoder, LooksAhead)
    assert min(later_tokens_matter(decoder), neighbours_matter(decoder), pieces_matter(decoder)) > WIDE
    assert other_rows_matter(decoder) <= EXACT
    grown(decoder, LooksAround)
    assert other_rows_matter(decoder) > WIDE and later_tokens_matter(decoder) <= EXACT


def test_a_prefix_decides_for_what_follows(folder: Path) -> None:
    """Behind the prefix the router's input stands still; before it, it is the running mean's."""
    decoder = decoder_of(folder)
    means = {}
    for route in ("running", "prefix"):
        tree, ids = grown(decoder, route=route), some_ids(length=LENGTH)
        step = decoder.begin(LENGTH)
        means[route] = tree.mean(decoder.embed(ids, step), step)
    assert torch.equal(means["prefix"][:, :6], means["running"][:, :6])
    assert apart(means["prefix"][:, 6:], means["prefix"][:, 5:6].expand_as(means["prefix"][:, 6:])) <= EXACT
    assert apart(means["running"][:, 6:], means["prefix"][:, 6:]) > WIDE


def test_gates_are_chances() -> None:
    logits = 3 * torch.randn(5, 7, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log, way = log_reach(logits), greedy(logits)
    assert [one.shape[-1] for one in log] == [1, 2, 4, 8, 16]
    for chances in (one.exp() for one in log):
        assert torch.allclose(chances.sum(-1), torch.ones(5, 7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert all(bool(((one == 1).sum(-1) == 1).all()) and bool((one.sum(-1) == 1).all()) for one in way)
    right = logits.sigmoid()
    for leaf in range(16):  # the product along the way, written out
        chance = torch.ones(5, 7, dtype=torch.float64)
        for node, child in zip(path_nodes(leaf, 4), path_nodes(leaf, 4)[1:], strict=False):
            chance = chance * (right[..., node] if child == 2 * node + 2 else 1 - right[..., node])
        assert torch.allclose(log[-1][..., leaf].exp(), chance, rtol=1e-12)
    # the chain rule: the entropy of the leaf is the sum of the routers' entropies, each with the chance to get there
    reach = torch.cat(log[:-1], -1).exp()
    own = -(right * right.log() + (1 - right) * (1 - right).log())
    assert torch.allclose(entropy(log[-1]) * math.log(16), (reach * own).sum(-1), rtol=1e-12)
    assert not torch.allclose(entropy(log[-1]) * math.log(16), own.sum(-1), rtol=1e-2), "unweighted it is another"
    far = log_reach(torch.tensor([200.0, -300.0, 400.0]))
    assert torch.isfinite(torch.cat(far)).all() and float(entropy(far[-1])) == 0.0


@routes
@forms
@torch.no_grad()
def test_soft_and_sure_is_hard(folder: Path, route: str, form: str) -> None:
    decoder, ids = decoder_of(folder), some_ids(length=LENGTH)
    tree = grown(decoder, route=route, form=form)
    results = {}
    for sure in (1.0, 1e6):
        tree.router.mul_(sure)
        tree.hard = False
        soft = decoder(ids)
        tree.hard = True
        results[sure] = apart(soft, decoder(ids))
    assert results[1e6] <= EXACT < WIDE < results[1.0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@forms
def test_one_pair_of_products_is_a_loop_over_nodes(tmp_path: Path, family: str, form: str) -> None:
    """The function and all gradients, against every node's LoRA computed alone."""
    decoder, ids = decoder_of(make_checkpoint(tmp_path, family)), some_ids(length=LENGTH)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    tree = grown(decoder, form=form).double().train()

    class Loop(nn.Module):
        def begin(self, x: Tensor, step: Step) -> None:
            logits = functional.linear(tree.mean(x, step), tree.router[0], tree.bias[0])
            levels = [one.exp() for one in log_reach(logits)]
            self.gates = torch.cat(levels, -1) if form == "path" else levels[-1]

        def add(self, y: Tensor, x: Tensor, role: str, layer: int) -> Tensor:
            site = next(site for site in tree.sites if site.layer == layer and role in site.roles)
            stack = next(
                key for key in tree.a if key.startswith(f"{layer}:") and role in key.partition(":")[2].split("+")
            )
            roles = stack.partition(":")[2].split("+")
            width, rank = tree.shape.nodes * tree.shape.rank, tree.shape.rank
            piece = 0 if len(site.roles) > 1 else roles.index(role)
            right = tree.a[stack][piece * width : (piece + 1) * width]
            left = tree.b[f"{layer}:{'+'.join(site.roles)}"].chunk(len(site.roles))[site.roles.index(role)]
            for node in range(tree.shape.nodes):
                cut = slice(node * rank, (node + 1) * rank)
                y = y + tree.shape.scale * self.gates[..., node, None] * (x @ right[cut].T @ left[:, cut].T)
            return y

    gradients = []
    for adapter in (tree, Loop()):
        decoder.adapter = adapter
        logits = decoder(ids)
        found = torch.autograd.grad(logits.sin().sum(), list(tree.parameters()))
        gradients.append((logits.detach(), found))
    (logits, ours), (expected, theirs) = gradients
    assert apart(logits, expected) <= EXACT
    for one, other in zip(ours, theirs, strict=True):
        assert float(other.abs().max()) > 0 and apart(one, other) <= EXACT


@torch.no_grad()
def test_nothing_changes_before_training(folder: Path) -> None:
    decoder, ids = decoder_of(folder), some_ids()
    before = decoder(ids)
    for route in ROUTES:
        decoder.adapter = Tree(decoder, Shape(route=route), seed=3)
        assert torch.equal(decoder(ids), before)
    grown(decoder)
    assert apart(decoder(ids), before) > WIDE


@routes
@torch.no_grad()
def test_locked_to_a_leaf(folder: Path, route: str) -> None:
    """A tree locked to the leaf that a prompt chose is the hard tree at the prompt's last token, if all went there."""
    decoder, ids = decoder_of(folder), some_ids(batch=1, length=LENGTH)
    tree = grown(decoder, route=route)
    chosen = tree.choose_leaf(decoder, ids[0])
    assert decoder.adapter is tree and not tree.hard and tree.report() == {}
    assert len(chosen) == (3 if route == "token" else 1)
    tree.locked = chosen if route == "token" else chosen[0]
    locked = decoder(ids)
    tree.locked = None
    tree.bias.copy_(torch.zeros_like(tree.bias))
    tree.router.zero_()
    signs = torch.full_like(tree.bias, -1.0)
    for router, leaf in enumerate(chosen):
        for node, child in zip(path_nodes(leaf, 2), path_nodes(leaf, 2)[1:], strict=False):
            signs[router, node] = 1.0 if child == 2 * node + 2 else -1.0
    tree.bias.copy_(signs)
    tree.hard = True
    assert apart(locked, decoder(ids)) <= EXACT
    tree.hard, tree.locked = False, 0 if chosen[0] else 1
    assert apart(locked, decoder(ids)) > WIDE


@forms
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_leaf_is_a_lora(tmp_path: Path, form: str, family: str) -> None:
    decoder, ids = decoder_of(make_checkpoint(tmp_path, family)), some_ids()
    tree = grown(decoder, form=form)
    found = []
    for leaf in range(4):
        decoder.adapter, tree.locked = tree, leaf
        locked = decoder(ids)
        decoder.adapter = leaf_lora(decoder, tree, leaf)
        found.append(decoder(ids))
        assert apart(found[-1], locked) <= EXACT
    assert min(apart(found[0], other) for other in found[1:]) > WIDE
    with pytest.raises(UsageError, match="leaves 0 to 3"):
        leaf_lora(decoder, tree, 4)
    with pytest.raises(TltError, match="route token"):
        leaf_lora(decoder, grown(decoder, route="token"), 0)


@forms
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_an_exported_leaf_is_the_tree_locked_to_it(tmp_path: Path, form: str, family: str) -> None:
    """Judged by stock PEFT on stock transformers."""
    base, ids = make_checkpoint(tmp_path / "base", family), some_ids()
    checkpoint, fitted = opened(base)
    decoder = load_checkpoint(checkpoint, fitted, dtype=torch.float64)
    tree = grown(decoder, form=form, targets=("c_attn", "mlp.c_*") if family == "gpt2" else ("q_proj", "mlp.*"))
    results = {}
    for leaf in (1, 2):
        decoder.adapter, tree.locked = tree, leaf
        results[leaf] = decoder(ids)
        lora = leaf_lora(decoder, tree, leaf)
        write_peft(lora, tmp_path / f"leaf{leaf}", base=checkpoint, prefix=fitted.family.prefix, command="tlt fold")
        stock = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float64, attn_implementation="eager"
        )
        found = PeftModel.from_pretrained(stock, tmp_path / f"leaf{leaf}").eval()(ids).logits
        assert apart(found, results[leaf]) <= STOCK
    assert apart(results[1], results[2]) > WIDE


@routes
@forms
@torch.no_grad()
def test_a_folder_goes_both_ways(tmp_path: Path, route: str, form: str) -> None:
    checkpoint, fitted = opened(make_checkpoint(tmp_path / "base", "gpt2"))
    decoder, ids = load_checkpoint(checkpoint, fitted), some_ids(length=LENGTH)
    tree = grown(decoder, route=route, form=form, targets=("c_attn", "c_fc"), alpha=7.5)
    tree.temperature = 0.3
    results = {}
    for tree.hard in (False, True):
        results[tree.hard] = decoder(ids)
    for name in ("one", "two"):
        write_tree(tree, tmp_path / name, base=checkpoint, command="tlt train base", details={"steps": 3})
    for file in (CONFIG, WEIGHTS, "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["README.md", WEIGHTS, CONFIG]
    assert is_tree_folder(tmp_path / "one") and not is_tree_folder(tmp_path / "base")
    folder = open_tree(tmp_path / "one", "one")
    assert folder.base_digest == checkpoint.digest() and folder.base == str(tmp_path / "base")
    assert folder.shape.data() == tree.shape.data() and folder.tensors.lineage is not None
    assert folder.tensors.lineage["details"] == {"steps": 3}
    loaded = folder.load(decoder)
    decoder.adapter = loaded
    assert loaded.hard and apart(decoder(ids), results[True]) <= STOCK
    loaded.hard = False
    assert apart(decoder(ids), results[False]) <= STOCK
    loaded.temperature = 1 / 0.3
    assert apart(decoder(ids), results[False]) > WIDE, "a forgotten temperature must show"
    with pytest.raises(TltError, match="exists"):
        write_tree(tree, tmp_path / "one", base=checkpoint, command="tlt train base")


@torch.no_grad()
def test_broken_folders(tmp_path: Path) -> None:
    checkpoint, fitted = opened(make_checkpoint(tmp_path / "base", "llama"))
    decoder = load_checkpoint(checkpoint, fitted)
    tree = grown(decoder)
    folder = tmp_path / "tree"
    write_tree(tree, folder, base=checkpoint, command="tlt train base")
    text = (folder / CONFIG).read_text()
    for old, new, words in (
        ('"depth": 2', '"depth": "2"', "depth must be a whole number, not '2'"),
        ('"depth": 2', '"depth": 40', "a tree of depth 40"),
        ('"route": "running"', '"route": "sideways"', "running, prefix, token"),
        ('"targets": []', '"targets": [3]', "targets must be names"),
        ('"rank": 3', '"rank": 3, "rank": 4', "occurs 2 times"),
    ):
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new))
        with pytest.raises(TltError, match=words):
            open_tree(folder, "tree")
    for old, new, words in (
        ('"depth": 2', '"depth": 3', r"is \[21, 32\], but a tree beside this base has \[45, 32\]"),
        ('"targets": []', '"targets": ["q_proj"]', "has no place in a tree"),
    ):
        (folder / CONFIG).write_text(text.replace(old, new))
        with pytest.raises(TltError, match=words):
            open_tree(folder, "tree").load(decoder)
    (folder / CONFIG).write_text(text)
    values = load_file(folder / WEIGHTS)
    values["router.weight"][0, 0, 0] = math.nan
    save_file(values, folder / WEIGHTS)
    with pytest.raises(TltError, match=r"router\.weight holds NaN"):
        open_tree(folder, "tree").load(decoder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(TltError, match=f"no {WEIGHTS}"):
        open_tree(folder, "tree")
    with pytest.raises(UsageError, match="without a suffix"):
        write_tree(tree, tmp_path / "tree.safetensors", base=checkpoint, command="tlt train base")


@forms
@torch.no_grad()
def test_leaves_split_in_two_that_compute_the_same(folder: Path, form: str) -> None:
    """Where a level opens the function is kept; afterwards, the negative control, the new leaves are not alike."""
    decoder, ids, steps = decoder_of(folder), some_ids(length=LENGTH), 12
    tree = grown(decoder, form=form)
    tree.schedule = Schedule(warm_up=0.5)
    if form == "path":  # what has never been in use still has the B of its start
        for b in tree.b.values():
            b[:, tree.shape.rank :] = 0
    levels, results = [], []
    for step in range(steps):
        tree.advance(step, steps)
        levels.append(tree.level)
        results.append(decoder(ids))
    assert levels == [0, 0, 0, 1, 1, 1, *[2] * 6]
    assert max(apart(one, results[0]) for one in results) <= EXACT
    for b in tree.b.values():
        b.add_(torch.randn(b.shape, generator=torch.Generator().manual_seed(7)))
    before = decoder(ids)
    tree.level = 1
    assert apart(decoder(ids), before) > WIDE


def test_a_schedule_is_a_function_of_the_step(folder: Path) -> None:
    schedule, steps = Schedule(harden=0.4, balance=0.2, soft=0.3, firm=0.7, coldest=0.25, served=0.1), 100
    assert schedule.weights(0, steps) == schedule.weights(30, steps) == (0.0, 0.2)
    assert schedule.weights(50, steps) == (pytest.approx(0.2), 0.2) and schedule.weights(99, steps) == (0.4, 0.2)
    assert schedule.temperature(0, steps) == 1.0 and schedule.temperature(50, steps) == pytest.approx(0.5)
    assert schedule.temperature(80, steps) == 0.25
    assert [schedule.straight(step, steps) for step in (0, 89, 90, 99)] == [False, False, True, True]
    decoder = decoder_of(folder)
    fresh, used = grown(decoder), grown(decoder)
    used.advance(99, steps)
    used.advance(50, steps)
    fresh.advance(50, steps)
    assert (fresh.temperature, fresh.straight, fresh.level) == (used.temperature, used.straight, used.level)


def test_served_while_it_trains(folder: Path) -> None:
    """In the last steps the value is the hard tree's and the gradient still reaches the routers."""
    decoder, ids = decoder_of(folder), some_ids(length=LENGTH)
    tree = grown(decoder).train()
    soft = decoder(ids).detach()
    tree.straight = True
    logits = decoder(ids)
    (gradient,) = torch.autograd.grad(logits.sin().sum(), [tree.router])
    tree.eval()
    tree.hard = True
    assert apart(logits.detach(), decoder(ids).detach()) <= EXACT
    assert apart(soft, logits.detach()) > WIDE and float(gradient.abs().max()) > 0


@routes
def test_what_routing_costs(folder: Path, route: str) -> None:
    """Undecided tokens cost `harden`; all on one leaf costs `balance`; decided and evenly spread costs nothing."""
    decoder, ids = decoder_of(folder), some_ids(batch=16, length=LENGTH)
    tree = grown(decoder, route=route).train()
    tree.schedule = Schedule(harden=3.0, balance=5.0, soft=0.0, firm=0.5)

    def cost(step: int) -> float:
        decoder(ids)
        found = tree.penalty(step, 100)
        assert found is not None and tree.penalty(step, 100) is None
        return found.item()

    with torch.no_grad():
        tree.router.zero_()
        assert cost(99) == pytest.approx(3.0) and cost(0) == pytest.approx(0.0, abs=1e-9)
        tree.bias.fill_(-40.0)
        assert cost(99) == pytest.approx(5.0)
        tree.bias.zero_()
    with torch.no_grad():
        for b in tree.b.values():
            b.zero_()  # the stream that routers are aimed at is that of the bare decoder
    aim(tree, decoder, ids)
    with torch.no_grad():
        tree.router.mul_(1e4)
        tree.bias.mul_(1e4)
    assert cost(99) < 0.3  # the rows of a prefix are long runs of equal tokens: they cannot be cut evenly


@routes
@torch.no_grad()
def test_aimed_routers_cut_a_text_in_even_parts(folder: Path, route: str) -> None:
    decoder, ids = decoder_of(folder), some_ids(batch=16, length=LENGTH)
    tree = grown(decoder, route=route)
    tree.hard = True
    decoder(ids)
    by_chance = tree.report()
    aim(tree, decoder, ids)
    assert decoder.adapter is tree and decoder.observe is None
    for b in tree.b.values():
        b.zero_()
    decoder(ids)
    report = tree.report()
    assert (
        report["usage"] == pytest.approx([0.25] * 4, abs=0.05 if route == "prefix" else 0.02)
        and report["dead_leaves"] == 0
    )
    assert report["effective_leaves"] == pytest.approx(4, abs=0.05)
    if route == "running":
        assert max(by_chance["usage"]) > 0.3, "a random start must show that this is not for nothing"
    twin = grown(decoder, route=route)
    aim(twin, decoder, ids)
    assert torch.equal(twin.router, tree.router) and torch.equal(twin.bias, tree.bias)


@torch.no_grad()
def test_the_report_counts_what_was_read(folder: Path) -> None:
    decoder, ids = decoder_of(folder), some_ids(batch=4, length=LENGTH)
    tree = grown(decoder)
    tree.bias.copy_(torch.tensor([[50.0, 50.0, -50.0]]))  # right, then left: leaf 2
    tree.router.zero_()
    for row in ids:
        decoder(row[None])
    report = tree.report()
    assert report["usage"] == [0, 0, 1, 0] and report["soft_usage"] == pytest.approx([0, 0, 1, 0])
    assert (report["dead_leaves"], report["effective_leaves"]) == (3, pytest.approx(1))
    assert report["entropy"] == pytest.approx(0, abs=1e-9) and tree.report() == {}
    tree.train()
    decoder(ids)
    assert tree.report() == {}, "what is trained on is not what is measured"


def test_half_precision(folder: Path) -> None:
    """Under autocast and in a bfloat16 decoder routers stay in float32: they decide as the float32 model does."""
    decoder, ids = decoder_of(folder, torch.float32), some_ids(length=LENGTH)
    tree = grown(decoder)
    with torch.no_grad():
        expected = decoder(ids)
        usage = tree.report()
        with torch.autocast("cpu", torch.bfloat16):
            found = decoder(ids)
        assert tree.report() == usage
        assert found.dtype == torch.bfloat16 and apart(found.float(), expected) < 0.5
    small = decoder_of(folder, torch.bfloat16)
    small.adapter = tree
    assert small(ids).dtype == torch.bfloat16


def test_shapes_that_cannot_be() -> None:
    for wrong, words in (
        ({"depth": 0}, "depth 0"), ({"depth": 9}, "depth 9"), ({"rank": 0}, "--rank 0"),
        ({"form": "ring"}, "path, leaf"), ({"route": "sequence"}, "running, prefix, token"),
        ({"prefix": 0}, "prefix of 0"), ({"alpha": -1.0}, "--alpha"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            Shape(**wrong)
    assert (Shape(depth=3, rank=4).nodes, Shape(depth=3, rank=4).active) == (15, 16)
    assert (Shape(depth=3, rank=4, form="leaf").nodes, Shape(depth=3, rank=4, form="leaf").active) == (8, 4)


def test_every_family_of_the_zoo(tmp_path: Path) -> None:
    for family in ZOO:
        decoder = decoder_of(make_checkpoint(tmp_path / family, family))
        before = decoder(some_ids()).detach()
        grown(decoder, route="token")
        assert apart(decoder(some_ids()).detach(), before) > WIDE
        assert later_tokens_matter(decoder) <= EXACT and pieces_matter(decoder) <= EXACT


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with enough words for bytes, a tree of each route beside it, and a text."""
    folder = tmp_path_factory.mktemp("command")
    checkpoint, fitted = opened(make_checkpoint(folder / "base", "llama", vocab_size=300))
    decoder = load_checkpoint(checkpoint, fitted)
    for route in ROUTES:
        write_tree(grown(decoder, route=route), folder / route, base=checkpoint, command="tlt train base")
    (folder / "text.txt").write_text("Ein Baum hat Zweige, und an den Zweigen hat er Blätter. " * 8)
    return folder


def tlt(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def test_a_tree_is_measured_as_it_is_served(on_disk: Path) -> None:
    """`tlt eval` routes hard; a leaf folded into the base, and as an adapter, is the model of that leaf."""
    measured = ("--data", on_disk / "text.txt", "--context", 24, "--json")
    checkpoint, fitted = opened(on_disk / "base")
    for route in ROUTES:
        found = tlt("eval", on_disk / route, *measured)
        decoder = load_checkpoint(checkpoint, fitted)
        decoder.adapter = tree = open_tree(on_disk / route, route).load(decoder)
        ids = load_tokens(load_tokenizer((), 300), [on_disk / "text.txt"]).ids
        assert found["nll"] == pytest.approx(perplexity(decoder, ids, 24)["nll"], rel=1e-6)
        tree.hard = False
        assert found["nll"] != pytest.approx(perplexity(decoder, ids, 24)["nll"], rel=1e-4)


def test_a_leaf_becomes_a_model_or_an_adapter(on_disk: Path, tmp_path: Path) -> None:
    ids, results = some_ids(vocab=300), {}
    checkpoint, fitted = opened(on_disk / "base")
    decoder = load_checkpoint(checkpoint, fitted)
    tree = open_tree(on_disk / "running", "running").load(decoder)
    for leaf in (0, 3):
        model, adapter = tmp_path / f"model{leaf}", tmp_path / f"adapter{leaf}"
        report = tlt("fold", on_disk / "running", "--leaf", leaf, "-o", model, "--json")
        assert report["path"] == str(model) and report["verification"]["relative"] < 1e-4
        report = tlt("fold", on_disk / "running", "--leaf", leaf, "--format", "peft", "-o", adapter, "--json")
        assert report["path"] == str(adapter) and report["rank"] == 9
        decoder.adapter, tree.locked = tree, leaf
        with torch.no_grad():
            results[leaf] = decoder(ids)
            assert apart(stock_logits(model, ids), results[leaf]) <= STOCK
            stock = transformers.AutoModelForCausalLM.from_pretrained(on_disk / "base", attn_implementation="eager")
            assert apart(PeftModel.from_pretrained(stock, adapter).eval()(ids).logits, results[leaf]) <= STOCK
    assert apart(results[0], results[3]) > WIDE
    for words, expected, kind in (
        (("fold", on_disk / "running"), "--leaf 0 to 3", UsageError),
        (("fold", on_disk / "running", "--leaf", 4), "leaves 0 to 3", UsageError),
        (("fold", on_disk / "token", "--leaf", 0), "route token", TltError),
        (("fold", on_disk / "base", "--leaf", 0), "--leaf goes with", UsageError),
        (("fold", on_disk / "base", "--format", "peft"), "no tree", UsageError),
        (("fold", on_disk / "running", "--leaf", 1, "--format", "tree"), "model, peft", UsageError),
        (("fold", tmp_path / "adapter0", "--leaf", 0), "is a LoRA", UsageError),
        (("grow", on_disk / "running", "--to-dim", 64), "is a tree of LoRAs", TltError),
        (("generate", on_disk / "base", "--prompt", "a", "--lock"), "--lock goes with", UsageError),
    ):  # fmt: skip
        with pytest.raises(kind, match=expected):
            tlt(*words)


def test_a_locked_tree_writes_what_its_leaf_writes(on_disk: Path, tmp_path: Path) -> None:
    """The negative control: unlocked, the same prompt goes on in another way."""
    how = ("--prompt", "Ein Baum", "--max-tokens", 40, "--temperature", 0, "--json")
    locked = tlt("generate", on_disk / "running", *how, "--lock")
    (leaf,) = locked["leaves"]
    tlt("fold", on_disk / "running", "--leaf", leaf, "-o", tmp_path / "leaf", "--json")
    assert tlt("generate", tmp_path / "leaf", *how)["text"] == locked["text"]
    assert tlt("generate", on_disk / "running", *how)["text"] != locked["text"]
    assert len(tlt("generate", on_disk / "token", *how, "--lock")["leaves"]) == 3
