"""A config.json made from a few sizes is one that stock transformers builds the same model from, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import ZOO, some_ids

from tlt_cli.errors import TltError, UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.training.init import initial_config
from tlt_cli.training.saving import save
from tlt_cli.training.start import blank, new_decoder

SMALL = "dim=32,layers=2,heads=4,ffn=48"
BOUND = 2e-5  # in deviations of the logits

SPECS: dict[str, str] = {
    **{family: f"{family}:{SMALL}" for family in ZOO},
    "grouped": f"llama:{SMALL},kv_heads=2,head_dim=16",
    "keys": f"llama:{SMALL},rope_theta=100.0,tie_word_embeddings=true,attention_bias=true,mlp_bias=true",
    "windows": f"mistral:{SMALL},sliding_window=5",
    "alternating": f"gemma3:{SMALL},sliding_window=5,sliding_window_pattern=2,head_dim=12,kv_heads=1",
    "untied": f"gpt2:{SMALL},tie_word_embeddings=false",
    "unrotated": "smollm3:dim=32,layers=4,heads=4",
}


def made(spec: str, **options: int) -> dict[str, Any]:
    return initial_config(spec, **{"vocab": 97, "context": 64, **options})


def loud(config: dict[str, Any]) -> Decoder:
    """A model of this config at scales at which every part matters."""
    decoder, generator = new_decoder(blank(config)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (1.2 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3))
    return decoder


@torch.no_grad()
def stock(folder: Path, name: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits of the stock class by this name, and what it says of the weights it loaded."""
    kind = getattr(transformers, name)
    model, told = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).__class__ is kind
    return model.eval()(some_ids()).logits, told


@pytest.mark.parametrize("case", SPECS)
def test_stock_transformers_builds_the_same_model(tmp_path: Path, case: str) -> None:
    """Nothing missing, nothing left over, the same logits."""
    config = made(SPECS[case])
    decoder = loud(config)
    save(decoder.stored, tmp_path / "new", config=config, command="tlt train --init")
    found, told = stock(tmp_path / "new", config["architectures"][0])
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    with torch.no_grad():
        own = decoder(some_ids())
    assert float((own - found).abs().max() / found.std()) < BOUND and found.std() > 0.3
    assert set(json.loads((tmp_path / "new" / "config.json").read_text())) >= {"model_type", "dtype"}


@pytest.mark.parametrize("case", ["keys", "windows", "unrotated"])
def test_every_key_counts(case: str) -> None:
    """What is compared above would not agree if config.json were misread: without these keys logits are others."""
    config = made(SPECS[case])
    key, value = {
        "keys": ("rope_theta", 1e4), "windows": ("sliding_window", None), "unrotated": ("no_rope_layer_interval", 0),
    }[case]  # fmt: skip
    decoder, other = loud(config), Decoder(new_decoder(blank({**config, key: value})).description)
    other.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        own, wrong = decoder(some_ids()), other(some_ids())
    assert float((own - wrong).abs().max() / own.std()) > 1e-2


def shape(spec: str, **options: int) -> tuple[int, ...]:
    """Entries of the stream, heads, kv heads, entries of a head, neurons, layers, words."""
    data = new_decoder(blank(made(spec, **options))).description
    keys = ("hidden", "heads", "kv_heads", "head_dim", "ffn", "layers", "vocab")
    return tuple(data[key] for key in keys)


def test_sizes_that_nobody_names() -> None:
    assert shape("llama", vocab=50) == (256, 4, 4, 64, 704, 4, 50)
    assert shape("gpt2:dim=128,layers=1", vocab=50) == (128, 2, 2, 64, 512, 1, 50)
    assert shape("llama:dim=64,layers=1,vocab=60,kv-heads=1,heads=2", vocab=50) == (64, 2, 1, 32, 192, 1, 60)
    assert shape("llama:dim=64,head_dim=16,layers=1") == (64, 4, 4, 16, 192, 1, 97)
    assert shape("llama: dim=64, layers=1,") == shape("llama:dim=64,layers=1")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dim", [32, 96, 100, 200, 320, 384])
def test_heads_that_nobody_names_fit(family: str, dim: int) -> None:
    """They divide the stream, have 64 entries or fewer, and an even number of them where they are rotated."""
    hidden, heads, _, head, *_ = shape(f"{family}:dim={dim},layers=1")
    assert hidden == dim == heads * head and head <= 64
    assert head % 2 == 0 or family == "gpt2"


@pytest.mark.parametrize(("spec", "positions"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions")])
def test_the_context_is_how_far_it_sees(spec: str, positions: str) -> None:
    assert made(f"{spec}:{SMALL}", context=33)[positions] == 33


def test_a_config_may_be_a_file(tmp_path: Path) -> None:
    config = made(f"qwen3:{SMALL}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert made(str(tmp_path / "config.json")) == config


REFUSED = {
    "llama:dim=30,heads=4": "heads=4 does not divide 30",
    "gpt2:dim=30,heads=4": "heads=4 does not divide 30",
    "llama:dim=32,heads=4,kv_heads=3": "kv_heads=3 does not divide 4",
    "llama:dim=36,heads=4": "a head of 9 entries has no rotary pairs",
    "llama:dim=67": "a head of 67 entries has no rotary pairs",
    "gemma3:dim=50,heads=4,head_dim=8": "must be a multiple",
    "gpt2:dim=32,heads=4,kv_heads=2": "gpt2",
    "gpt2:dim=32,heads=4,head_dim=16": "gpt2",
    "llama:dims=64": "no size is called 'dims' (did you mean 'dim'?)",
    "llama:dim": "expected key=value, found 'dim'",
    "llama:dim=x": "dim=x is not a whole number",
    "llama:dim=0": "dim=0 is not a whole number",
    "llama:dim=-4": "dim=-4 is not a whole number",
    "llama:dim=1.5": "dim=1.5 is not a whole number",
    "llama:dim=٣": "is not a whole number",
    "lama:dim=64": "no family is called 'lama' (did you mean 'llama'?)",
    "": "no family is called ''",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_sizes_that_cannot_be(spec: str) -> None:
    """Each is one line that says what of it; those about what was typed are bad usage."""
    with pytest.raises(UsageError) as caught:
        made(spec)
    assert REFUSED[spec] in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": "unheard_of"}', None])
def test_a_file_that_is_no_config(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TltError, match=r"config\.json|no family table for 'unheard_of'") as caught:
        blank(made(str(path)))
    assert "\n" not in str(caught.value)
