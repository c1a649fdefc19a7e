"""Family tables against headers: every family fits, sizes are the config's, and whatever does not fit is named.

The headers of tests/headers are those of public checkpoints: config.json as transformers 4 wrote it, and the shapes of
all tensors with {layer} for the layer's number. They were made by building each config, written down from its public
page, with stock transformers on the meta device; gpt2.json has the names without a prefix and the mask buffers of the
public file.
"""

from __future__ import annotations

import ast
import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import ZOO

import tlt_cli
from tlt_cli.axes import shape
from tlt_cli.errors import TltError
from tlt_cli.families.fit import Fit, fit
from tlt_cli.families.sizes import edit_config, read_sizes
from tlt_cli.families.table import known_families, load_family, parse_family
from tlt_cli.model.describe import describe

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]

HEADERS = sorted((Path(__file__).parent / "headers").glob("*.json"))
PACKAGE = Path(tlt_cli.__file__).parent
everywhere = pytest.mark.parametrize("family", ZOO)
public = pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.stem)


def stock_config(config: Config) -> transformers.PreTrainedConfig:
    """config.json as transformers understands it, from a copy: it writes into what it is given."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    return transformers.AutoConfig.for_model(config["model_type"], **copy.deepcopy(keys))


def stock_shapes(config: Config) -> Shapes:
    """Names and shapes of the checkpoint that stock transformers would save for a config.json."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(stock_config(config))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


@cache
def _made(family: str, overrides: str) -> tuple[Shapes, Config]:
    config = ZOO[family](**{"tie_word_embeddings": False, **json.loads(overrides)})
    config.architectures = list(load_family(family).architectures)
    written = json.loads(config.to_json_string(use_diff=False))
    return stock_shapes(written), written


def header(family: str, **overrides: Any) -> tuple[Shapes, Config]:
    """The header and config.json of a tiny checkpoint of the family."""
    shapes, config = _made(family, json.dumps(overrides, sort_keys=True))
    return dict(shapes), json.loads(json.dumps(config))


def public_header(path: Path) -> tuple[Shapes, Config, int]:
    data = json.loads(path.read_text())
    shapes: Shapes = {}
    for pattern, dims in data["tensors"].items():
        for layer in range(data["layers"]) if "{layer}" in pattern else [0]:
            shapes[pattern.replace("{layer}", str(layer))] = tuple(dims)
    return shapes, data["config"], data["parameters"]


def stated(config: Config) -> dict[str, int]:
    """The sizes as transformers understands them, by config keys of either spelling."""
    read = stock_config(config)
    heads = read.num_attention_heads
    kv = getattr(read, "num_key_value_heads", heads)
    head_dim = getattr(read, "head_dim", None) or read.hidden_size // heads
    rotary = config["model_type"] != "gpt2"
    return {
        "vocab": read.vocab_size,
        "hidden": read.hidden_size,
        "ffn": getattr(read, "intermediate_size", None) or getattr(read, "n_inner", None) or 4 * read.hidden_size,
        "layer": read.num_hidden_layers,
        "kv": kv,
        **({"group": heads // kv, "rotary": head_dim // 2} if rotary else {"channel": head_dim}),
        **({} if rotary else {"position": read.n_positions}),
    }


# What fits


@everywhere
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_family_fits(family: str, tied: bool) -> None:
    shapes, config = header(family, tie_word_embeddings=tied)
    fitted = fit(shapes, config)
    assert fitted.family.name == family and fitted.tied == tied and fitted.notes == () and fitted.dropped == ()
    assert fitted.sizes == stated(config)
    assert fitted.places.keys() == shapes.keys()
    assert all(shape(place.arrow, fitted.sizes) == shapes[name] for name, place in fitted.places.items())
    assert any(place.roles == ("head",) for place in fitted.places.values()) != tied
    assert {place.layer for place in fitted.places.values()} == {None, *range(fitted.sizes["layer"])}


@public
def test_public_headers_fit(path: Path) -> None:
    shapes, config, parameters = public_header(path)
    fitted = fit(shapes, config)
    assert fitted.sizes == stated(config)
    kept = [torch.Size(shapes[name]).numel() for name in fitted.places]
    assert sum(kept) == parameters
    assert all("attn.bias" in name for name in fitted.dropped) and bool(fitted.dropped) == (path.stem == "gpt2")
    assert edit_config(fitted.family, config, fitted.sizes) == config
    describe(fitted)


def test_a_public_header_for_every_family() -> None:
    assert {fit(*public_header(path)[:2]).family.name for path in HEADERS} == set(known_families())


@public
def test_both_spellings_of_a_config_mean_the_same(path: Path) -> None:
    """config.json as transformers 4 wrote it, and the same model as transformers 5 writes it."""
    shapes, old, _ = public_header(path)
    new = json.loads(stock_config(old).to_json_string(use_diff=False))
    new["architectures"] = old["architectures"]
    assert ("rope_theta" in old) == ("rope_parameters" in new) and "torch_dtype" not in new
    before, after = fit(shapes, old), fit(shapes, new)
    assert before.sizes == after.sizes and before.tied == after.tied
    assert describe(before) == describe(after)
    if "rope_theta" in old:
        other = fit(shapes, {**old, "rope_theta": 12345.0})
        assert describe(other) != describe(after), "the base of the rotation must show"


@everywhere
def test_an_absent_key_means_what_transformers_takes_it_to_mean(family: str) -> None:
    table = load_family(family)
    blank = transformers.AutoConfig.for_model(table.model_type)
    for key, value in table.defaults.items():
        if hasattr(blank, key):
            stock = getattr(blank, key)
            switched_off = stock is None and not table.defaults.get(table.rules.get("window_switch", ""), True)
            assert stock == value or switched_off, key
    for key in table.biases:
        assert getattr(blank, key) is False
    for key in table.derived:
        assert key in table.defaults or stated({"model_type": table.model_type}) == read_sizes(
            table, {k: v for k, v in blank.to_dict().items() if k != key}
        )


def test_sizes_that_older_configs_leave_out() -> None:
    shapes, config = header("llama", num_key_value_heads=4)
    for key in ("head_dim", "num_key_value_heads"):
        assert fit(shapes, {**config, key: None}).sizes == fit(shapes, config).sizes
        del config[key]
        assert fit(shapes, config).sizes["kv"] == 4
    shapes, config = header("gpt2", n_inner=128)
    assert fit(shapes, {**config, "n_inner": None}).sizes["ffn"] == 128
    grouped, config = header("llama")
    del config["num_key_value_heads"]
    with pytest.raises(TltError, match=r"k_proj.weight is \[16, 32\], but the llama table says .* = \[32, 32\]"):
        fit(grouped, config)


# A bare file


def kv_of(config: Config) -> int:
    return stated(config)["kv"]


@everywhere
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_bare_file(family: str, tied: bool) -> None:
    shapes, config = header(family, tie_word_embeddings=tied)
    if any(name.endswith("k_norm.weight") for name in shapes):  # its size is head_dim, which tells the heads
        assert fit(shapes, None).sizes == stated(config)
    else:
        with pytest.raises(TltError, match=r"cannot tell how many key/value heads from shapes alone; pass --axis kv=N"):
            fit(shapes, None)
    for named in (None, family):
        fitted = fit(shapes, None, family=named, axes={"kv": kv_of(config)})
        assert fitted.sizes == stated(config) and fitted.tied == tied
        assert any("no config.json: read as" in note for note in fitted.notes)
        assert stock_shapes(fitted.config) == shapes, "the config made up for it must build the same tensors"
    assert fitted.family.name == family
    with pytest.raises(TltError, match=r"--axis heads: .* has no such axis"):
        fit(shapes, None, axes={"heads": 4})
    with pytest.raises(TltError, match="does not fit kv=7"):
        fit(shapes, None, axes={"kv": 7})


def test_a_bare_file_takes_the_plainest_family() -> None:
    shapes, config = header("mistral")
    fitted = fit(shapes, None, axes={"kv": 2})
    assert known_families()[0] == fitted.family.name == "llama"
    assert any("also mistral" in note and "--family" in note for note in fitted.notes)
    assert fit(header("qwen2")[0], None, axes={"kv": 2}).family.name == "qwen2", "its biases tell"
    assert fit(shapes, config, axes={"kv": 2}).family.name == "mistral"
    with pytest.raises(TltError, match=r"--axis kv=4, but config.json says kv=2"):
        fit(shapes, config, axes={"kv": 4})


def test_a_bare_file_with_biases() -> None:
    shapes, _ = header("llama", attention_bias=True, mlp_bias=True)
    fitted = fit(shapes, None, axes={"kv": 2})
    assert fitted.config["attention_bias"] is True and fitted.config["mlp_bias"] is True
    assert stock_shapes(fitted.config) == shapes


def test_a_bare_decoder() -> None:
    shapes, config = header("llama", tie_word_embeddings=True)
    bare = {name.removeprefix("model."): dims for name, dims in shapes.items()}
    assert fit(bare, config).sizes == fit(shapes, config).sizes
    both = {**shapes, "norm.weight": (32,)}
    with pytest.raises(TltError, match=r"model.norm.weight and norm.weight are one tensor under two names"):
        fit(both, config)


# Sizes to config and back


@everywhere
def test_editing_a_config_to_its_own_sizes_changes_nothing(family: str) -> None:
    table, (_, config) = load_family(family), header(family)
    assert edit_config(table, config, read_sizes(table, config)) == config


@everywhere
def test_new_sizes_are_read_back_and_built_by_transformers(family: str) -> None:
    table, (shapes, config) = load_family(family), header(family)
    sizes, accepted = read_sizes(table, config), set()
    for axis in table.axes:
        for factor in (2, 3):
            new = {**sizes, axis: sizes[axis] * factor}
            if axis == "hidden" and "channel" in sizes:  # no key of its own: it is hidden over heads
                new["channel"] *= factor
            try:
                edited = edit_config(table, config, new)
            except TltError as error:
                assert f"{axis}={new[axis]}" in str(error) or "multiple" in str(error)
                continue
            accepted.add(axis)
            assert read_sizes(table, edited) == new
            kept = {key for key in config if edited.get(key) == config[key]}
            assert len(config) - len(kept) <= 3 and edited is not config
            if axis != "layer":  # lists with an entry per layer are not this function's to edit
                built = stock_shapes(edited)
                assert fit(built, edited).sizes == new and built != shapes
    assert {"vocab", "ffn", "layer", "hidden"} <= accepted


def test_sizes_a_family_cannot_have() -> None:
    table, (_, config) = load_family("llama"), header("llama")
    sizes = read_sizes(table, config)
    with pytest.raises(TltError, match="llama cannot have hidden_size=33 with num_attention_heads=4"):
        edit_config(table, config, {**sizes, "hidden": 33})
    table, (_, config) = load_family("gpt2"), header("gpt2")
    sizes = read_sizes(table, config)
    with pytest.raises(TltError, match=r"gpt2 cannot have .*hidden=40.*channel"):
        edit_config(table, config, {**sizes, "hidden": 40})
    assert edit_config(table, config, {**sizes, "hidden": 40, "channel": 10})["n_embd"] == 40


# What does not fit


@everywhere
def test_each_tensor_of_another_shape_is_named(family: str) -> None:
    shapes, config = header(family)
    for name, dims in shapes.items():
        for index in range(len(dims)):
            wrong = tuple(size + (place == index) for place, size in enumerate(dims))
            with pytest.raises(TltError) as caught:
                fit({**shapes, name: wrong}, config)
            message = str(caught.value)
            assert message.startswith(f"{name} is {list(wrong)}, but the {family} table says '")
            assert f"= {list(dims)} with " in message and "\n" not in message
    transposed = next(name for name, dims in shapes.items() if len(set(dims)) == 2)
    with pytest.raises(TltError, match=re.escape(f"{transposed} is {list(shapes[transposed][::-1])}")):
        fit({**shapes, transposed: shapes[transposed][::-1]}, config)


@everywhere
def test_each_missing_tensor_is_named(family: str) -> None:
    shapes, config = header(family)
    for name in shapes:
        with pytest.raises(TltError, match=re.escape(f"{name} is missing; the {family} table expects it")):
            fit({other: dims for other, dims in shapes.items() if other != name}, config)


@everywhere
def test_layers_missing_and_extra(family: str) -> None:
    shapes, config = header(family)
    layers = read_sizes(load_family(family), config)["layer"]
    last = [name for name in shapes if re.search(rf"\.{layers - 1}\.", name)]
    with pytest.raises(TltError, match=rf"\.{layers - 1}\..* is missing; .*every layer \(layer={layers}\)"):
        fit({name: dims for name, dims in shapes.items() if name not in last}, config)
    extra = {name.replace(f".{layers - 1}.", f".{layers + 6}."): shapes[name] for name in last}
    with pytest.raises(TltError, match=rf"\.{layers + 6}\..* is in the file, but config.json says {layers} layers"):
        fit({**shapes, **extra}, config)
    first = {re.sub(r"\.\d+\.", ".1.", name) for name in last}
    with pytest.raises(TltError, match=r"\.1\..* is missing"):
        fit({name: dims for name, dims in shapes.items() if name not in first}, config)


@everywhere
def test_an_unknown_tensor_is_named_with_what_to_do(family: str) -> None:
    shapes, config = header(family)
    for extra in ("model.layers.0.self_attn.rotary.weight", "wte", "adapter.0.lora_A.weight", "model.layers.01.x"):
        with pytest.raises(TltError, match=re.escape(f"{extra} [3, 4] is in the file but in no row of the {family}")):
            fit({**shapes, extra: (3, 4)}, config)
        with pytest.raises(TltError, match=re.escape(f"first unknown tensor: {extra} [3, 4]); write a table with")):
            fit({**shapes, extra: (3, 4)}, None)


def test_a_number_of_layers_beyond_reason_costs_nothing() -> None:
    shapes, config = header("llama")
    with pytest.raises(TltError, match=r"layers\.3\..* is missing"):
        fit(shapes, {**config, "num_hidden_layers": 10**15})
    far = {name.replace(".2.", ".999999999."): dims for name, dims in shapes.items()}
    with pytest.raises(TltError, match=r"layers\.2\..* is missing"):
        fit(far, {**config, "num_hidden_layers": 10**9})
    with pytest.raises(TltError, match=r"layers\.2\..* is missing"):
        fit(far, None, axes={"kv": 2})


def test_nothing_or_half_a_model_fits_no_family() -> None:
    shapes, config = header("llama")
    for part in ({}, {name: dims for name, dims in shapes.items() if ".1." in name}):
        with pytest.raises(TltError, match="no family matches: tensors that every family has are missing"):
            fit(part, None)
        with pytest.raises(TltError, match="is missing; the llama table expects it"):
            fit(part, config)


def test_biases_agree_with_their_switch() -> None:
    """transformers would leave out a bias whose switch is off, and make up one whose switch is on."""
    shapes, config = header("llama", attention_bias=True)
    assert "attention_bias" in config and fit(shapes, config)
    for off in ({"attention_bias": False}, {"attention_bias": None}):
        with pytest.raises(TltError, match=r"_proj.bias is in the file, but config.json says attention_bias=false"):
            fit(shapes, {**config, **off})
    plain, config = header("llama")
    with pytest.raises(TltError, match=r"layers.0.self_attn.q_proj.bias is missing"):
        fit(plain, {**config, "attention_bias": True})
    with pytest.raises(TltError, match="mlp_bias must be true or false, or null, not 'yes'"):
        fit(plain, {**config, "mlp_bias": "yes"})


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"architectures": ["LlamaForTokens"]}, "no family table for 'LlamaForTokens' (did you mean 'Llama"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ("llama", {"architectures": [["LlamaForCausalLM"]]}, "architectures must be a list of names"),
        ("llama", {"architectures": {"a": 1}}, "architectures must be a list of names"),
        ("llama", {"architectures": None, "model_type": "lama"}, "no family table for 'lama' (did you mean 'llama'?)"),
        ("llama", {"architectures": [], "model_type": None}, "neither architectures nor model_type"),
        ("llama", {"architectures": [], "model_type": ["llama"]}, "no family table for"),
        ("llama", {"hidden_size": "32"}, "hidden_size='32'; expected a whole number of at least 1"),
        ("llama", {"hidden_size": -32}, "hidden_size=-32"),
        ("llama", {"hidden_size": 0}, "hidden_size=0"),
        ("llama", {"hidden_size": True}, "hidden_size=True"),
        ("llama", {"hidden_size": 32.0}, "hidden_size=32.0"),
        ("llama", {"hidden_size": None}, "config.json has no hidden_size"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 4 / 3 is not a whole number"),
        ("llama", {"head_dim": 7}, "head_dim / 2 = 7 / 2 is not a whole number"),
        ("llama", {"head_dim": None, "num_attention_heads": 6, "num_key_value_heads": 2}, "32 / 6 is not a whole"),
        ("llama", {"head_dim": 16}, "is [32, 32], but the llama table says"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a positive number"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, not nan"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act must be a name"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta must be a positive number, or null, not inf"),
        ("llama", {"rope_parameters": "default"}, "rope_parameters must be an object, or null, not 'default'"),
        ("llama", {"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type must be a name"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling must be an object"),
        ("llama", {"rope_parameters": {"factor": float("nan")}}, "rope_parameters.factor must be a number, not nan"),
        ("gemma3", {"rope_parameters": {"full_attention": {"type": []}}}, "full_attention.type must be a name"),
        ("mistral", {"sliding_window": "8"}, "sliding_window must be a whole number of at least 1, or null, not '8'"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ("qwen2", {"layer_types": {"0": "full_attention"}}, "layer_types must be a list of names, or null"),
        ("qwen2", {"layer_types": [["full_attention"]] * 3}, "layer_types must be a list of names"),
        ("qwen2", {"max_window_layers": "1"}, "max_window_layers must be a whole number"),
        ("gemma2", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must be a whole number"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
        ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping must be a positive number, or null"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        ("smollm3", {"no_rope_layers": "1010"}, "no_rope_layers must be a list of 0 and 1"),
        ("gpt2", {"n_head": 5}, "n_embd / n_head = 32 / 5 is not a whole number"),
        ("gpt2", {"scale_attn_weights": "no"}, "scale_attn_weights must be true or false"),
        ("gpt2", {"n_positions": 128}, "wpe.weight is [64, 32], but the gpt2 table says"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(family: str, keys: Config, message: str) -> None:
    shapes, config = header(family)
    fit(shapes, config)
    with pytest.raises(TltError) as caught:
        fit(shapes, {**config, **keys})
    assert message in str(caught.value) and "\n" not in str(caught.value)


HUGE, INFINITE = 10**400, float("inf")
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 0.5, 10**12, HUGE, INFINITE, -INFINITE, float("nan"), 1e-400, "", "8", "a\nb", "x" * 60,
    [], [1], [[]], ["full_attention"] * 9, {}, {"x": []}, {"rope_type": "linear"}, {"rope_type": "dynamic"},
    {"type": "linear", "factor": HUGE}, {"type": "linear", "factor": 0}, {"type": "linear", "factor": True},
    {"type": "linear", "factor": INFINITE}, {"rope_theta": HUGE}, {"rope_theta": []}, {"partial_rotary_factor": "x"},
    {"full_attention": {"rope_type": "linear", "factor": "8"}}, {"full_attention": {"full_attention": {}}},
    {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": HUGE},
    {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": 1},
    {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": 4,
     "original_max_position_embeddings": HUGE},
]  # fmt: skip
MORE_KEYS = ["rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "layer_types"]


@everywhere
def test_no_value_of_a_key_does_anything_but_fit_or_be_refused(family: str) -> None:
    shapes, config = header(family)
    outcomes = set()
    for key in {*config, *MORE_KEYS}:
        for value in ODD_VALUES:
            try:
                description = describe(fit(shapes, {**config, key: value}))
                json.dumps(description, allow_nan=False)
                outcomes.add("fits")
            except TltError as error:
                assert len(str(error)) < 1500, key
                outcomes.add("refused")
    assert outcomes == {"fits", "refused"}


def test_tied_by_config_or_by_the_file() -> None:
    shapes, config = header("llama")
    assert fit(shapes, {**config, "tie_word_embeddings": True}).dropped == ("lm_head.weight",)
    tied, config = header("llama", tie_word_embeddings=True)
    with pytest.raises(TltError, match=r"^lm_head.weight is missing"):
        fit(tied, {**config, "tie_word_embeddings": False})
    alone = {"lm_head.weight" if "embed" in name else name: dims for name, dims in tied.items()}
    assert fit(alone, config).places["lm_head.weight"].roles == ("embedding",)


# Tables


LLAMA = load_family("llama").text


def swapped(old: str, new: str, text: str = LLAMA) -> str:
    assert old in text, old
    return text.replace(old, new, 1)


def without(section: str) -> str:
    return re.sub(rf"\n\[{re.escape(section)}\].*?(?=\n\[|\Z)", "", LLAMA, flags=re.DOTALL)


BAD_TABLES: dict[str, tuple[str, str]] = {
    "not TOML": ("[axes\n", "not valid TOML"),
    "a key twice": (swapped('vocab  = "vocab_size"', 'vocab = "a"\nvocab = "b"'), "not valid TOML"),
    "nested beyond reason": ("a = " + "[" * 20_000, "not valid TOML"),
    "empty": ("", "the section [axes] is missing or empty"),
    "no axes": (without("axes"), "the section [axes] is missing or empty"),
    "no tensors": (without("tensors"), "the section [tensors] is missing or empty"),
    "no rules": (without("rules"), "the section [rules] is missing or empty"),
    "axes a text": (f'axes = "x"\n{without("axes")}', "the section [axes] is missing or empty"),
    "unknown section": (LLAMA + "\n[layout]\na = 1\n", "unknown section 'layout'"),
    "misspelt section": (swapped("[tied]", "[tide]"), "unknown section 'tide' (did you mean 'tied'?)"),
    "architectures a text": (swapped('["LlamaForCausalLM"]', '"Llama"'), "architectures must be a list of names"),
    "architectures of numbers": (swapped('["LlamaForCausalLM"]', "[1]"), "architectures must be a list of names"),
    "model_type a number": (swapped('model_type = "llama"', "model_type = 1"), "model_type must be a name"),
    "prefix a list": (swapped('prefix = "model."', "prefix = []"), "prefix must be a name"),
    "precedence a text": (swapped("precedence = 1", 'precedence = "first"'), "precedence must be a whole number"),
    "unknown axis": (swapped("vocab  =", "words ="), "unknown axis 'words'"),
    "an axis left out": (swapped('kv     = "num_key_value_heads"\n', ""), "the axis kv is not in [axes]"),
    "no layer": (swapped('layer  = "num_hidden_layers"\n', ""), "[axes] lacks layer"),
    "both head axes": (swapped("[derived]", 'channel = "head_dim"\n[derived]'), "one of rotary"),
    "axis a number": (swapped('"vocab_size"', "32000"), "[axes] vocab must be a size in quotes, not 32000"),
    "axis a sum": (swapped('"head_dim / 2"', '"head_dim + 2"'), "[axes] rotary: 'head_dim + 2' is not a size"),
    "axis unspaced": (swapped('"head_dim / 2"', '"head_dim/2"'), "'head_dim/2' is not a size"),
    "axis over zero": (swapped('"head_dim / 2"', '"head_dim / 0"'), "'head_dim / 0' is not a size"),
    "axis an odd digit": (swapped('"head_dim / 2"', '"head_dim / ²"'), "'head_dim / ²' is not a size"),
    "axis empty": (swapped('"vocab_size"', '""'), "'' is not a size"),
    "derived from itself": (swapped('"num_attention_heads"', '"num_key_value_heads"'), "follows from itself"),
    "derived in a ring": (
        swapped("[derived]", '[derived]\nhidden_size = "head_dim * num_attention_heads"'), "follows from itself"
    ),
    "derived a list": (swapped('"hidden_size / num_attention_heads"', "[]"), "[derived] head_dim must be a size"),
    "multiples a number": (swapped('hidden_size = "num_attention_heads"', "hidden_size = 4"), "[multiples] hidden"),
    "a default of lists": (swapped("rms_norm_eps = 1e-6", "rms_norm_eps = [1]"), "[defaults] rms_norm_eps must be"),
    "bad layout": (swapped('"vocab -> hidden"', '"vocab => hidden"'), "weight: 'vocab => hidden' has the"),
    "layout a number": (swapped('"vocab -> hidden"', "3"), "row model.embed_tokens.weight must be a layout in quotes"),
    "layout of a stray axis": (
        swapped('"vocab -> hidden"', '"vocab -> hiden"'), "axis hiden is not in [axes] (did you mean 'hidden'?)"
    ),
    "misspelt layer": (swapped("{layer}.mlp.up_proj.bias", "{lyer}.mlp.up_proj.bias"), "is not a tensor's name"),
    "two layers": (swapped("{layer}.mlp.up_proj.bias", "{layer}.{layer}.bias"), "is not a tensor's name"),
    "a row of two lines": (swapped('"lm_head.weight"  ', r'"lm\nhead.weight"'), "is not a tensor's name"),
    "biases of no role": (swapped('mlp_bias = ["gate"', 'mlp_bias = ["gat"'), "no module in [wiring] is the gat"),
    "biases of a norm": (swapped('mlp_bias = ["gate"', 'mlp_bias = ["ffn_norm"'), "no row model.layers.{layer}.post"),
    "biases a text": (swapped('["gate", "up", "down"]', '"gate"'), "[biases] mlp_bias must be a list of names"),
    "tied to no row": (swapped('"lm_head.weight" = "model.embed', '"lm_head.weight" = "model.embd'), "has no such row"),
    "tied a number": (swapped('"lm_head.weight" = "model.embed_tokens.weight"', '"lm_head.weight" = 1'), "[tied]"),
    "unknown wiring key": (swapped("final_norm = ", "last_norm = "), "unknown wiring key 'last_norm'"),
    "unknown role": (swapped('query  = "self', 'queries = "self'), "unknown attention role 'queries'"),
    "unknown ffn role": (swapped('gate = "mlp', 'gates = "mlp'), "unknown ffn role 'gates' (did you mean 'gate'?)"),
    "a role left out": (swapped('down = "mlp.down_proj"\n', ""), "[wiring] does not say which module is the down"),
    "a role without a row": (swapped('"mlp.down_proj"', '"mlp.down"'), "has no row model.layers.{layer}.mlp.down."),
    "a role of a number": (swapped('"mlp.down_proj"', "3"), "down must be a name, not 3"),
    "an empty role": (swapped('"mlp.down_proj"', '""'), "down must be a name, not ''"),
    "attention a text": (
        without("wiring.attention").replace("[wiring]", '[wiring]\nattention = "x"'), "one line per attention role"
    ),
    "block a number": (swapped('block      = "model.layers.{layer}."', "block = 1"), "block must be text, not 1"),
    "buffers a text": (swapped('["self_attn.rotary_emb.inv_freq"]', '"x"'), "buffers must be a list of names"),
    "fused and unnumbered": (swapped('value  = "self_attn.v_proj"', 'value = "self_attn.k_proj"'), "number them"),
    "fused and misnumbered": (
        swapped("self_attn.v_proj\"\n", "self_attn.k_proj[2]\"\n", swapped("k_proj\"\n", "k_proj[0]\"\n")),
        "number them [0] to [1]"
    ),
    "unknown rule": (LLAMA + "colour = 1\n", "unknown rule 'colour'"),
    "an unknown norm": (swapped('norm = "rms"', 'norm = "batch"'), "norm must be 'rms' or 'layer', not 'batch'"),
    "no epsilon": (swapped('epsilon = "rms_norm_eps"\n', ""), "[rules] does not say the epsilon"),
    "a rule that is no key": (swapped('"rms_norm_eps"', "1e-6"), "[rules] epsilon must be the name of a config key"),
    "an offset of text": (LLAMA + 'gain_offset = "one"\n', "[rules] gain_offset must be a number"),
    "unsupported a text": (LLAMA + 'unsupported = "x"\n', "[rules] unsupported must be a list of names"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_bad_tables(fault: str, tmp_path: Path) -> None:
    text, message = BAD_TABLES[fault]
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(TltError) as caught:
        load_family(str(tmp_path / "mine.toml"))
    told = str(caught.value)
    assert told.startswith("family table mine: ") and message in told and "\n" not in told


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TltError, match=r"no family is called 'lama' \(did you mean 'llama'\?\); known: gemma2, "):
        load_family("lama")
    with pytest.raises(TltError, match=r"cannot read the family table .*none.toml: No such file"):
        load_family(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(TltError, match=r"latin.toml: it is not UTF-8 text at byte 5"):
        load_family(str(tmp_path / "latin.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(TltError, match=r"folder.toml: Is a directory"):
        load_family(str(tmp_path / "folder.toml"))


def renamed(fitted: Fit) -> Shapes:
    """The same model with every tensor called otherwise."""
    shapes = {name: shape(place.arrow, fitted.sizes) for name, place in fitted.places.items()}
    return {name.replace("model.", "net.").replace("mlp", "wide"): dims for name, dims in shapes.items()}


def test_a_table_of_the_users_own(tmp_path: Path) -> None:
    shapes, config = header("llama")
    other, config = renamed(fit(shapes, config)), {**config, "architectures": ["Mine"]}
    with pytest.raises(TltError, match="no family table for 'Mine'"):
        fit(other, config)
    with pytest.raises(TltError, match=r"net\..* is in the file but in no row of the llama table; write a table"):
        fit(other, config, family="llama")
    table = tmp_path / "mine.toml"
    table.write_text(LLAMA.replace("model.", "net.").replace("mlp", "wide").replace("wide_bias", "mlp_bias"))
    fitted = fit(other, config, family=str(table))
    assert fitted.family.name == "mine" and fitted.sizes == stated({**config, "model_type": "llama"})
    assert fit(other, None, family=str(table), axes={"kv": 2}).sizes == fitted.sizes


def test_several_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shapes, config = header("llama")
    two = parse_family(swapped('["LlamaForCausalLM"]', '["LlamaForCausalLM", "Cousin"]'), "llama")
    assert two.architectures == ("LlamaForCausalLM", "Cousin")
    monkeypatch.setattr("tlt_cli.families.table._carried", lambda name: two)
    assert fit(shapes, {**config, "architectures": ["Cousin"]}).family.name == "llama"
    with pytest.raises(TltError, match="no family table for 'Uncle'"):
        fit(shapes, {**config, "architectures": ["Uncle"]})
    assert fit(shapes, {**config, "architectures": ["Uncle", "Cousin"]}).family.name == "llama"


# Families are data


def words_in(code: str) -> set[str]:
    """All names and texts in Python code but its docstrings and comments, in lower case, cut into words."""
    tree = ast.parse(code)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):  # what a command's help shows is documentation too
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["EXAMPLES"]:
            docstrings.add(id(node.value))
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            texts.append(node.value)
        for field in ("id", "attr", "name", "arg"):
            texts.append(str(getattr(node, field, "")))
    return {word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower())}


def test_no_code_names_a_family() -> None:
    names = set(known_families()) | {load_family(name).model_type for name in known_families()}
    assert len(names) >= 8
    for path in sorted(PACKAGE.rglob("*.py")):
        assert not words_in(path.read_text()) & names, path.relative_to(PACKAGE)


def test_code_that_names_a_family_would_show() -> None:
    assert "llama" in words_in('def f(x):\n    """Text."""\n    return x == "llama"')
    assert "gpt2" in words_in("def is_gpt2(x): ...")
    assert "llama" not in words_in('def f(x):\n    """Of llama."""  # llama\n    return x == "llama3"')
