"""The decoder computes what stock transformers computes, for every family, in memory, cached and streamed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits

from tlt_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tlt_cli.errors import TltError
from tlt_cli.families.fit import Fit, fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.generate import generate
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.step import frequencies
from tlt_cli.model.text import load_tokenizer, load_tokens
from tlt_cli.model.weights import load, load_checkpoint

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = DATA / "tinystories-656k"
BOUND = 2e-5

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here: the real checkpoint is not tried")
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def opened(folder: Path) -> tuple[Checkpoint, Fit]:
    checkpoint = open_checkpoint(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return checkpoint, fit(shapes, checkpoint.config)


def decoder_of(folder: Path, **options: Any) -> Decoder:
    return load_checkpoint(*opened(folder), **options)


@torch.no_grad()
def distance(folder: Path, ids: torch.Tensor) -> float:
    """Largest difference to stock transformers, in standard deviations of the logits."""
    stock = stock_logits(folder, ids)
    assert stock.std() > 0.3, "logits too quiet to tell anything"
    return float((decoder_of(folder)(ids) - stock).abs().max() / stock.std())


def rewrite(folder: Path, remove: tuple[str, ...] = (), **keys: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))
    return folder


@everywhere
@both_ways
def test_equals_stock(tmp_path: Path, family: str, tied: bool) -> None:
    measured = distance(make_checkpoint(tmp_path, family, tied), some_ids())
    print(f"{family} tied={tied}: {measured:.1e}")
    assert measured <= BOUND


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 scaling": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "dynamic, short": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "no window": ("mistral", {"sliding_window": None}),
    "window off": ("qwen2", {"use_sliding_window": False}),
    "qwen3 windows, biases": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "attention_bias": True},
    ),
    "smollm3 windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    "smollm3 listed": ("smollm3", {"no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 4}),
    "no soft caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "tight soft caps": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
    "gemma3 scaled": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    "gpt2 by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"}),
    "gpt2 unscaled": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_stock_in_every_variant(tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    assert distance(make_checkpoint(tmp_path, family, **overrides), some_ids()) <= BOUND


def test_reads_configs_of_older_releases(tmp_path: Path) -> None:
    old = ("rope_parameters", "layer_types", "dtype")
    llama = rewrite(make_checkpoint(tmp_path / "l", "llama"), old, rope_theta=300.0, rope_scaling=LLAMA3)
    assert distance(llama, some_ids()) <= BOUND
    keys = {"rope_theta": 5e3, "rope_local_base_freq": 50.0, "sliding_window_pattern": 2}
    gemma = rewrite(
        make_checkpoint(tmp_path / "g", "gemma3"), old, **keys, rope_scaling={"type": "linear", "factor": 2.0}
    )
    description = describe(opened(gemma)[1])
    assert description["ropes"]["sliding"] == {"type": "default", "theta": 50.0}
    assert description["ropes"]["full"] == {"type": "linear", "theta": 5e3, "factor": 2.0}
    gemma = rewrite(gemma, ("rope_scaling",), rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert distance(gemma, some_ids()) <= BOUND


def wrong(family: str, description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Descriptions with one thing wrong each: the well-known mistakes."""

    def changed(**keys: Any) -> dict[str, Any]:
        return {**copy.deepcopy(description), **keys}

    faults = {
        "softmax scale dropped": changed(softmax_scale=[1.0] * description["layers"]),
        "coarse epsilon": changed(epsilon=0.1),
        "other activation": changed(activation="relu"),
    }
    if description["ropes"]:
        other = {name: {**rope, "theta": rope["theta"] * 3} for name, rope in description["ropes"].items()}
        faults["wrong theta"] = changed(ropes=other)
        faults["no rotation"] = changed(rotary=[None] * description["layers"])
    if any(description["window"]):
        faults["window ignored"] = changed(window=[None] * description["layers"])
        faults["window off by one"] = changed(window=[w and w + 1 for w in description["window"]])
    if description["gain_offset"]:
        faults["gain offset dropped"] = changed(gain_offset=0.0)
    if description["embedding_scale"]:
        faults["embeddings unscaled"] = changed(embedding_scale=None)
    if "query_norm" in description["roles"]:
        kept = {role: spot for role, spot in description["roles"].items() if role != "query_norm"}
        faults["query norm skipped"] = changed(roles=kept)
    return faults


@everywhere
def test_known_mistakes_show(tmp_path: Path, family: str) -> None:
    checkpoint, fitted = opened(make_checkpoint(tmp_path, family))
    ids = some_ids()
    stock = stock_logits(tmp_path, ids)
    for fault, description in wrong(family, describe(fitted)).items():
        names = [name for name, _ in Decoder(description, device="meta").named_parameters()]
        with torch.no_grad():
            off = (load(checkpoint.read, names, description)(ids) - stock).abs().max() / stock.std()
        assert off > 100 * BOUND, f"{family}: {fault} went unnoticed ({off:.1e})"


@everywhere
@torch.no_grad()
def test_a_cache_changes_nothing(tmp_path: Path, family: str) -> None:
    decoder, ids = decoder_of(make_checkpoint(tmp_path, family)), some_ids()
    whole, cache = decoder(ids), decoder.new_cache()
    pieces = [decoder(ids[:, :9], cache), decoder(ids[:, 9:14], cache)]
    pieces += [decoder(ids[:, t : t + 1], cache) for t in range(14, ids.shape[1])]
    assert cache.length == ids.shape[1]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() / whole.std() <= BOUND


@everywhere
@both_ways
@torch.no_grad()
def test_streaming_is_the_same_bit_for_bit(
    tmp_path: Path, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlt_cli.model.decoder.HEAD_ROWS", 40)
    folder, ids = make_checkpoint(tmp_path, family, tied), some_ids()
    streaming = decoder_of(folder, stream=True)
    assert all(parameter.is_meta for parameter in streaming.parameters())
    assert torch.equal(streaming(ids), decoder_of(folder)(ids))
    assert streaming._held is None


@everywhere
@both_ways
def test_names_are_the_files_and_all_of_them_learn(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_checkpoint(tmp_path, family, tied)
    checkpoint, _ = opened(folder)
    decoder = decoder_of(folder)
    assert {name: tuple(value.shape) for name, value in decoder.state_dict().items()} == {
        name: tuple(info.shape) for name, info in checkpoint.tensors.items()
    }
    decoder.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors})
    decoder(some_ids()).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen gains"])
def test_the_gradients_are_stocks(tmp_path: Path, family: str, frozen: bool) -> None:
    """Of every weight that is trained, those behind a norm and before it; negative control: another epsilon."""
    folder, ids = make_checkpoint(tmp_path, family), some_ids()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    decoder, other = (decoder_of(folder, dtype=torch.float64) for _ in range(2))
    other.description["epsilon"] = 1e-2
    found = []
    for each in (model, decoder, other):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not (frozen and "norm" in name))
        logits = each(ids)
        torch.autograd.backward(getattr(logits, "logits", logits).square().mean())
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    stock, ours, wrong = found
    assert stock.keys() == ours.keys()

    def apart(one: dict[str, torch.Tensor]) -> float:
        return max(float((one[name] - value).abs().max() / value.abs().max()) for name, value in stock.items())

    assert apart(ours) < 1e-5 and apart(wrong) > 1e-3  # stock norms are in float32 whatever the weights are


def test_stray_names(tmp_path: Path) -> None:
    """A bare decoder's file lacks the prefix; a tied one may keep lm_head.weight alone."""
    from safetensors.torch import load_file, save_file

    folder, ids = make_checkpoint(tmp_path, "llama", tied=True), some_ids()
    expected = decoder_of(folder)(ids)
    tensors = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors.pop("embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    decoder = decoder_of(folder)
    assert "layers.0.self_attn.q_proj.weight" in decoder.state_dict() and "lm_head.weight" in decoder.state_dict()
    assert torch.equal(decoder(ids), expected)


@everywhere
@torch.no_grad()
def test_precisions(tmp_path: Path, family: str) -> None:
    folder, ids = make_checkpoint(tmp_path, family), some_ids()
    exact = decoder_of(folder, dtype=torch.float64)(ids)
    assert exact.dtype == torch.float64
    single, brain = decoder_of(folder)(ids), decoder_of(folder, dtype=torch.bfloat16)(ids)
    assert brain.dtype == torch.bfloat16
    assert (single - exact).abs().max() / exact.std() < BOUND
    assert BOUND < (brain - exact).abs().mean() / exact.std() < 0.1
    stock = stock_logits(folder, ids, torch.bfloat16).double()
    assert (brain - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()


def test_the_description_is_plain_data(tmp_path: Path) -> None:
    description = describe(opened(make_checkpoint(tmp_path, "gemma3"))[1])
    assert json.loads(json.dumps(description)) == description
    assert description["rotary"] == ["sliding", "full", "sliding", "full"]
    assert description["window"] == [8, None, 8, None]
    assert description["softmax_scale"] == [12**-0.5] * 4


def test_llama3_frequencies_follow_the_published_rule() -> None:
    rope = {
        "type": "llama3", "theta": 500.0, "factor": 8.0, "low_turns": 1.0, "high_turns": 4.0, "original_positions": 32,
    }  # fmt: skip
    for pair, got in enumerate(frequencies(rope, 16, torch.float64, torch.device("cpu")).tolist()):
        plain = 500.0 ** (-2 * pair / 16)
        wave = 2 * math.pi / plain
        smooth = (32 / wave - 1.0) / (4.0 - 1.0)
        medium = (1 - smooth) * plain / 8 + smooth * plain
        assert got == pytest.approx(plain if wave < 8 else plain / 8 if wave > 32 else medium)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs the number factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "mish"}, "'mish'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_what_it_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    folder = rewrite(make_checkpoint(tmp_path, "llama"), ("rope_parameters",), **keys)
    with pytest.raises(TltError, match=message):
        describe(opened(folder)[1])


def test_too_many_positions(tmp_path: Path) -> None:
    decoder = decoder_of(make_checkpoint(tmp_path, "gpt2"))
    assert decoder.longest == 64
    with pytest.raises(ValueError, match="65 tokens, but this model has 64 positions"):
        decoder(some_ids(length=65))
    with pytest.raises(TltError, match="64 positions"):
        perplexity(decoder, some_ids(batch=1, length=300)[0], context=65)
    assert len(list(generate(decoder, some_ids(batch=1, length=60)[0], 100))) == 5


def test_generation(tmp_path: Path) -> None:
    decoder, prompt = decoder_of(make_checkpoint(tmp_path, "gemma3")), some_ids(batch=1, length=5)[0]
    greedy = list(generate(decoder, prompt, 20, temperature=0))
    written = prompt.tolist()
    for token in greedy:
        with torch.no_grad():
            assert token == int(decoder(torch.tensor([written]))[0, -1].argmax())
        written.append(token)
    assert greedy == list(generate(decoder, prompt, 20, top_k=1, seed=5))
    assert greedy == list(generate(decoder, prompt, 20, top_p=1e-9, seed=5))
    draws = [list(generate(decoder, prompt, 20, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert list(generate(decoder, prompt, 20, temperature=0, stop_ids=[greedy[3]])) == greedy[: greedy.index(greedy[3])]
    with pytest.raises(TltError, match="no tokens"):
        generate(decoder, prompt[:0])


def test_perplexity_counts_every_position_but_the_first(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2")
    decoder, ids = decoder_of(folder), some_ids(batch=1, length=53)[0]
    log = stock_logits(folder, ids[:50].reshape(5, 10))[:, :-1].double().log_softmax(-1)
    nll = -float(log.gather(-1, ids[:50].reshape(5, 10)[:, 1:, None]).mean())
    seen: list[tuple[int, int]] = []
    result = perplexity(decoder, ids, context=10, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert result["tokens"] == 45 and seen == [(2, 5), (4, 5), (5, 5)]
    assert result["nll"] == pytest.approx(nll, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert perplexity(decoder, ids, context=64)["tokens"] == 52
    with pytest.raises(TltError, match="at least 2"):
        perplexity(decoder, ids[:1], context=64)
    with torch.no_grad():
        next(decoder.parameters()).fill_(math.nan)
    with pytest.raises(TltError, match="loss is nan"):
        perplexity(decoder, ids, context=10)


@needs_real
def test_the_real_checkpoint() -> None:
    ids = torch.randint(0, 2048, (2, 200), generator=torch.Generator().manual_seed(0))
    assert distance(REAL, ids) <= BOUND


@needs_real
def test_the_real_checkpoints_perplexity() -> None:
    """On its own text, the second half in tokens, it is the perplexity that stock transformers gives the same windows.

    A published figure would be a weaker law: it depends on how a text is cut and tokenized, by several per cent.
    """
    checkpoint, fitted = opened(REAL)
    tokens = load_tokens(load_tokenizer(checkpoint.companions, 2048), [DATA / "tinystories-samples.txt"])
    ids = tokens.ids[len(tokens.ids) // 2 :][: 64 * 256]
    stock = 0.0
    for rows in ids.reshape(-1, 16, 256):
        log = stock_logits(REAL, rows)[:, :-1].double().log_softmax(-1)
        stock -= float(log.gather(-1, rows[:, 1:, None]).sum())
    result = perplexity(load_checkpoint(checkpoint, fitted), ids, context=256, batch=16)
    assert result["tokens"] == 64 * 255
    assert result["perplexity"] == pytest.approx(math.exp(stock / (64 * 255)), rel=1e-4)
    shorter = perplexity(load_checkpoint(checkpoint, fitted), ids, context=255, batch=16)
    assert shorter["perplexity"] != pytest.approx(result["perplexity"], rel=1e-4), "other windows must show"
