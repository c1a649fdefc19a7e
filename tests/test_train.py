"""`tlt train` as a user runs it: what it writes, what it says, what it refuses, and what a kill leaves of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from adapting import decoder_of, peft_around, write_lora
from family_zoo import make_checkpoint
from growing import opened
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers
from typer.testing import CliRunner

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli import app, training, training_aim
from tlt_cli.cli.console import run
from tlt_cli.model.peft_read import open_peft
from tlt_cli.model.perplexity import windows
from tlt_cli.model.text import Tokenizer
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_files import open_tree, write_tree
from tlt_cli.model.tree_shape import Shape
from tlt_cli.training.corpus import read_streams
from tlt_cli.training.windows import Windows, targets

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHAPE = ("--context", "32", "--batch-size", "4")


def words(count: int, seed: int) -> str:
    """A text in which every word is followed by the next one, but for one in ten: there is something to learn."""
    drawn, place, found = random.Random(seed), 0, []
    for _ in range(count):
        place = drawn.randrange(10) if drawn.random() < 0.1 else (place + 1) % 10
        found.append(WORDS[place])
    return " ".join(found)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of bytes, another one, adapters of the first, and text to train and to evaluate on."""
    folder = tmp_path_factory.mktemp("models")
    make_checkpoint(folder / "model", "llama", vocab_size=256, num_hidden_layers=2)
    make_checkpoint(folder / "other", "llama", seed=1, vocab_size=256, num_hidden_layers=2)
    write_lora(folder, folder / "model", "adapter", torch.float32, rank=3, ranks={"q_proj": 2}, alphas={"up_proj": 5})
    write_some_tree(folder / "tree", folder / "model")
    (folder / "text.txt").write_text(words(2000, 0))
    (folder / "held.txt").write_text(words(200, 1))
    return folder


def write_some_tree(output: Path, base: Path) -> None:
    """A tree whose leaves differ, beside `base`."""
    tree, generator = Tree(decoder_of(base, torch.float32), Shape(depth=2, rank=2)), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in tree.b.values():
            value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    write_tree(tree, output, base=opened(base).checkpoint, command="tlt train base --lora-tree 2")


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A terminal that is none, a folder of its own, and a device that nobody measures."""
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.delenv("TLT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "peak_flops", lambda device: (1e12, "not measured"))


def tlt(*arguments: str | Path) -> Any:
    """Run a command in this process; stdout, stderr and the exit code apart. An unforeseen exception is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(*arguments: str | Path) -> dict[str, Any]:
    """A run of `tlt train` that succeeds: its report."""
    result = tlt("train", *arguments, "--json", "-q")
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(code: int, told: str, *arguments: str | Path) -> None:
    """A run that fails: one line that tells why, and the folder as it was."""
    before = content(Path())
    result = tlt("train", *arguments)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("tlt: error: ") and told in errors[0], result.stderr
    assert result.exit_code == code and result.stdout == "", result.stderr
    assert content(Path()) == before


def content(path: Path) -> dict[str, bytes]:
    """All files in a folder and below, or the one file, byte for byte."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def log(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{output}.log.jsonl").read_text().splitlines()]


def losses(output: str) -> list[float]:
    """The held-out losses in a run's log."""
    return [entry["evaluation"]["loss"] for entry in log(output) if "evaluation" in entry]


def told_of_every_step(output: str, steps: int, every: int) -> None:
    """The log has each step once, in order, and the evaluations that belong between them."""
    entries = log(output)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(steps))
    evaluated = sorted({*range(0, steps + 1, every), steps})
    assert [entry["step"] for entry in entries if "evaluation" in entry] == evaluated


@torch.no_grad()
def stock_loss(model: Any, text: Path, context: int) -> float:
    """What a stock model's loss on the bytes of a text is, nats per token."""
    rows = windows(torch.tensor(list(text.read_bytes())), context)
    logits = model.eval()(rows).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def evaluated(source: str | Path, text: Path, *more: str) -> float:
    result = tlt("eval", source, "--data", text, "--context", "32", "--json", "-q", *more)
    assert result.exit_code == 0, result.stderr
    return float(json.loads(result.stdout)["nll"])


# --- what comes out --------------------------------------------------------------------------------------------


def test_all_weights(here: Path) -> None:
    """It learns what the text has; how much, the report, `tlt eval` and stock transformers agree on."""
    report = train(
        here / "model", "--data", here / "text.txt", "--eval-data", here / "held.txt", "--steps", "30", *SHAPE,
        "--lr", "1e-2", "-o", "out",
    )  # fmt: skip
    first, *_, last = losses("out")
    assert last == report["evaluation"]["loss"] < first - 1
    assert first == pytest.approx(evaluated(here / "model", here / "held.txt"), abs=1e-6)
    assert last == pytest.approx(evaluated("out", here / "held.txt"), abs=1e-6)
    assert last == pytest.approx(stock_loss(stock(Path("out")), here / "held.txt", 32), abs=1e-4)
    assert report["path"] == "out" and report["tokens"] == 30 * 4 * 32
    assert report["trained"]["parameters"] == report["parameters"]
    lineage = open_checkpoint("out").lineage
    assert lineage is not None and lineage["operation"] == "train"
    assert lineage["parents"] == [{"source": "model", "sha256": open_checkpoint(here / "model").digest()}]
    assert lineage["command"].startswith("tlt train model --data text.txt") and str(here) not in lineage["command"]


def test_a_model_from_nothing(here: Path) -> None:
    report = train(
        "--init", "gpt2:dim=32,layers=1,heads=2", "--data", here / "text.txt", "--tokens", 2560, *SHAPE, "--lr", "1e-2",
        "-o", "out",
    )  # fmt: skip
    assert report["recipe"]["steps"] == 20 and losses("out")[-1] < losses("out")[0] - 1
    made = stock(Path("out"))
    assert type(made).__name__ == "GPT2LMHeadModel" and made.config.n_positions == 32
    assert stock_loss(made, here / "held.txt", 32) == pytest.approx(evaluated("out", here / "held.txt"), abs=1e-4)


def test_a_model_from_nothing_takes_its_tokenizer_along(here: Path) -> None:
    """Its words are the tokenizer's, and the folder made is complete: no later command needs to be told."""
    engine = Engine(models.WordLevel({word: number for number, word in enumerate(("?", *WORDS))}, unk_token="?"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save("tokenizer.json")
    train("--init", "llama:dim=32,layers=1", "--tokenizer", "tokenizer.json", "--data", here / "text.txt",
          "--steps", "9", *SHAPE, "--lr", "1e-2", "-o", "out")  # fmt: skip
    assert stock(Path("out")).config.vocab_size == 11
    assert content(Path("out"))["tokenizer.json"] == Path("tokenizer.json").read_bytes()
    assert evaluated("out", here / "held.txt") == pytest.approx(losses("out")[-1], abs=0.5) and losses("out")[0] < 2.5


@pytest.mark.parametrize("spelled", ["ten", {"content": "ten", "lstrip": False}, "eleven", None])
def test_a_model_from_nothing_knows_where_a_text_ends(here: Path, spelled: Any) -> None:
    """Where the tokenizer's own files say which token that is, and it has that token."""
    Path("words").mkdir()
    engine = Engine(models.WordLevel({word: number for number, word in enumerate(("?", *WORDS))}, unk_token="?"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save("words/tokenizer.json")
    Path("words/tokenizer_config.json").write_text(json.dumps({"eos_token": spelled}))
    for given in ("words", "words/tokenizer.json"):
        train("--init", "llama:dim=32,layers=1", "--tokenizer", given, "--data", here / "text.txt", "--steps", "1",
              *SHAPE, "-o", "out", "--force")  # fmt: skip
        config = json.loads(Path("out/config.json").read_text())
        assert config["eos_token_id"] == (10 if spelled and "eleven" not in spelled else None)
        assert content(Path("out"))["tokenizer_config.json"] == Path("words/tokenizer_config.json").read_bytes()


def test_the_same_command_writes_the_same_bytes(here: Path) -> None:
    for output, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train("--init", "llama:dim=32,layers=1", "--data", here / "text.txt", "--steps", "4", *SHAPE, "--seed", seed,
              "-o", output)  # fmt: skip
        train(here / "model", "--data", here / "text.txt", "--steps", "4", *SHAPE, "--seed", seed, "--lora", "2",
              "-o", f"{output}-lora")  # fmt: skip
    for kind in ("", "-lora"):
        one, again, other = (content(Path(f"{name}{kind}")) for name in "abc")
        assert one == again and one != other
        assert {Path(name).suffix for name in one if one[name] != other[name]} >= {".safetensors"}


def test_nothing_but_what_was_asked_for_moves(here: Path) -> None:
    """--only: bit for bit. The others are there, in the same file."""
    train(here / "model", "--data", here / "text.txt", "--steps", "3", *SHAPE, "--only", "*.1.mlp.*",
          "--only", "*.norm.*", "-o", "out.st")  # fmt: skip
    before, after = load_file(here / "model" / "model.safetensors"), load_file("out.st")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".1.mlp." in name or name == "model.norm.weight"}


@pytest.mark.parametrize("more", [(), ("--rslora", "--alpha", "4", "--target", "q_proj", "--target", "down_proj")])
def test_a_lora_is_one_of_peft(here: Path, more: tuple[str, ...]) -> None:
    """Stock PEFT loads it and has the loss of `tlt eval`, which is better than the base's; the base is as it was."""
    before = content(here / "model")
    report = train(
        here / "model", "--data", here / "text.txt", "--steps", "20", *SHAPE, "--lora", "4", *more, "-o", "out"
    )
    adapted = PeftModel.from_pretrained(stock(here / "model"), "out")
    found = stock_loss(adapted, here / "held.txt", 32)
    assert found == pytest.approx(evaluated("out", here / "held.txt", "--base", str(here / "model")), abs=1e-4)
    assert found < evaluated(here / "model", here / "held.txt") - 0.1
    own = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert report["trained"]["parameters"] == own < report["parameters"]
    assert content(here / "model") == before


def test_a_lora_is_trained_on(here: Path) -> None:
    """From the loss that it has, as PEFT would with the same optimizer, and what comes out is the same kind of LoRA.

    A folder of PEFT's own, with ranks and alphas of their own. Negative control: an adapter that begins anew."""
    peft_around(
        here / "model", r=3, lora_alpha=5, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9},
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
    ).float().save_pretrained("begun")  # fmt: skip
    before, data = content(Path("begun")), ("--data", here / "text.txt", *SHAPE, "--steps", "4", "--seed", "1")
    how = ("--warm-up", "0", "--decay", "0", "--clip", "0", "--lr", "3e-3", "--eval-data", here / "held.txt")
    base = ("--base", str(here / "model"))
    train("begun", *base, *data, *how, "-o", "out")
    train(here / "model", *data, *how, "--lora", "3", "--rslora", "--alpha", "5", "-o", "anew")
    assert losses("out")[0] == pytest.approx(evaluated("begun", here / "held.txt", *base), abs=1e-6)
    assert losses("out")[-1] == pytest.approx(evaluated("out", here / "held.txt", *base), abs=1e-6)
    assert abs(losses("anew")[0] - losses("out")[0]) > 1e-2

    peft = PeftModel.from_pretrained(stock(here / "model"), "begun", is_trainable=True)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    text = Windows(tuple(read_streams([here / "text.txt"], Tokenizer("bytes", 256))), 32, seed=1)
    for step, entry in enumerate(entry for entry in log("out") if "loss" in entry):
        batch = text.batch(4 * step, 4)
        assert batch.documents is None, "a document ends here, which stock models do not see"
        logits = peft(batch.rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets(batch).flatten())
        assert entry["loss"] == pytest.approx(float(loss.detach()), abs=2e-5), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    one, other = (open_peft(Path(name), name) for name in ("begun", "out"))
    assert (one.modules, one.alphas, one.rslora) == (other.modules, other.alphas, other.rslora)
    assert len(set(one.modules.values())) == len(set(one.alphas.values())) == 2 and content(Path("begun")) == before
    again = PeftModel.from_pretrained(stock(here / "model"), "out")
    assert stock_loss(again, here / "held.txt", 32) == pytest.approx(losses("out")[-1], abs=1e-4)
    lineage = open_checkpoint(Path("out", "adapter_model.safetensors")).lineage
    assert lineage is not None and lineage["command"].startswith("tlt train begun --data text.txt")
    assert " --base model " in lineage["command"] and str(here) not in lineage["command"]
    assert [parent["source"] for parent in lineage["parents"]] == ["model", "begun"]
    assert len({parent["sha256"] for parent in lineage["parents"]}) == 2


def test_what_an_adapter_was_made_of_is_kept(here: Path) -> None:
    """Trained on twice, the base is the first one's, and all that was done is in the record; --base is asked for where
    the base has moved, and checked."""
    data = ("--data", here / "text.txt", "--steps", "1", *SHAPE)
    train(here / "adapter", *data, "-o", "once")
    train("once", *data, "-o", "twice")
    lineage = open_checkpoint(Path("twice", "adapter_model.safetensors")).lineage
    assert lineage is not None and [step["command"].split()[2] for step in lineage["history"]] == ["base", "adapter"]
    assert lineage["parents"][0]["sha256"] == open_checkpoint(here / "model").digest()
    assert train("twice", *data, "--dry-run")["path"] == "twice-trained"
    refused(1, "was made for a base with the sha256", "once", *data, "--base", here / "other")
    refused(1, "input", "once", *data, "-o", "once", "--force")
    for adapter in ("adapter", "tree"):
        refused(2, "--only chooses", here / adapter, *data, "--only", "*")
        refused(2, "--optimizer muon", here / adapter, *data, "--optimizer", "muon")
        refused(2, "--regularizer shapes", here / adapter, *data, "--regularizer", "nuclear")
        refused(2, "--lora begins an adapter, and", here / adapter, *data, "--lora", "2")
        refused(2, "--lora-tree begins an adapter, and", here / adapter, *data, "--lora-tree", "2")
        refused(2, "an adapter is a folder", here / adapter, *data, "-o", "out.safetensors")


def test_a_tree_is_trained_on_as_it_is_served(here: Path) -> None:
    """From its hard loss, routers and all; the shape stays. Negative control: soft it is another model."""
    report = train(
        here / "tree",
        "--data",
        here / "text.txt",
        "--eval-data",
        here / "held.txt",
        "--steps",
        "20",
        *SHAPE,
        "-o",
        "out",
    )
    first = evaluated(here / "tree", here / "held.txt")
    assert losses("out")[0] == pytest.approx(first, abs=1e-6)
    assert abs(next(e["evaluation"] for e in log("out"))["soft_loss"] - first) > 1e-3
    assert report["evaluation"]["loss"] == pytest.approx(evaluated("out", here / "held.txt"), abs=1e-6)
    assert report["evaluation"]["loss"] < first - 0.1
    assert open_tree(Path("out"), "out").shape == open_tree(here / "tree", "tree").shape


def test_distillation_heals(here: Path) -> None:
    """A pupil comes closer to its teacher than the text alone brings it, on a text that neither knows."""
    noise = np.random.default_rng(0).integers(256, size=4000).astype("<u2")
    noise.tofile("noise.bin")
    data = ("--data", "noise.bin", "--steps", "20", *SHAPE, "--lr", "1e-2")
    train(here / "other", *data, "--distill", here / "model", "-o", "taught")
    train(here / "other", *data, "-o", "alone")
    told = [entry for entry in log("taught") if "loss" in entry]
    assert 0 < told[-1]["kl"] < 0.9 * told[0]["kl"] and not any("kl" in entry for entry in log("alone"))
    rows = torch.from_numpy(noise[-200:-8].astype("int64")).view(6, 32)  # what was held out
    with torch.no_grad():
        teacher, taught, alone = (stock(path)(rows).logits.log_softmax(-1) for path in
                                  (here / "model", Path("taught"), Path("alone")))  # fmt: skip
    far, near = (float((teacher.exp() * (teacher - pupil)).sum(-1)[:, :-1].mean()) for pupil in (alone, taught))
    assert near < far
    found = log("taught")[-1]["evaluation"]
    assert found["kl"] == pytest.approx(near, rel=1e-3) and found["loss"] > 2 * near


def test_a_regularizer_lowers_the_rank(here: Path) -> None:
    data = (here / "model", "--data", here / "text.txt", "--steps", "8", *SHAPE, "--lr", "1e-2")
    train(*data, "-o", "plain")
    report = train(*data, "--regularizer", "participation", "--strength", "10", "-o", "low")

    def ratio(folder: str) -> float:
        """The mean participation ratio of the matrices in the blocks."""
        found = []
        for name, tensor in load_file(f"{folder}/model.safetensors").items():
            if ".layers." in name and tensor.dim() == 2:
                energy = torch.linalg.svdvals(tensor).square()
                found.append(float(energy.sum() ** 2 / energy.square().sum()))
        return sum(found) / len(found)

    assert ratio("low") < 0.8 * ratio("plain")
    assert report["evaluation"]["participation"] == pytest.approx(ratio("low"), rel=1e-4)
    assert all({"penalty", "participation", "regularizer_share"} <= e.keys() for e in log("low") if "loss" in e)


def test_dtypes_are_the_sources_or_what_was_asked_for(here: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "half", "llama", vocab_size=256, num_hidden_layers=1, dtype=torch.bfloat16)
    data = ("--data", here / "text.txt", "--steps", "2", *SHAPE)
    train("half", *data, "-o", "same.st")
    train("half", *data, "--dtype", "float32", "-o", "wide")
    assert {info.dtype for info in open_checkpoint("same.st").tensors.values()} == {"BF16"}
    wide = open_checkpoint("wide")
    assert {info.dtype for info in wide.tensors.values()} == {"F32"} and stock(Path("wide")).dtype == torch.float32
    for name, tensor in load_file("same.st").items():
        assert torch.equal(wide.read(name).bfloat16(), tensor)


def test_several_streams(here: Path) -> None:
    """Each is evaluated by name; --mix decides how often each is read."""
    Path("noise.txt").write_bytes(bytes(np.random.default_rng(0).integers(32, 127, size=12_000, dtype=np.uint8)))
    data = (here / "model", "--data", here / "text.txt", "--data", "noise.txt", "--steps", "30", *SHAPE, "--lr", "1e-2")
    found = [train(*data, "--mix", mix, "-o", f"mix-{mix}")["evaluation"] for mix in ("30,1", "1,30")]
    assert found[0].keys() == {"loss", "loss_text", "loss_noise"}
    assert found[0]["loss_text"] < found[1]["loss_text"] - 0.2 and found[0]["loss_noise"] > found[1]["loss_noise"] + 0.2


def test_what_it_says(here: Path) -> None:
    """One path on stdout, the rest on stderr; with --json one object; a line of log for every step and evaluation."""
    arguments = ("train", here / "model", "--data", here / "text.txt", "--steps", "6", *SHAPE, "--eval-every", "4")
    plain = tlt(*arguments, "-o", "one")
    assert plain.exit_code == 0 and plain.stdout == "one\n" and "step 4 of 6: loss" in plain.stderr
    quiet = tlt(*arguments, "-o", "two", "-q")
    assert (quiet.stdout, quiet.stderr) == ("two\n", "")
    told = tlt(*arguments, "-o", "three", "--json")
    assert told.stdout.count("\n") == 1 and json.loads(told.stdout)["path"] == "three"
    told_of_every_step("one", 6, 4)
    for entry in log("one"):
        if "loss" in entry:
            assert {"norm", "rate", "tokens_per_second", "mfu", "memory"} <= entry.keys() and entry["mfu"] > 0


def test_a_dry_run_writes_nothing(here: Path) -> None:
    report = train(here / "model", "--data", here / "text.txt", "--epochs", "2", *SHAPE, "--dry-run")
    tokens = sum(stream["tokens"] for stream in report["data"]["streams"])
    assert report["dry_run"] is True and report["path"] == "model-trained" and "evaluation" not in report
    assert report["recipe"]["steps"] == pytest.approx(2 * 0.95 * tokens / 128, abs=1)
    assert content(Path()) == {}
    assert train(here / "model", "--lora", "2", "--steps", "1", "--dry-run")["path"] == "model-lora"
    assert train("--init", "llama:dim=32", "--steps", "1", "--dry-run")["path"] == "llama-trained"


# --- what is refused -------------------------------------------------------------------------------------------

USAGE: dict[str, tuple[str, ...]] = {
    "name a checkpoint to train, or --init": ("--steps", "1"),
    "one of them": ("{model}", "--init", "llama:dim=32", "--steps", "1"),
    "one of --steps, --epochs and --tokens": ("{model}",),
    "not with --steps and --epochs": ("{model}", "--steps", "1", "--epochs", "1"),
    "--batch-size and --batch-tokens": ("{model}", "--steps", "1", "--batch-size", "1", "--batch-tokens", "64"),
    "--only *.nowhere.*: no tensor's name matches": ("{model}", "--steps", "1", "--only", "*.nowhere.*"),
    "-o out.safetensors: an adapter is a folder": ("{model}", "--steps", "1", "--lora", "2", "-o", "out.safetensors"),
    "--lora and --lora-tree": ("{model}", "--steps", "1", "--lora", "2", "--lora-tree", "1"),
    "see --target": ("{model}", "--steps", "1", "--lora", "2", "--only", "*"),
    "an adapter of random weights": ("--init", "llama:dim=32", "--steps", "1", "--lora", "2"),
    "--optimizer muon is for": ("{model}", "--steps", "1", "--lora", "2", "--optimizer", "muon"),
    "--leaf-devices": ("{model}", "--steps", "1", "--lora-tree", "1", "--leaf-devices", "cpu"),
    "--mix 1,2: expected a number above 0 for each --data, 1": ("{model}", "--steps", "1", "--mix", "1,2"),
    "--mix x:": ("{model}", "--steps", "1", "--mix", "x"),
    "--mix -1:": ("{model}", "--steps", "1", "--mix=-1"),
    "--lr 0": ("{model}", "--steps", "1", "--lr", "0"),
    "--lr nan": ("{model}", "--steps", "1", "--lr", "nan"),
    "--optimizer sgd is not known": ("{model}", "--steps", "1", "--optimizer", "sgd"),
    "--schedule flat is not known": ("{model}", "--steps", "1", "--schedule", "flat"),
    "--precision half is not known": ("{model}", "--steps", "1", "--precision", "half"),
    "--held-out 1": ("{model}", "--steps", "1", "--held-out", "1"),
    "--distill-share 0": ("{model}", "--steps", "1", "--distill", "{model}", "--distill-share", "0"),
    "--epochs 0": ("{model}", "--epochs", "0"),
    "--regularizer shapes": ("{model}", "--steps", "1", "--lora", "2", "--regularizer", "nuclear"),
    "unknown": ("{model}", "--steps", "1", "--regularizer", "nucular"),
    "--dtype and --max-shard-size are of": ("{model}", "--steps", "1", "--lora", "2", "--dtype", "bfloat16"),
    "--max-shard-size": ("{model}", "--steps", "1", "--max-shard-size", "lots"),
    "--init lama": ("--init", "lama:dim=32", "--steps", "1"),
    "a vocabulary of 100, but the tokenizer has 256": ("--init", "llama:dim=32,vocab=100", "--steps", "1"),
    "--alpha": ("{model}", "--steps", "1", "--alpha", "8"),
    "--target": ("{model}", "--steps", "1", "--target", "q_proj"),
    "--rank": ("{model}", "--steps", "1", "--lora", "2", "--rank", "4"),
    "--axis": ("--init", "llama:dim=32", "--steps", "1", "--axis", "kv=2"),
    "--target-rank": ("{model}", "--steps", "1", "--target-rank", "8"),
    "no matrix has a rank above 32": ("{model}", "--steps", "1", "--regularizer", "nuclear", "--target-rank", "5000"),
    "--target-rank 32: no matrix": ("{model}", "--steps", "1", "--regularizer", "nuclear", "--target-rank", "32"),
    "--eval-tokens": ("{model}", "--steps", "1", "--eval-tokens", "0"),
}  # fmt: skip


@pytest.mark.parametrize("told", USAGE)
def test_bad_usage(here: Path, told: str) -> None:
    arguments = [word.replace("{model}", str(here / "model")) for word in USAGE[told]]
    refused(2, told, *arguments, "--data", here / "text.txt")


def test_what_decays(here: Path) -> None:
    """Adapters do not unless told; what is told counts for both."""

    def decay(*more: str) -> Any:
        report = train(here / "model", "--data", here / "text.txt", "--steps", "1", *SHAPE, "--dry-run", *more)
        return report["recipe"]["weight_decay"]

    assert (decay(), decay("--lora", "2")) == (0.1, 0.0)
    assert decay("--weight-decay", "0.3") == decay("--lora", "2", "--weight-decay", "0.3") == 0.3


def test_a_teacher_that_cannot_be(here: Path, tmp_path: Path) -> None:
    text, short = here / "text.txt", tmp_path / "short"
    make_checkpoint(short, "gpt2", vocab_size=256)
    refused(2, f"--context 65 is more than the 64 positions of {short}", here / "model", "--data", text, "--steps", "1",
            "--context", "65", "--distill", short)  # fmt: skip
    for name, order in (("forth", 1), ("back", -1)):
        make_checkpoint(tmp_path / name, "llama", vocab_size=256)
        vocabulary = {word: place for place, word in enumerate(("?", *WORDS[::order]))}
        engine = Engine(models.WordLevel(vocabulary, unk_token="?"))  # type: ignore[call-arg]
        engine.pre_tokenizer = pre_tokenizers.Whitespace()
        engine.save(str(tmp_path / name / "tokenizer.json"))
    told = ("--data", text, "--steps", "1", *SHAPE, "--distill")
    refused(1, "its tokenizer has other tokens", tmp_path / "forth", *told, tmp_path / "back")
    train(tmp_path / "forth", *told, tmp_path / "forth", "-o", "same")


def test_a_rank_that_no_matrix_has(here: Path) -> None:
    """Of a LoRA, of a tree; the same one is not refused where the matrices are larger."""
    data = (here / "model", "--data", here / "text.txt", "--steps", "1", *SHAPE)
    refused(1, "LoRA of rank 33 for", *data, "--lora", "33")
    refused(1, "--rank 33: a tree of LoRAs of that rank beside", *data, "--lora-tree", "1", "--rank", "33")
    train(*data, "--regularizer", "nuclear", "--target-rank", "31", "--dry-run")


def test_a_context_beyond_what_the_model_was_made_for(here: Path) -> None:
    """Rotary positions go on, but that is said: once, and only there."""
    data = ("train", here / "model", "--data", here / "text.txt", "--steps", "1", "--batch-size", "1", "--dry-run")
    made = json.loads((here / "model/config.json").read_text())["max_position_embeddings"]
    for context, told in ((made, 0), (made + 1, 1)):
        found = tlt(*data, "--context", str(context))
        assert found.exit_code == 0 and found.stderr.count(f"more than the {made} positions") == told


def test_a_context_that_the_model_does_not_have(here: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "gpt2", "gpt2", vocab_size=256)
    refused(2, "--context 65 is more than the model's 64 positions", "gpt2", "--data", here / "text.txt",
            "--steps", "1", "--context", "65")  # fmt: skip


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "is empty": ("data.txt", lambda path: path.write_text("")),
    "no such file": ("data.txt", lambda path: None),
    "less than one window of 32": ("data.txt", lambda path: path.write_text("a few words and no more of them")),
    "holds no ids": ("data.bin", lambda path: path.write_bytes(b"")),
    "id 999 at place 1 is not in the vocabulary of 256": (
        "data.npy", lambda path: np.save(path, np.array([1, 999] * 100)),
    ),
    "data.jsonl": ("data.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text": 3}\n')),
    "model": ("model", lambda path: path.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("told", BROKEN)
def test_data_that_cannot_be_used(here: Path, told: str) -> None:
    name, make = BROKEN[told]
    make(Path(name))
    refused(1, told, here / "model", "--data", name, "--steps", "1", *SHAPE)


def test_weights_that_cannot_be_trained(here: Path, tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path / "broken", "llama", vocab_size=256, num_hidden_layers=1)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    data = ("--data", here / "text.txt", "--steps", "1", *SHAPE)
    refused(1, "model.norm.weight holds NaN", "broken", *data)
    refused(1, "nowhere", "nowhere", *data)
    make_checkpoint(tmp_path / "words", "llama", vocab_size=97, num_hidden_layers=1)
    refused(1, "97", "words", *data)  # no tokenizer, and too few words for bytes
    refused(1, "97", here / "model", *data, "--distill", "words")


def test_integers_are_not_trained(here: Path) -> None:
    """No gradient moves codes, and their scales alone would be moved to anywhere."""
    assert tlt("factor", here / "model", "--rank", "4", "--bits", "8", "-o", "coded", "-q").exit_code == 0
    told = ("coded", "--data", here / "text.txt", "--steps", "1", *SHAPE)
    refused(1, "lowrank_a.weight and others are 8-bit integers, which no gradient moves; fold them first", *told)
    train(*told, "--lora", "2", "-o", "beside")


def test_what_exists_is_left_alone(here: Path) -> None:
    data = ("--data", here / "text.txt", "--steps", "1", *SHAPE)
    Path("mine").mkdir()
    (Path("mine") / "own.txt").write_text("mine")
    make_checkpoint(Path("out"), "llama", vocab_size=97)
    refused(1, "--force", here / "model", *data, "-o", "out")
    refused(1, "no checkpoint in it", here / "model", *data, "-o", "mine", "--force")
    refused(1, "input", here / "model", *data, "-o", here / "model", "--force")
    assert not (here / "model.log.jsonl").exists() and not (here / "model.training").exists()
    train(here / "model", *data, "-o", "out", "--force")
    assert open_checkpoint("out").lineage is not None and content(Path("mine")) == {"own.txt": b"mine"}


def test_a_loss_that_is_no_number_ends_it(here: Path) -> None:
    """What was there is there: no output, and a state from before."""
    result = tlt("train", here / "model", "--data", here / "text.txt", "--steps", "20", *SHAPE, "--lr", "1e30",
                 "--clip", "0", "--save-every", "1", "-o", "out")  # fmt: skip
    assert result.exit_code == 1 and " at step " in result.stderr and "lower rate" in result.stderr
    assert not Path("out").exists()


def test_curves_need_their_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it: one line, before anything is written."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(1, "--tensorboard needs the package tensorboard", here / "model", "--data", here / "text.txt",
            "--steps", "1", *SHAPE, "--tensorboard", "curves")  # fmt: skip


def test_out_of_memory_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(training_aim, "next_token", failing)
    result = tlt("train", here / "model", "--data", here / "text.txt", "--steps", "2", *SHAPE, "-o", "out")
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.exit_code == 1 and len(errors) == 1 and "--micro-batch 2" in errors[0], result.stderr
    assert not Path("out").exists()


# --- what is interrupted ---------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """What ends a run between two steps."""


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Start a run that ends before a step of this number."""

    def begin(step: int, *arguments: str | Path) -> None:
        def stopping(run: Any, number: int, take: Callable[..., Any] = training.take_step) -> Any:
            if number == step:
                raise Interrupted
            return take(run, number)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(training, "take_step", stopping)
            tlt("train", *arguments)

    return begin


SUBJECTS: dict[str, tuple[str, ...]] = {
    "everything": ("{model}",),
    "muon": ("{model}", "--optimizer", "muon", "--schedule", "cosine"),
    "some": ("{model}", "--only", "*.mlp.*"),
    "from nothing": ("--init", "gpt2:dim=32,layers=1,heads=2"),
    "lora": ("{model}", "--lora", "2"),
    "lora trained on": ("{adapter}",),
    "tree": ("{model}", "--lora-tree", "2", "--rank", "2"),
    "tree trained on": ("{tree}",),
    "tree of tokens": ("{model}", "--lora-tree", "2", "--rank", "2", "--route", "token", "--tree-nodes", "leaf"),
    "regularized": ("{model}", "--regularizer", "concentration", "--regularize-every", "3"),
    "distilled": ("{model}", "--distill", "{other}", "--distill-share", "0.5"),
}  # fmt: skip


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_is_resumed_ends_in_the_same_bytes(here: Path, interrupted: Callable[..., None], subject: str) -> None:
    """From a state in the middle of an epoch, with streams of several documents; twice, and with other cadences."""
    if subject == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    named = {f"{{{name}}}": str(here / name) for name in ("model", "other", "adapter", "tree")}
    arguments = (
        *(named.get(word, word) for word in SUBJECTS[subject]), "--data", here / "text.txt",
        "--data", here / "held.txt", "--separator", "ten ", "--steps", "12", *SHAPE,
        "--eval-every", "4", "--save-every", "3",
    )  # fmt: skip
    train(*arguments, "-o", "whole")
    interrupted(5, *arguments, "-o", "cut")
    assert (
        sorted(path.name for path in Path("cut.training").iterdir()) == ["step-00000003"] and not Path("cut").exists()
    )
    interrupted(10, *arguments, "-o", "cut", "--resume", "--micro-batch", "4")
    report = train(*arguments, "-o", "cut", "--resume")
    assert report["resumed_at"] == 9
    assert content(Path("cut")) == content(Path("whole"))
    told_of_every_step("cut", 12, 4)
    assert [e["loss"] for e in log("cut") if "loss" in e] == [e["loss"] for e in log("whole") if "loss" in e]
    assert losses("cut") == losses("whole")
    assert sorted(path.name for path in Path().iterdir()) == ["cut", "cut.log.jsonl", "whole", "whole.log.jsonl"]


def test_without_the_optimizers_state_it_would_be_seen(
    here: Path, interrupted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the law above: weights alone are not a state."""
    arguments = (here / "model", "--data", here / "text.txt", *SHAPE, "--steps", "6", "--save-every", "2")
    train(*arguments, "-o", "whole")
    interrupted(3, *arguments, "-o", "cut")

    def forgetful(path: Path, model: Any, optimizers: Any, load: Any = training.load_state, **more: Any) -> Any:
        found = load(path, model, optimizers, **more)
        for optimizer in optimizers:
            optimizer.state.clear()
        return found

    monkeypatch.setattr(training, "load_state", forgetful)
    assert train(*arguments, "-o", "cut", "--resume")["resumed_at"] == 2
    assert content(Path("cut"))["model.safetensors"] != content(Path("whole"))["model.safetensors"]


def test_another_recipe_does_not_go_on(here: Path, interrupted: Callable[..., None]) -> None:
    arguments = (here / "model", "--data", here / "text.txt", *SHAPE, "--save-every", "2", "-o", "out", "--resume")
    interrupted(3, *arguments, "--steps", "8")
    refused(1, "steps 8", *arguments, "--steps", "9")
    refused(1, "learning_rate 0.001", *[*arguments, "--steps", "8", "--lr", "2e-3"])
    refused(
        1, "data", *[here / "held.txt" if word == here / "text.txt" else word for word in arguments], "--steps", "8"
    )
    refused(1, "model", here / "other", *arguments[1:], "--steps", "8")
    refused(1, "steps 8", *arguments, "--steps", "8", "--lora", "2")
    refused(1, "steps 8", here / "adapter", *arguments[1:], "--steps", "8")
    Path("elsewhere").mkdir()
    make_checkpoint(Path("elsewhere/other"), "llama", seed=5, vocab_size=256, num_hidden_layers=2)
    taught = (*arguments[:-3], "-o", "taught", "--steps", "8", "--distill")
    interrupted(3, *taught, here / "other")
    refused(1, "teacher", *taught, "elsewhere/other", "--resume")
    refused(2, "unfinished run", *arguments[:-1], "--steps", "8")  # neither --resume nor --force
    report = train(*arguments, "--steps", "8", "--eval-every", "1", "--save-every", "3")
    assert report["resumed_at"] == 2  # how often it is looked at is no part of the recipe


def test_force_begins_anew(here: Path, interrupted: Callable[..., None]) -> None:
    """But not before the rest of the command is known to be sound: then the states are still there."""
    arguments = (here / "model", "--data", here / "text.txt", "--steps", "4", *SHAPE, "--save-every", "1", "-o", "out")
    interrupted(3, *arguments)
    refused(1, "no such file", *arguments, "--force", "--data", "nowhere.txt")
    refused(2, "--lr", *arguments, "--force", "--lr", "0")
    assert train(*arguments, "--force", "--seed", "1")["resumed_at"] == 0
    assert not Path("out.training").exists()
    again = train(*arguments, "--force", "--seed", "1", "--resume")
    assert again["resumed_at"] == 0 and Path("out").exists()  # nothing to go on from: all of it again


def test_a_finished_run_is_left_as_it_is(here: Path) -> None:
    arguments: tuple[Any, ...] = (
        here / "model", "--data", here / "text.txt", "--steps", "2", *SHAPE, "-o", "out", "--resume"
    )  # fmt: skip
    train(*arguments)
    before = content(Path())
    again = tlt("train", *arguments)
    assert again.exit_code == 0 and again.stdout == "out\n" and "nothing is left to do" in again.stderr
    assert content(Path()) == before
    longer = ["3" if word == "2" else word for word in arguments]
    refused(1, "exists already", *longer)  # what another command made is not this one's result
    Path("elsewhere").mkdir()
    Path("elsewhere/text.txt").write_text(words(2000, 5))
    make_checkpoint(Path("elsewhere/model"), "llama", seed=1, vocab_size=256, num_hidden_layers=2)
    for place in (0, 2):  # nor what it made of another model, or of another text of the same name
        refused(
            1, "exists already", *arguments[:place], Path("elsewhere", arguments[place].name), *arguments[place + 1 :]
        )


def test_a_damaged_state_is_named(here: Path, interrupted: Callable[..., None]) -> None:
    arguments = (here / "model", "--data", here / "text.txt", "--steps", "4", *SHAPE, "--save-every", "1", "-o", "out")
    interrupted(3, *arguments)
    held = max(Path("out.training/step-00000003").glob("*.distcp"), key=lambda path: path.stat().st_size)
    held.write_bytes(held.read_bytes()[:-2000])
    refused(1, "step-00000003", *arguments, "--resume")


# --- what is killed --------------------------------------------------------------------------------------------

KILLS = 20
Attempt = tuple[Sequence[str], int | None]


def killed(plan: Sequence[Attempt], folder: Path, text: Path) -> list[int | None]:
    """Carry out a plan of attempts in a folder, see killed.py; what became of each."""
    (folder / "plan.json").write_text(json.dumps([[*attempt] for attempt in plan]))
    (folder / "text.txt").write_text(text.read_text())
    script = Path(__file__).with_name("killed.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, env=environment, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("plan.json", "text.txt", "errors.txt"):
        (folder / name).unlink()
    found: list[int | None] = json.loads(done.stdout)
    return found


def left(folder: Path, outputs: Sequence[str]) -> Mapping[str, Any]:
    """What stands beside the outputs and their logs."""
    known = {name for output in outputs for name in (output, f"{output}.log.jsonl")}
    return {path.name: content(path) for path in folder.iterdir() if path.name not in known}


def test_killed_at_random_it_ends_in_the_same_bytes(here: Path, tmp_path: Path) -> None:
    """Twenty times in one run, and in the last moments of others: when the output is written, and states removed."""
    command = ("train", "--init", "llama:dim=16,layers=1,heads=2", "--data", "text.txt", "--context", "16", "-q",
               "--batch-size", "3")  # fmt: skip
    long, short = (*command, "--steps", "60", "--save-every", "2"), (*command, "--steps", "2", "--save-every", "1")
    drawn = random.Random(0)
    at_random: list[Attempt] = [
        ((*long, "-o", "whole"), None),
        *(((*long, "-o", "cut", "--resume"), drawn.randint(1, 40)) for _ in range(KILLS)),
        ((*long, "-o", "cut", "--resume"), None),
    ]
    moments = range(-1, -45, -3)
    at_the_end: list[Attempt] = [((*short, "-o", "short"), None)]
    for moment in moments:
        again = (*short, "-o", f"end{moment}", "--resume")
        at_the_end += [(again, moment), (again, None)]
    found = killed([*at_random, *at_the_end], tmp_path, here / "text.txt")
    assert found[1 : KILLS + 1] == [None] * KILLS and found[KILLS + 3 :: 2] == [None] * len(moments)
    assert all(count is not None for count in (found[0], found[KILLS + 1], found[KILLS + 2], *found[KILLS + 4 :: 2]))

    assert content(Path("cut")) == content(Path("whole")) and content(Path("whole"))
    told_of_every_step("cut", 60, 6)
    assert [e["loss"] for e in log("cut") if "loss" in e] == [e["loss"] for e in log("whole") if "loss" in e]
    for moment in moments:
        assert content(Path(f"end{moment}")) == content(Path("short")) and content(Path("short")), moment
        told_of_every_step(f"end{moment}", 2, 1)
    assert left(tmp_path, ["whole", "cut", "short", *(f"end{moment}" for moment in moments)]) == {}


def test_interrupted_by_hand(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: the exit code of an interrupt, and --resume goes on."""

    def stopping(run: Any, number: int, take: Callable[..., Any] = training.take_step) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return take(run, number)

    arguments = ["train", str(here / "model"), "--data", str(here / "text.txt"), "--steps", "6", *SHAPE, "-o", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", stopping)
        with pytest.raises(SystemExit) as caught:
            patch.setattr(sys, "argv", ["tlt", *arguments])
            sys.exit(run(lambda: app(prog_name="tlt", standalone_mode=False)))
        assert caught.value.code == 130
    assert train(*arguments[1:], "--resume")["resumed_at"] == 3
