"""Tiny random checkpoints of every family, made and saved by stock transformers, for every law test to run on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

Maker = Callable[..., transformers.PreTrainedConfig]

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _maker(name: str, **own: Any) -> Maker:
    def make(**overrides: Any) -> transformers.PreTrainedConfig:
        config: transformers.PreTrainedConfig = getattr(transformers, name)(**{**_COMMON, **own, **overrides})
        return config

    return make


_GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 12}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

ZOO: dict[str, Maker] = {
    "llama": _maker("LlamaConfig", head_dim=8),
    "mistral": _maker("MistralConfig", head_dim=8, sliding_window=8),
    "qwen2": _maker("Qwen2Config", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": _maker("Qwen3Config", head_dim=16),
    "smollm3": _maker("SmolLM3Config", num_hidden_layers=4),
    "gemma2": _maker("Gemma2Config", **_GEMMA, num_hidden_layers=4),
    "gemma3": _maker("Gemma3TextConfig", **_GEMMA, num_hidden_layers=4, layer_types=_ALTERNATING),
    "gpt2": lambda **overrides: transformers.GPT2Config(
        **{
            "vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48,
            "bos_token_id": None, "eos_token_id": None, **overrides,
        }
    ),
}  # fmt: skip


def make_checkpoint(
    folder: Path,
    family: str,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """A checkpoint of `family` in `folder`, every tensor random; `overrides` are keys of config.json. Returns it."""
    config = ZOO[family](**{"tie_word_embeddings": tied, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomize(model, torch.Generator().manual_seed(seed))
    model.to(dtype).save_pretrained(folder)
    return folder


def _randomize(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
    """Scales at which every part matters: scores and logits spread by about 1, gains and biases far from neutral.

    Matrices keep the size of what flows through them, for a loud embedding hides errors of everything behind it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                conv1d = ".c_" in name
                fan_in = parameter.shape[0] if conv1d else parameter.shape[1]
                parameter.copy_(noise * (1.5 if "embed" in name or "wte" in name else 1.2) / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.3 * noise)  # gains start at 1, or at 0 where they are stored as 1 + w
    model.tie_weights()


class AllDouble(TorchFunctionMode):
    """Stock models make norms, rotations and softmax float32 whatever their dtype: under this mode float64 instead."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*args, **named)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Stock transformers' model of the folder, with attention written out."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    with AllDouble() if dtype == torch.float64 else nullcontext():
        model: transformers.PreTrainedModel = load(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def stock_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """ids [B, T] -> logits [B, T, V] of stock transformers loading the folder: the judge of every law.

    In float64 all of it is, so that a law can be judged far below the noise of float32, which differs by machine.
    """
    model = stock(folder, dtype)
    with AllDouble() if dtype == torch.float64 else nullcontext():
        logits: torch.Tensor = model(ids).logits
    return logits


def some_ids(vocab: int = 97, batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random ids [batch, length], long enough that windows of 8 and positions matter."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
