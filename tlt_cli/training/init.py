"""The config.json of a model that does not exist yet, from a few sizes: "llama:dim=256,layers=4"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlt_cli.axes import bindings
from tlt_cli.errors import TltError, UsageError, nearest
from tlt_cli.families.family import Family
from tlt_cli.families.sizes import edit_config
from tlt_cli.families.table import load_family

SIZES = ("dim", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")
_HEAD = 64  # entries of a head where nothing says otherwise
_POSITIONS = "max_position_embeddings"  # what rotary families call their longest text


def initial_config(spec: str, *, vocab: int, context: int) -> dict[str, Any]:
    """config.json for `FAMILY[:size=N,...]`, or the one at a path. `vocab` and `context` are used where it has none.

    dim is 256 and layers 4 unless told, heads have 64 entries or fewer, every query head its own key and value, and the
    feed-forward is 8/3 (gated) or 4 times as wide as the stream. Any other key of the family's config may be given as
    key=value, JSON. Raises UsageError for names and sizes that cannot be.
    """
    if spec.endswith(".json"):
        return _read(Path(spec))
    name, _, rest = spec.partition(":")
    given, keys = _parsed(spec, rest)
    try:
        table = load_family(name)
    except TltError as error:
        raise UsageError(f"--init {spec}: {error}") from error
    gated = "gate" in table.roles
    dim, layers = given.get("dim", 256), given.get("layers", 4)
    rotary = "rotary" in table.axes
    heads = given.get("heads") or _heads(dim, given.get("head_dim"), rotary)
    kv, head_dim = given.get("kv_heads", heads), given.get("head_dim", dim // heads)
    for what, whole, part in (("heads", dim if "head_dim" not in given else heads, heads), ("kv_heads", heads, kv)):
        if whole % part:
            raise UsageError(f"--init {spec}: {what}={part} does not divide {whole}")
    if rotary and head_dim % 2:
        raise UsageError(f"--init {spec}: a head of {head_dim} entries has no rotary pairs; it must be even")
    ffn = given.get("ffn", (8 * dim // 3 + 31) // 32 * 32 if gated else 4 * dim)
    sizes = {
        "vocab": given.get("vocab", vocab), "hidden": dim, "ffn": ffn, "layer": layers, "kv": kv,
        "group": heads // kv, "rotary": head_dim // 2, "channel": head_dim, "position": context,
    }  # fmt: skip
    wanted = {axis: size for axis, size in sizes.items() if axis in table.axes}
    return {**_sized(table, wanted, spec, context), **keys}


def _heads(dim: int, head_dim: int | None, rotary: bool) -> int:
    """How many heads a stream of `dim` entries has where nothing says so: the fewest that divide it well."""
    if head_dim is not None:
        return max(1, dim // head_dim)
    fitting = (heads for heads in range(1, dim + 1) if dim % heads == 0 and dim // heads <= _HEAD)
    return next((heads for heads in fitting if not (rotary and dim // heads % 2)), 1)


def _sized(table: Family, sizes: Mapping[str, int], spec: str, context: int) -> dict[str, Any]:
    base: dict[str, Any] = {
        "architectures": list(table.architectures), "model_type": table.model_type, **table.defaults,
        "dtype": "float32", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if "position" not in sizes:
        base[_POSITIONS] = context
    if table.rules.get("softmax_scalar") in base:  # a temperature that should be that of the heads made here
        base[table.rules["softmax_scalar"]] = 2 * sizes["rotary"]
    try:
        return edit_config(table, base, sizes)
    except TltError as error:
        raise UsageError(f"--init {spec}: {table.name} cannot have {bindings(sizes)}: {error}") from error


def _parsed(spec: str, rest: str) -> tuple[dict[str, int], dict[str, Any]]:
    sizes: dict[str, int] = {}
    keys: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, sign, value = part.partition("=")
        if not sign:
            raise UsageError(f"--init {spec}: expected key=value, found {part!r}; such as dim=256,layers=4")
        key = key.replace("-", "_")
        if key in SIZES:
            if not value.isascii() or not value.isdigit() or int(value) < 1:
                raise UsageError(f"--init {spec}: {key}={value} is not a whole number of at least 1")
            sizes[key] = int(value)
            continue
        if "_" not in key:
            raise UsageError(f"--init {spec}: no size is called {key!r}{nearest(key, SIZES)}")
        try:
            keys[key] = json.loads(value)
        except ValueError:
            keys[key] = value
    return sizes, keys


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.expanduser().read_text("utf-8"))
    except OSError as error:
        raise TltError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise TltError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise TltError(f"{path} holds no JSON object")
    return config
