"""A first draft of a family table for a checkpoint that no family fits.

Axes and roles are guessed from names and sizes. What cannot be guessed is marked FILL_IN, and the table is refused
until each of them is replaced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.cli.console import printable
from tlt_cli.cli.family_text import ATTENTION, FFN, STEM, section, spelled

FILL_IN = "FILL_IN"
_HEAD = "lm_head.weight"  # what a head is called that no file stores, since it is the embedding

# How configs of many families call the size of an axis.
_CONFIG_KEYS = {
    "vocab": ("vocab_size",),
    "position": ("n_positions", "max_position_embeddings"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "layer": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "kv": ("num_key_value_heads", "n_kv_heads"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
}

# What a module's name, within its layer or outside all layers, says about its role; the first that matches is taken.
_GUESSES = (
    ("positions", r"wpe|pos"),
    ("embedding", r"wte|emb"),
    ("head", r"head|output|out$"),
    ("final_norm", r"norm|ln"),
    ("query_norm", r"q(uery)?_?(norm|ln)"),
    ("key_norm", r"k(ey)?_?(norm|ln)"),
    ("attention_norm", r"(att|input|1).*(norm|ln)|(norm|ln)\w*(1|att)"),
    ("ffn_norm", r"norm|ln"),
    ("query", r"\bw?q(uery|_proj)?$"),
    ("key", r"\bw?k(ey|_proj)?$"),
    ("value", r"\bw?v(alue|_proj)?$"),
    ("output", r"att.*\b(w?o|out|dense|(o|out|c)_proj)$"),
    ("gate", r"gate|w1$"),
    ("up", r"up|fc1|fc_in|c_fc|w3$"),
    ("down", r"down|fc2|fc_out|c_proj|w2$"),
)
_ALWAYS = {
    "embedding", "final_norm", "attention_norm", "query", "key", "value", "output", "ffn_norm", "up", "down",
}  # fmt: skip
_BESIDE_HIDDEN = {"embedding": "vocab", "head": "vocab", "positions": "position", "up": "ffn", "down": "ffn"}
_HEADS, _PAIRS = "(kv group 2 rotary)", "(kv 2 rotary)"
_LAYOUTS = {
    "query": (_HEADS, "hidden"),
    "key": (_PAIRS, "hidden"),
    "value": (_PAIRS, "hidden"),
    "output": ("hidden", _HEADS),
}


def drafted_table(checkpoint: Checkpoint) -> str:
    """TOML that --family reads once what it marks is filled in."""
    return "".join(f"{line}\n" for line in _draft(checkpoint))


def _draft(checkpoint: Checkpoint) -> Iterator[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    layers = 0
    for name, info in checkpoint.tensors.items():
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        layers = max(layers, int(number[1]) + 1) if number else layers
        shapes.setdefault(re.sub(r"(^|\.)\d+\.", r"\1{layer}.", name, count=1), info.shape)
    roles = {row: _role(row) for row in shapes}
    sizes = {**_sizes(shapes, roles), "layer": layers}
    rotates = "positions" not in roles.values()
    transposed = any(
        roles[row] == "up" and shape[:1] == (sizes.get("hidden"),) != shape[1:] for row, shape in shapes.items()
    )
    rows = {
        row: _layout(roles[row], shape, sizes, transposed=transposed and "{layer}" in row)
        for row, shape in shapes.items()
    }
    if not rotates:
        rows = {row: layout.replace("2 rotary", "channel") for row, layout in rows.items()}
    config = checkpoint.config or {}
    yield f"# {printable(checkpoint.source)}: a draft. Check every line and replace each {FILL_IN}. A layout reads"
    yield "# `outputs <- inputs`, or `inputs -> outputs` where the weight is stored transposed; query heads are"
    yield "# (kv group 2 rotary) where positions rotate each head, else (kv group channel)."
    yield f"architectures = {spelled(config.get('architectures') or [FILL_IN])}"
    yield f"model_type = {spelled(config.get('model_type') or FILL_IN)}"
    yield from section("axes", _axes(config, sizes, rotates=rotates), sizes)
    biased_norm = any("norm" in str(role) and row.endswith(".bias") for row, role in roles.items())
    yield from _draft_rules(config, norm="layer" if biased_norm else "rms", rotates=rotates)
    tied = {}
    if "head" not in roles.values():
        embedding = next((row for row, role in roles.items() if role == "embedding"), f"{FILL_IN}.weight")
        tied, rows, roles = {_HEAD: embedding}, {**rows, _HEAD: "vocab <- hidden"}, {**roles, _HEAD: "head"}
    yield from section("tensors", rows, {row: list(shape) for row, shape in shapes.items()})
    yield from section("tied", tied)
    yield from _draft_wiring(roles)


def _draft_rules(config: Mapping[str, Any], *, norm: str, rotates: bool) -> Iterator[str]:
    epsilon = next((key for key in config if "eps" in key), None)
    activation = next((key for key in config if key in ("hidden_act", "activation_function", "activation")), None)
    defaults = {
        **({} if epsilon else {"epsilon": FILL_IN}),
        **({} if activation else {"activation": FILL_IN}),
        **({"rope_theta": 10000.0} if rotates and not {"rope_theta", "rope_parameters"} & config.keys() else {}),
    }
    yield from section("defaults", defaults)
    rules = {
        "norm": norm,
        "epsilon": epsilon or "epsilon",
        "activation": activation or "activation",
    }
    yield from section("rules", rules)


def _draft_wiring(roles: Mapping[str, str | None]) -> Iterator[str]:
    found: dict[str, str] = {}
    for row, role in roles.items():
        if role and row.endswith(".weight"):
            found.setdefault(role, row.removesuffix(".weight"))
    block = next((name.partition("{layer}.")[0] + "{layer}." for name in found.values() if "{layer}." in name), FILL_IN)

    def within(wanted: tuple[str, ...], inside: str) -> dict[str, str]:
        roles = [role for role in wanted if role in found or role in _ALWAYS]
        return {role: found.get(role, FILL_IN).removeprefix(inside) for role in roles}

    yield from section("wiring", {**within(STEM, ""), "block": block})
    yield from section("wiring.attention", within(ATTENTION, block))
    yield from section("wiring.ffn", within(FFN, block))


def _role(row: str) -> str | None:
    """The role that a tensor's name suggests; outside the layers there are only the roles of the stem."""
    name = row.rpartition(".")[0].lower()
    inside = "{layer}." in name
    guesses = ((role, words) for role, words in _GUESSES if (role in STEM) != inside)
    return next((role for role, words in guesses if re.search(words, name.rpartition("{layer}.")[2])), None)


def _sizes(shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str | None]) -> dict[str, int]:
    """Sizes told by matrices: hidden is in most of them, and the others stand beside it."""
    matrices = [row for row, shape in shapes.items() if len(shape) == 2]
    counted = Counter(size for row in matrices for size in set(shapes[row]))
    if not counted:
        return {}
    hidden = counted.most_common(1)[0][0]
    sizes = {"hidden": hidden}
    for row in matrices:
        others = [size for size in shapes[row] if size != hidden]
        axis = _BESIDE_HIDDEN.get(str(roles[row]))
        if axis and others:
            sizes.setdefault(axis, others[0])
    return sizes


def _layout(role: str | None, shape: tuple[int, ...], sizes: Mapping[str, int], *, transposed: bool) -> str:
    names = {size: axis for axis, size in sizes.items() if axis != "layer"}
    dims = [names.get(size, FILL_IN) for size in shape]
    if len(dims) != 2:
        return " ".join(dims) or FILL_IN
    if role in ("embedding", "positions"):
        return f"{dims[0]} -> {dims[1]}"
    outputs, inputs = _LAYOUTS.get(str(role), dims[::-1] if transposed else dims)
    return f"{inputs} -> {outputs}" if transposed else f"{outputs} <- {inputs}"


def _axes(config: Mapping[str, Any], sizes: Mapping[str, int], *, rotates: bool) -> dict[str, str]:
    """Axis -> the key of config.json that states its size; without a config.json the usual names."""

    def key(axis: str) -> str:
        for known in _CONFIG_KEYS[axis]:
            if not config or (known in config and config[known] == sizes.get(axis, config[known])):
                return known
        return FILL_IN

    heads = key("heads")
    kv = heads if config and key("kv") == FILL_IN else key("kv")
    head_dim = "head_dim" if not config or "head_dim" in config else FILL_IN
    plain = {axis: key(axis) for axis in ("vocab", "hidden", "ffn", "layer")}
    grouped = {"kv": kv, "group": f"{heads} / {kv}"}
    if rotates:
        return {**plain, **grouped, "rotary": f"{head_dim} / 2"}
    return {**plain, **grouped, "position": key("position"), "channel": f"{plain['hidden']} / {heads}"}
