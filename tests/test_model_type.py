"""A factored checkpoint is of a type of its own: transformers runs it by the code beside it, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factored import FULL, MIX, WAYS, apart, case, case_of, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import opened
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tlt_cli.cli import app
from tlt_cli.errors import TltError
from tlt_cli.model.modeling import MODELING
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.fold import fold

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
AUTO = (transformers.AutoConfig, transformers.AutoModel, transformers.AutoModelForCausalLM)
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
everywhere = pytest.mark.parametrize("family", ZOO)
pytestmark = pytest.mark.usefixtures("modules_cache")


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


def edited(folder: Path, **keys: Any) -> Path:
    """The folder with keys of config.json set, or (None) removed."""
    kept = {key: value for key, value in config(folder).items() if key not in keys}
    added = {key: value for key, value in keys.items() if value is not None}
    (folder / "config.json").write_text(json.dumps({**kept, **added}))
    return folder


@everywhere
def test_without_its_code_it_is_refused(tmp_path: Path, family: str) -> None:
    made = case(tmp_path / "source", family, WAYS["plain"])
    folder, ids = made.write(tmp_path / "factored"), some_ids()
    for auto in AUTO:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(folder, trust_remote_code=False)
    expected = remote(folder)(ids).logits
    stock = config(tmp_path / "source")
    edited(folder, model_type=stock["model_type"], architectures=stock["architectures"], auto_map=None)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] and apart(model.eval()(ids).logits, expected) > 0.1, "the dense type loads in silence"
    (folder / MODELING).unlink()
    edited(folder, model_type="tlt", architectures=None)
    for auto in AUTO:
        with pytest.raises(ValueError, match="tlt"):
            auto.from_pretrained(folder)


@everywhere
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_config_is_the_files(tmp_path: Path, family: str, tied: bool) -> None:
    """Sizes as the dense model's config tells them, every key as it was, also when transformers saves it."""
    folder = case(tmp_path / "source", family, MIX, tied=tied).write(tmp_path / "factored")
    read = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    stock = transformers.AutoConfig.from_pretrained(tmp_path / "source")
    assert type(read).__name__ == "TltConfig" and read.model_type == "tlt"
    for key in SIZES:
        assert getattr(read, key) == getattr(stock, key), key
    with pytest.raises(AttributeError, match="no nothing"):
        read.nothing  # noqa: B018
    remote(folder).save_pretrained(tmp_path / "saved")
    before, after = config(folder), config(tmp_path / "saved")
    assert {key: after.get(key) for key in before} == before
    assert after.keys() - before.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    saved = opened(tmp_path / "saved")
    assert fold(saved.fitted, saved.dtypes).config["model_type"] == config(tmp_path / "source")["model_type"]


@pytest.mark.parametrize("given", [{"eos_token_id": 5}, {"eos_token_id": None}, {}])
def test_it_ends_where_the_dense_model_ends(tmp_path: Path, given: dict[str, Any]) -> None:
    """A key that config.json lacks is the family's own; one that it sets to null is not."""
    source = make_checkpoint(tmp_path / "source", "llama")
    plain = {key: value for key, value in config(source).items() if not key.endswith("_token_id")}
    (source / "config.json").write_text(json.dumps({**plain, **given}))
    folder = case_of(opened(source), WAYS["plain"]).write(tmp_path / "factored")
    stock = transformers.AutoConfig.from_pretrained(source).eos_token_id
    assert transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).eos_token_id == stock
    assert stock == given.get("eos_token_id", transformers.LlamaConfig().eos_token_id)


@torch.no_grad()
def test_a_window_that_is_switched_off(tmp_path: Path) -> None:
    """Configs state windows that no layer has: what is cached must not be cut to them."""
    source = make_checkpoint(tmp_path / "source", "qwen2", use_sliding_window=False)
    edited(source, sliding_window=8, use_sliding_window=False, layer_types=None)
    folder, ids = case_of(opened(source), WAYS["plain"]).write(tmp_path / "factored"), some_ids()
    greedy = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    model = remote(folder)
    assert "layer_types" not in config(folder) and model.config.sliding_window == 8
    expected = model.generate(ids, use_cache=False, **greedy)
    assert torch.equal(model.generate(ids, **greedy), expected)
    model.config.layer_types = ["sliding_attention"] * 3
    assert not torch.equal(model.generate(ids, **greedy), expected), "a window in the cache must show"


@pytest.mark.parametrize("named", [True, False], ids=["architectures", "type alone"])
def test_the_dense_type_chooses_the_family(tmp_path: Path, named: bool) -> None:
    source = make_checkpoint(tmp_path / "source", "gpt2")
    if not named:
        edited(source, architectures=None)
    folder = case_of(opened(source), MIX).write(tmp_path / "factored")
    read = opened(folder)
    assert read.fitted.family.name == "gpt2"
    assert fold(read.fitted, read.dtypes).config == config(source)
    edited(folder, lowrank={**config(folder)["lowrank"], "architectures": [], "dense_model_type": "llama"})
    with pytest.raises(TltError, match="llama"):
        opened(folder)


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "scaling",
    [{**SCALED, "original_max_position_embeddings": 16}, {"type": "linear", "factor": 2.0}, None],
    ids=["llama3", "linear", "null"],
)
@torch.no_grad()
def test_scaled_rotations(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    """As checkpoints of Llama 3 spell them. Of a type that it does not know, transformers must be able to read on."""
    source = make_checkpoint(tmp_path / "source", "llama")
    edited(source, rope_parameters=None)
    said = {**config(source), "rope_theta": 100.0, "rope_scaling": scaling}
    (source / "config.json").write_text(json.dumps(said))
    folder, ids = case_of(opened(source), FULL).write(tmp_path / "factored"), some_ids()
    logits = remote(folder)(ids).logits
    assert apart(logits, stock_logits(source, ids)) <= 2e-5
    remote(folder).save_pretrained(tmp_path / "saved")
    for one in (folder, tmp_path / "saved"):
        read = opened(one)
        assert apart(load_checkpoint(read.checkpoint, read.fitted)(ids), logits) <= 2e-5
        transformers.PreTrainedConfig.from_pretrained(one)
    made = opened(folder)
    assert fold(made.fitted, made.dtypes).config == said and not config(folder).get("rope_scaling")
    if scaling is not None:
        edited(source, rope_scaling=None)
        assert apart(stock_logits(source, ids), logits) > 0.01, "scaled too little to tell anything"


OWN = {
    "architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"},
    "vocab_size": 20, "rope_scaling": {"type": "own"},
}  # fmt: skip


def tlt(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def of_no_family(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    shapes = {"conv.weight": (12, 4, 3, 3), "head": (20, 30), "scale": (7,), "body.0.weight": (40, 24)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(OWN))
    return folder, tensors


@pytest.mark.parametrize("bits", [[], ["--bits", "8"]], ids=["floats", "codes"])
def test_of_no_family_it_is_no_stock_type_either(tmp_path: Path, bits: list[str]) -> None:
    """A stock class would make up the matrices that it does not find; folded it is what it was."""
    source, before = of_no_family(tmp_path / "source")
    result = tlt("factor", source, "--rank", "5", *bits, "-o", tmp_path / "factored", "-q")
    assert result.exit_code == 0, result.stderr
    written = config(tmp_path / "factored")
    assert written["model_type"] == "tlt" and not {"architectures", "auto_map"} & written.keys()
    assert written["lowrank"]["dense_model_type"] == "own" and written["lowrank"].get("bits") == (8 if bits else None)
    for auto in AUTO:
        for trust in (True, False):
            with pytest.raises(ValueError, match="tlt"):
                auto.from_pretrained(tmp_path / "factored", trust_remote_code=trust)
    again = tlt("factor", tmp_path / "factored", "--rank", "2", "-o", tmp_path / "twice", "-q")
    assert again.exit_code == 1 and "tlt fold" in again.stderr
    folded = tlt("fold", tmp_path / "factored", "-o", tmp_path / "plain", "-q", "--json")
    assert folded.exit_code == 0, folded.stderr
    assert config(tmp_path / "plain") == OWN
    after, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "factored"))
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert torch.equal(after["scale"], before["scale"])
    for slot, name in {"conv": "conv.weight", "head": "head", "body.0": "body.0.weight"}.items():
        a, b = (stored[f"{slot}.lowrank_{side}.weight"].double() for side in "ab")
        if bits:
            assert stored[f"{slot}.lowrank_a.weight"].dtype == torch.int8
            a, b = (f * stored[f"{slot}.lowrank_{s}.scale"].double()[:, None] for f, s in ((a, "a"), (b, "b")))
        torch.testing.assert_close(after[name].flatten(1), (b @ a).float(), rtol=1e-6, atol=1e-6)
        assert (after[name] - before[name]).norm() > 0.1 * before[name].norm()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("body.0.lowrank_a.scale", None, "body.0.lowrank_a.scale is missing"),
        ("head.lowrank_b.weight", None, "head.lowrank_b.weight is missing"),
        ("head.lowrank_b.scale", torch.ones(3), "a scale for each of their rows"),
        ("head.lowrank_b.weight", torch.ones(20, 5), "expected int8 codes"),
        ("head.lowrank_b.weight", torch.ones(20, 4, dtype=torch.int8), "the rank 5"),
        ("other.lowrank_b.scale", torch.ones(3), "no such factor"),
        ("conv.weight", torch.ones(12, 4, 3, 3), "stored as factors"),
    ],
)
def test_what_no_family_knows_is_checked_before_it_is_folded(
    tmp_path: Path, name: str, value: torch.Tensor | None, says: str
) -> None:
    source, _ = of_no_family(tmp_path / "source")
    folder = tmp_path / "factored"
    assert tlt("factor", source, "--rank", "5", "--bits", "8", "-o", folder, "-q").exit_code == 0
    file = folder / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if key != name}
    save_file(kept if value is None else {**kept, name: value}, file, {"format": "pt"})
    result = tlt("fold", folder, "-o", tmp_path / "plain", "-q")
    assert result.exit_code == 1 and says in result.stderr and not (tmp_path / "plain").exists(), result.stderr


def test_sizes_of_before_that_cannot_be(tmp_path: Path) -> None:
    source, _ = of_no_family(tmp_path / "source")
    folder = tmp_path / "factored"
    assert tlt("factor", source, "--rank", "5", "-o", folder, "-q").exit_code == 0
    said = config(folder)["lowrank"]
    for wrong in (7, {"head": 7}, {"head": {"name": "head", "shape": [20, 31]}}, {"head": {"name": 1, "shape": [20]}}):
        edited(folder, lowrank={**said, "tensors": wrong})
        result = tlt("fold", folder, "-o", tmp_path / "plain", "-q")
        assert result.exit_code == 1 and "lowrank.tensors" in result.stderr and not (tmp_path / "plain").exists()


def test_the_tokenizer(tmp_path: Path) -> None:
    """It needs no code of the checkpoint, and is the one that the dense model has."""
    source, folder = DATA / "tinystories-656k", tmp_path / "factored"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    command = [sys.executable, "-m", "tlt_cli", "factor", str(source), "--rank", "8", "-o", str(folder), "-q"]
    subprocess.run(command, check=True, capture_output=True)
    stock = transformers.AutoTokenizer.from_pretrained(source)
    ids = stock("Once upon a time, there was a café.").input_ids
    for trust in (False, True):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        assert type(tokenizer) is type(stock) and tokenizer("Once upon a time, there was a café.").input_ids == ids
        assert tokenizer.eos_token_id == stock.eos_token_id
    (folder / "tokenizer.json").unlink()
    without = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert without("Once upon a time, there was a café.").input_ids != ids
