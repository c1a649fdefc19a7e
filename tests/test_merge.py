"""Law 5: merged models compute the weighted mean of their logits, and each of them comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factored import apart, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import opened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import Merged, made, merged, same_bits, taken_out, weights_of
from safetensors.torch import save_file

from tlt_cli.errors import TltError, UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.grouped import Grouped
from tlt_cli.model.weights import load_checkpoint

BOUND = 1e-5  # of the logits' deviation, float32
WRONG = 1e-1  # what a wrong variant must miss by
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
pytestmark = pytest.mark.usefixtures("modules_cache")

# Models of one family that differ in all that may differ.
UNLIKE: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {},
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40},
        {"num_hidden_layers": 5, "head_dim": 12, "rms_norm_eps": 1e-2},
        {"rope_theta": 500.0, "num_key_value_heads": 4},
    ],
    "mistral": [{}, {"num_attention_heads": 8, "num_hidden_layers": 2}, {"hidden_size": 40, "head_dim": 16}],
    "qwen2": [{}, {"hidden_size": 64}, {"num_hidden_layers": 5}],
    "qwen3": [{}, {"head_dim": 8, "num_hidden_layers": 2}, {"hidden_size": 48, "num_attention_heads": 8}],
    "smollm3": [{}, {"hidden_size": 64, "num_hidden_layers": 6}],
    "gemma2": [
        {"final_logit_softcapping": 1.0},
        {"final_logit_softcapping": 1.0, "hidden_size": 48, "head_dim": 8, "query_pre_attn_scalar": 7},
        {"final_logit_softcapping": 1.0, "num_hidden_layers": 6, "intermediate_size": 80},
    ],
    "gemma3": [{}, {"hidden_size": 48, "head_dim": 8, "query_pre_attn_scalar": 7}, {"intermediate_size": 80}],
    "gpt2": [{}, {"n_embd": 48, "n_head": 6, "n_inner": None}, {"n_layer": 2, "n_head": 8, "n_positions": 128}],
}  # fmt: skip


@torch.no_grad()
def missed(made_of: Merged, decoder: Decoder) -> float:
    """How far a decoder is from the mean of the models, in deviations of the logits."""
    return apart(decoder(some_ids()), made_of.mean())


def run(folder: Path, **options: Any) -> Decoder:
    source = opened(folder)
    return load_checkpoint(source.checkpoint, source.fitted, **options)


@everywhere
@both_ways
@torch.no_grad()
def test_it_computes_the_mean(tmp_path: Path, family: str, tied: bool) -> None:
    one = merged(tmp_path / "merged", made(tmp_path, family, tied, [{}, {}, {}]), [0.5, 0.3, 0.2])
    assert missed(one, run(one.folder)) <= BOUND
    assert missed(one, run(one.folder, stream=True)) <= BOUND
    assert apart(remote(one.folder)(some_ids()).logits, one.mean()) <= BOUND
    plain = Merged(one.parts, (1 / 3,) * 3, one.plan, one.folder)
    assert missed(plain, run(one.folder)) >= WRONG, "weights must matter"


@everywhere
@both_ways
@torch.no_grad()
def test_unlike_models(tmp_path: Path, family: str, tied: bool) -> None:
    """Widths, heads, depths, rotations and epsilons are each model's own; what fills them up reads and says nothing."""
    one = merged(tmp_path / "merged", made(tmp_path, family, tied, UNLIKE[family]))
    assert missed(one, run(one.folder)) <= BOUND
    assert missed(one, run(one.folder, stream=True)) <= BOUND
    assert apart(remote(one.folder)(some_ids()).logits, one.mean()) <= BOUND
    source = opened(one.folder)
    for number, part in enumerate(one.parts):
        back = taken_out(source, number, tmp_path / f"back{number}")
        assert same_bits(back.folder, part.folder)
        assert back.checkpoint.config == part.checkpoint.config


@pytest.mark.parametrize("count", [2, 3, 4])
@everywhere
@both_ways
def test_each_comes_back_bit_for_bit(tmp_path: Path, family: str, tied: bool, count: int) -> None:
    """Also where K is no power of two: weights are not multiplied into anything."""
    parts = made(tmp_path, family, tied, [{"dtype": torch.bfloat16}] * count)
    one = merged(tmp_path / "merged", parts)
    source, size = opened(one.folder), sum(tensor.numel() for tensor in weights_of(one.folder).values())
    assert size == sum(tensor.numel() for part in parts for tensor in weights_of(part.folder).values())
    for number, part in enumerate(parts):
        assert same_bits(taken_out(source, number, tmp_path / f"back{number}").folder, part.folder)
    assert not same_bits(tmp_path / "back0", parts[1].folder)


@torch.no_grad()
def test_what_is_wanted_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for every tensor again: of many layers that is most of the time."""
    source, listed, plain = opened(make_checkpoint(tmp_path / "one", "llama")), list[int](), Decoder.stored

    def counted(decoder: Decoder) -> dict[str, torch.Tensor]:
        listed.append(1)
        found: dict[str, torch.Tensor] = plain.fget(decoder)  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(Decoder, "stored", property(counted))
    for stream in (False, True):
        load_checkpoint(source.checkpoint, source.fitted, stream=stream)(some_ids())
    assert len(listed) == 2


@everywhere
@torch.no_grad()
def test_four_times_one_model_is_the_model(tmp_path: Path, family: str) -> None:
    part = opened(make_checkpoint(tmp_path / "part", family))
    one = merged(tmp_path / "merged", [part] * 4)
    assert apart(run(one.folder)(some_ids()), stock_logits(part.folder, some_ids())) <= BOUND


# --- what fails ------------------------------------------------------------------------------------------------


class _OneNorm(Grouped):
    """One RMSNorm over the whole stream, as a stock model of that width would have."""

    def normalize(self, x: torch.Tensor, role: str, layer: int = 0) -> torch.Tensor:
        if role in ("query_norm", "key_norm"):
            return super().normalize(x, role, layer)
        whole = super().normalize(x, role, layer).unflatten(-1, (self.count, -1))
        own = x.unflatten(-1, (self.count, -1)).pow(2).mean(-1, keepdim=True).sqrt()
        return (whole * own / own.pow(2).mean(-2, keepdim=True).sqrt()).flatten(-2)


class _OneWidth(Grouped):
    """All models as wide as the widest: norms count the zeros."""

    def each(self, key: str) -> list[Any]:
        return [self.description[key]] * self.count if key == "hidden" else super().each(key)


class _OneTurn(Grouped):
    """All models turn alike."""

    def each(self, key: str) -> list[Any]:
        return [self.description[key]] * self.count if key in ("ropes", "head_dim") else super().each(key)


class _CapOfTheMean(Grouped):
    """The mean is capped, and not what it is the mean of."""

    def head(self, x: torch.Tensor) -> torch.Tensor:
        cap, self.description = self.description["final_softcap"], {**self.description, "final_softcap": None}
        logits = super().head(x)
        self.description["final_softcap"] = cap
        return torch.tanh(logits / cap) * cap


def wrong(folder: Path, kind: type[Grouped]) -> Decoder:
    right = run(folder)
    decoder = kind(right.description)
    decoder.load_state_dict(right.state_dict())
    return decoder


@pytest.mark.parametrize(
    ("kind", "family"),
    [(_OneNorm, "llama"), (_OneWidth, "llama"), (_OneWidth, "gpt2"), (_OneTurn, "llama"), (_CapOfTheMean, "gemma2")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_wrong_variants_miss_by_far(tmp_path: Path, kind: type[Grouped], family: str) -> None:
    parts = made(tmp_path, family, False, UNLIKE[family])
    if kind is _OneNorm:  # one of them is louder, as models of other makers are
        loud = weights_of(parts[0].folder)
        loud["model.embed_tokens.weight"] *= 4
        save_file(loud, parts[0].folder / "model.safetensors", {"format": "pt"})
        parts[0] = opened(parts[0].folder)
    one = merged(tmp_path / "merged", parts)
    assert missed(one, wrong(one.folder, Grouped)) <= BOUND
    assert missed(one, wrong(one.folder, kind)) >= WRONG


# --- merged models are models ----------------------------------------------------------------------------------


@everywhere
@torch.no_grad()
def test_merged_of_merged(tmp_path: Path, family: str) -> None:
    """All models lie side by side, their weights multiplied, and each comes back from behind two merges."""
    parts = made(tmp_path, family, False, UNLIKE[family][:2] * 2)
    inner = [merged(tmp_path / f"inner{at}", parts[at : at + 2], [0.25, 0.75]) for at in (0, 2)]
    outer = merged(tmp_path / "outer", [opened(one.folder) for one in inner], [0.5, 0.5])
    flat = Merged(tuple(parts), (0.125, 0.375, 0.125, 0.375), outer.plan, outer.folder)
    source = opened(outer.folder)
    assert source.fitted.groups is not None and source.fitted.groups.weights == flat.weights
    assert missed(flat, run(outer.folder)) <= BOUND
    for number, part in enumerate(parts):
        assert same_bits(taken_out(source, number, tmp_path / f"back{number}").folder, part.folder)


@torch.no_grad()
def test_merged_with_a_single_one(tmp_path: Path) -> None:
    parts = made(tmp_path, "llama", True, [{}, {"hidden_size": 48}, {"num_hidden_layers": 4}])
    inner = merged(tmp_path / "inner", parts[:2])
    outer = merged(tmp_path / "outer", [opened(inner.folder), parts[2]], [0.5, 0.5])
    assert missed(Merged(tuple(parts), (0.25, 0.25, 0.5), outer.plan, outer.folder), run(outer.folder)) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt2"])
@torch.no_grad()
def test_cached_padded_and_packed(tmp_path: Path, family: str) -> None:
    """As any decoder: token by token with a cache, rows padded in front, documents packed into a row."""
    one, ids = merged(tmp_path / "m", made(tmp_path, family, False, UNLIKE[family])), some_ids(length=20)
    decoder = run(one.folder)
    whole, cache = decoder(ids), decoder.new_cache()
    pieces = [decoder(ids[:, at : at + 5], cache=cache) for at in range(0, 20, 5)]
    assert apart(torch.cat(pieces, 1), whole) <= BOUND
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    present = torch.ones_like(padded, dtype=torch.bool)
    present[:, :3] = False
    assert apart(decoder(padded, present=present)[:, 3:], whole) <= BOUND
    assert apart(decoder(padded)[:, 3:], whole) >= WRONG
    documents = torch.zeros_like(ids)
    documents[:, 8:] = 1
    packed = decoder(ids, documents=documents)
    assert apart(packed[:, :8], whole[:, :8]) <= BOUND and apart(packed[:, 8:], decoder(ids[:, 8:])) <= BOUND


@everywhere
def test_training_leaves_what_fills_up_at_zero(tmp_path: Path, family: str) -> None:
    """So that each model can still be taken out: only what it had is trained."""
    parts = made(tmp_path, family, False, UNLIKE[family])
    decoder = run(merged(tmp_path / "merged", parts).folder)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        ids = some_ids(seed=step)
        loss = torch.nn.functional.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in decoder.named_parameters():
        own = before[name] != 0
        assert not bool(parameter[~own].any()), name
        assert (parameter[own] != before[name][own]).float().mean() > 0.5, name


@torch.no_grad()
def test_transformers_generates_and_saves(tmp_path: Path) -> None:
    one = merged(tmp_path / "merged", made(tmp_path, "gemma2", True, UNLIKE["gemma2"]))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(one.folder, trust_remote_code=False)
    model, ids = remote(one.folder), some_ids()
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))
    model.save_pretrained(tmp_path / "saved")
    assert same_bits(tmp_path / "saved", one.folder)
    assert apart(run(tmp_path / "saved")(ids), one.mean()) <= BOUND
    bare = transformers.AutoModel.from_pretrained(one.folder, trust_remote_code=True)
    assert bare(ids).last_hidden_state.shape == (*ids.shape, 3 * 48)


def test_weights_are_changed_in_the_config(tmp_path: Path) -> None:
    """They stand there alone: another mean of the same models needs no other file."""
    one = merged(tmp_path / "merged", made(tmp_path, "llama", False, [{}, {}]))
    path = one.folder / "config.json"
    config = json.loads(path.read_text())
    config["groups"]["weights"] = [0.9, 0.1]
    path.write_text(json.dumps(config))
    other = Merged(one.parts, (0.9, 0.1), one.plan, one.folder)
    assert missed(other, run(one.folder)) <= BOUND
    with torch.no_grad():
        assert apart(remote(one.folder)(some_ids()).logits, other.mean()) <= BOUND
    for wrong in ([0.9, 0.2], [1.0, 0.0]):
        path.write_text(json.dumps({**config, "groups": {**config["groups"], "weights": wrong}}))
        with pytest.raises(TltError, match=r"config.json: groups.weights must be numbers that add up to 1"):
            opened(one.folder)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_sizes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    def variant() -> dict[str, int]:
        kv = data.draw(st.integers(1, 3))
        heads = kv * data.draw(st.integers(1, 3))
        return {
            "hidden_size": heads * data.draw(st.integers(3, 9)), "num_attention_heads": heads,
            "num_key_value_heads": kv, "head_dim": 2 * data.draw(st.integers(1, 7)),
            "num_hidden_layers": data.draw(st.integers(1, 4)), "intermediate_size": data.draw(st.integers(3, 50)),
        }  # fmt: skip

    folder = tmp_path_factory.mktemp("sizes")
    family, tied = data.draw(st.sampled_from(["llama", "qwen3"])), data.draw(st.booleans())
    variants = [variant() for _ in range(data.draw(st.integers(2, 3)))]
    one = merged(folder / "merged", made(folder, family, tied, variants))
    source, ids, double = opened(one.folder), some_ids(), {"dtype": torch.float64}
    with torch.no_grad():
        each = [weight * run(part.folder, **double)(ids) for weight, part in zip(one.weights, one.parts, strict=True)]
        assert apart(run(one.folder, **double)(ids), sum(each, start=torch.zeros(()))) <= 1e-12
    for number, part in enumerate(one.parts):
        assert same_bits(taken_out(source, number, folder / f"back{number}").folder, part.folder)


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "first", "second", "match"),
    [
        ("llama", {}, {"hidden_act": "gelu"}, "activation=silu and part1 activation=gelu"),
        ("llama", {}, {"vocab_size": 98}, "vocab=97 and part1 vocab=98: merge models of one tokenizer"),
        ("llama", {}, {"attention_bias": True}, r"part1 has a bias at \w+ and part0 has none"),
        ("llama", {}, {"tie_word_embeddings": True}, "untie"),
        ("mistral", {}, {"sliding_window": 16}, "layer 0 of part0 has window=8 and of part1 window=16"),
        ("gemma2", {}, {"final_logit_softcapping": 5.0}, "final_softcap"),
        ("gemma2", {}, {"attn_logit_softcapping": 5.0}, "attention_softcap"),
    ],
)
def test_models_that_cannot_lie_side_by_side(
    tmp_path: Path, family: str, first: dict[str, Any], second: dict[str, Any], match: str
) -> None:
    parts = [
        opened(make_checkpoint(tmp_path / f"part{at}", family, **{"tied": False, **own}))
        if "tie_word_embeddings" not in own
        else opened(make_checkpoint(tmp_path / f"part{at}", family, tied=True))
        for at, own in enumerate((first, second))
    ]
    with pytest.raises(TltError, match=match) as error:
        merged(tmp_path / "merged", parts)
    assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()


def test_other_families_and_numbers(tmp_path: Path) -> None:
    parts = [opened(make_checkpoint(tmp_path / family, family)) for family in ("llama", "qwen2")]
    with pytest.raises(TltError, match="llama is a llama and qwen2 a qwen2"):
        merged(tmp_path / "merged", parts)
    with pytest.raises(TltError, match="two or more"):
        merged(tmp_path / "merged", parts[:1])
    for weights, match in (([0.5], "1 numbers for 2"), ([1.0, 1.0], "add up to 2.*0.5,0.5"), ([1.0, 0.0], "no share")):
        with pytest.raises(UsageError, match=match):
            merged(tmp_path / "merged", [parts[0]] * 2, weights)
    with pytest.raises(TltError, match="one model"):
        taken_out(parts[0], 0, tmp_path / "out")
    source = opened(merged(tmp_path / "merged", [parts[0]] * 2).folder)
    with pytest.raises(TltError, match="part 3 of 2"):
        taken_out(source, 2, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version 2"),
        ({"count": 3}, "count must be 2"),
        ({"weights": [1.0]}, "weights must be a list of 2 numbers"),
        ({"weights": [1.0, float("nan")]}, "weights must be a list of 2 numbers"),
        ({"parts": []}, "parts must be a list"),
        ({"sizes": {"hidden": 32}}, "sizes must have the axes"),
        ({"sizes": {"hidden": "wide"}}, "sizes must be an object of whole numbers"),
        ({"parts": [{"name": "a", "sha256": "0", "config": {"hidden_size": 64}}] * 2}, "hidden=64, but slices hold"),
        ({"parts": [{"name": "a", "sha256": "0", "config": {"rms_norm_eps": "no"}}] * 2}, "rms_norm_eps must be"),
        ({"parts": [{"name": 3}] * 2}, r"parts\[0\].name must be a text"),
        ({"architectures": "Llama"}, "architectures must be a list"),
        ({"dense_model_type": 3}, "dense_model_type must be a name"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
    ],
)
def test_broken_configs(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    one = merged(tmp_path / "merged", made(tmp_path, "llama", False, [{}, {}]))
    path = one.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "groups": {**config["groups"], **change}}))
    with pytest.raises(TltError, match=match):
        opened(one.folder)
    path.write_text(json.dumps({**config, "groups": 3}))
    with pytest.raises(TltError, match="groups must be an object"):
        opened(one.folder)
    path.write_text(json.dumps({**config, "lowrank": {"version": 1}}))
    with pytest.raises(TltError, match="both groups and lowrank"):
        opened(one.folder)
