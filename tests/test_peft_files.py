"""PEFT loads the folders that tlt writes, tlt loads the folders that PEFT saves, and whatever is no LoRA is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import BOUND, WRONG, decoder_of, far, lora_beside, peft_around, stock, write_lora
from family_zoo import ZOO, make_checkpoint, some_ids
from growing import opened
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.errors import TltError, UsageError
from tlt_cli.model.peft_read import CONFIG, PICKLE, WEIGHTS, PeftFolder, open_peft
from tlt_cli.model.peft_write import write_peft

everywhere = pytest.mark.parametrize("family", ZOO)


def loaded_logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    decoder, prefix = decoder_of(base), opened(base).fitted.family.prefix
    decoder.adapter = open_peft(adapter, str(adapter)).load(decoder, prefix, dtype=torch.float64)
    logits: torch.Tensor = decoder(ids)
    return logits


@everywhere
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@torch.no_grad()
def test_peft_loads_ours(tmp_path: Path, family: str, rslora: bool) -> None:
    """Ranks and alphas that differ by module and layer, and by the last name alone."""
    base, ids = make_checkpoint(tmp_path / "base", family), some_ids()
    last = "c_proj" if family == "gpt2" else "down_proj"
    settings: dict[str, Any] = {"rslora": rslora, "ranks": {f"*.1.*.{last}": 7, last: 2}, "alphas": {last: 5}}
    adapter = write_lora(tmp_path, base, "adapter", **settings)
    decoder = decoder_of(base)
    plain = decoder(ids)
    decoder.adapter = lora_beside(decoder, **settings)
    expected = decoder(ids)
    assert far(plain, expected) > WRONG, "the adapter is too quiet to tell anything"
    assert far(PeftModel.from_pretrained(stock(base), str(adapter))(ids).logits, expected) < BOUND
    assert far(loaded_logits(base, adapter, ids), expected) < 1e-12


@everywhere
@torch.no_grad()
def test_ours_loads_peft(tmp_path: Path, family: str) -> None:
    base, ids = make_checkpoint(tmp_path / "base", family), some_ids()
    gpt2 = family == "gpt2"
    model = peft_around(
        base, target_modules=r".*\.(c_attn|mlp\.c_proj)" if gpt2 else r".*\.(q_proj|v_proj|mlp\.down_proj)",
        r=6, lora_alpha=5, use_rslora=True, rank_pattern={"c_attn" if gpt2 else "layers.1.self_attn.q_proj": 3},
        alpha_pattern={r".*1\.mlp\.c_proj" if gpt2 else r"layers\.\d\.mlp\.down_proj": 9},
    )  # fmt: skip
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    assert far(loaded_logits(base, tmp_path / "adapter", ids), expected) < BOUND
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    wrongs: list[dict[str, Any]] = [{"use_rslora": False}, {"alpha_pattern": {}}]
    for wrong in wrongs:
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**config, **wrong}))
        assert far(loaded_logits(base, tmp_path / "adapter", ids), expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_loaded_has_pefts_gradients(tmp_path: Path, family: str) -> None:
    """So training goes on as PEFT would. Negative control: a scale without the root of rsLoRA."""
    base, ids = make_checkpoint(tmp_path / "base", family), some_ids()
    model = peft_around(base, r=5, lora_alpha=7, use_rslora=True)
    model.save_pretrained(tmp_path / "adapter")

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    torch.autograd.backward(loss(model(ids).logits))
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}

    def farthest() -> float:
        decoder = decoder_of(base)
        lora = open_peft(tmp_path / "adapter", "").load(decoder, opened(base).fitted.family.prefix, dtype=torch.float64)
        decoder.adapter = lora
        torch.autograd.backward(loss(decoder(ids)))
        for parameter in lora.parameters():
            assert parameter.grad is not None
            parameter.data.copy_(parameter.grad)
        return max(
            far(value, wanted[f"base_model.model.{site.module}.lora_{side}.default.weight"])
            for site, _, *both in lora.matrices()
            for side, value in zip("AB", both, strict=True)
        )

    assert farthest() < BOUND
    config(use_rslora=False)(tmp_path / "adapter")
    assert farthest() > WRONG


@torch.no_grad()
def test_a_base_without_the_prefix(tmp_path: Path) -> None:
    """GPT-2's own files lack "transformer.": PEFT's names have it, tlt's modules do not."""
    base, ids = make_checkpoint(tmp_path / "base", "gpt2", tied=True), some_ids()
    values = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in values.items() if name != "lm_head.weight"}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    adapter = write_lora(tmp_path, base, "adapter", ranks={"h.0.attn.c_attn": 3})
    decoder = decoder_of(base)
    decoder.adapter = lora_beside(decoder, ranks={"h.0.attn.c_attn": 3})
    assert all(site.module.startswith("h.") for site in decoder.adapter.sites)
    assert all(name.startswith("base_model.model.transformer.h.") for name in load_file(adapter / WEIGHTS))
    assert far(PeftModel.from_pretrained(stock(base), str(adapter))(ids).logits, decoder(ids)) < BOUND
    assert far(loaded_logits(base, adapter, ids), decoder(ids)) < 1e-12


def test_written_again_it_is_the_same(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    first, second = (write_lora(tmp_path, base, name, torch.float32, ranks={"up_proj": 3}) for name in "ab")
    made, decoder = opened(base), decoder_of(base, torch.float32)
    read = open_peft(first, str(first)).load(decoder, "model.", dtype=torch.float32)
    write_peft(read, tmp_path / "c", base=made.checkpoint, prefix="model.", command="tlt train base --lora 4")
    for name in (CONFIG, WEIGHTS, "README.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    folder = open_peft(first, "first")
    assert sorted(path.name for path in first.iterdir()) == sorted([CONFIG, WEIGHTS, "README.md"])
    assert folder.base == str(base)
    assert folder.base_digest == made.checkpoint.digest() == open_checkpoint(base).digest()
    assert (first / "README.md").read_text().startswith("---\nlibrary_name: peft\n")
    with pytest.raises(TltError, match="exists already"):
        write_lora(tmp_path, base, "a")
    with pytest.raises(UsageError, match="an adapter is a folder"):
        write_lora(tmp_path, base, "a.safetensors")


def config(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        before = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**before, **keys}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS, {"format": "pt"})

    return changed


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / PICKLE)


def cut_short(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def add_head(values: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.lm_head.lora_"
    values.update({f"{name}A.weight": torch.zeros(4, 32), f"{name}B.weight": torch.zeros(97, 4)})


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
NO_LORA: dict[str, tuple[Callable[[Path], None], str]] = {
    "IA3": (config(peft_type="IA3"), "peft_type 'IA3' is not known; tlt reads 'LORA'"),
    "DoRA": (config(use_dora=True), "use_dora is True, which tlt cannot compute; wanted False"),
    "bias": (config(bias="all"), "bias is 'all', which tlt cannot compute; wanted 'none'"),
    "bias of B": (config(lora_bias=True), "lora_bias is True"),
    "whole modules": (config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "aLoRA": (config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "no JSON": (cut_short, "not valid JSON"),
    "an alpha of words": (config(lora_alpha="loud"), "lora_alpha must be a number above 0, not 'loud'"),
    "a pattern of words": (config(rank_pattern=["q_proj"]), r"rank_pattern must be an object, not \['q_proj'\]"),
    "no pattern": (config(alpha_pattern={"(": 1}), r"alpha_pattern has '\(', which is no pattern"),
    "another rank": (config(r=5), "gives model.layers.0.mlp.down_proj the rank 5, but its tensors have 4"),
    "a base that is no name": (config(base_model_name_or_path=3), "must be a name or a path, not 3"),
    "pickle": (pickled, "adapter_model.bin: refused: pickle files can run code"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "but no adapter_model.safetensors"),
    "nothing in it": (tensors(dict.clear), "holds no tensors"),
    "half of it": (tensors(lambda values: values.pop(f"{QUERY}B.weight")), "lora_A.weight but no .*lora_B.weight"),
    "a tensor left over": (
        tensors(lambda values: values.update({"base_model.model.lm_head.weight": torch.zeros(97, 32)})),
        r"base_model.model.lm_head.weight F32 \[97, 32\] is no LoRA factor of a linear layer",
    ),
    "a magnitude": (
        tensors(lambda values: values.update({f"{QUERY}magnitude_vector": torch.zeros(32)})), "is no LoRA factor",
    ),
    "factors that do not meet": (
        tensors(lambda values: values.update({f"{QUERY}B.weight": torch.zeros(32, 3)})),
        r"A \[4, 32\] and B \[32, 3\]; wanted \[r, in\] and \[out, r\]",
    ),
}  # fmt: skip
NO_FIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "the head": (tensors(add_head), "adapts lm_head, which is no linear layer of a block of the base"),
    "another width": (
        tensors(lambda values: values.update({f"{QUERY}A.weight": torch.zeros(4, 64)})),
        r"q_proj.lora_A.weight is \[4, 64\], but .*q_proj of the base needs \[4, 32\]; is this its base\?",
    ),
    "NaN": (
        tensors(lambda values: values.update({f"{QUERY}A.weight": torch.full((4, 32), torch.nan)})),
        "holds NaN or infinite values",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "base", "llama")


@pytest.mark.parametrize("fault", NO_LORA)
def test_what_is_no_lora_is_refused(tmp_path: Path, base: Path, fault: str) -> None:
    spoil, words = NO_LORA[fault]
    adapter = write_lora(tmp_path, base, "adapter", torch.float32)
    assert isinstance(open_peft(adapter, "adapter"), PeftFolder)
    spoil(adapter)
    with pytest.raises(TltError, match=words) as refused:
        open_peft(adapter, "adapter")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fault", NO_FIT)
def test_what_does_not_fit_its_base_is_refused(tmp_path: Path, base: Path, fault: str) -> None:
    spoil, words = NO_FIT[fault]
    adapter, decoder = write_lora(tmp_path, base, "adapter", torch.float32), decoder_of(base)
    open_peft(adapter, "adapter").load(decoder, "model.", dtype=torch.float32)
    spoil(adapter)
    folder = open_peft(adapter, "adapter")
    with pytest.raises(TltError, match=words):
        folder.load(decoder, "model.", dtype=torch.float32)
