"""Broken checkpoints: a table of makers, each with what the refusal must say and which commands must refuse it.

Every maker starts from one whole checkpoint (a tiny random model whose vocabulary holds the 256 bytes, so it needs no
tokenizer) and breaks one thing. `tlt inspect` shows whatever has whole headers, so it refuses fewer of them.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from family_zoo import make_checkpoint
from safetensors.torch import load, save

FILE_FAULT = ("inspect", "eval", "grow")  # the headers themselves are wrong
MODEL_FAULT = ("eval", "grow")  # headers are whole, but they are not what a family has
TEXT_FAULT = ("eval",)  # only what needs text meets it
GOOD_TEXT = "good.txt"
SINGLE, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"

Maker = Callable[[Path], Path]


@dataclass(frozen=True)
class Broken:
    """`make(folder)` returns what the user names as SRC; the one line of refusal contains `message`.

    `commands` are those that must refuse it; eval reads the text `data` of the folder (a good one unless said).
    """

    make: Maker
    message: str
    commands: tuple[str, ...] = FILE_FAULT
    data: str = GOOD_TEXT


@cache
def _whole() -> dict[str, bytes]:
    """The files of the whole checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), "llama", vocab_size=300)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def whole(folder: Path) -> Path:
    """The checkpoint before anything is broken, in a folder with a good text beside it."""
    path = folder / "model"
    path.mkdir(parents=True)
    for name, content in _whole().items():
        (path / name).write_bytes(content)
    (folder / GOOD_TEXT).write_text("Once upon a time there was a model that nobody had broken. " * 3)
    return path


def sharded(folder: Path) -> Path:
    """The same checkpoint as two shards and an index."""
    path = whole(folder)
    tensors = load((path / SINGLE).read_bytes())
    (path / SINGLE).unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in ((FIRST, names[: len(names) // 2]), (SECOND, names[len(names) // 2 :])):
        (path / shard).write_bytes(save({name: tensors[name] for name in part}, {"format": "pt"}))
        weight_map.update(dict.fromkeys(part, shard))
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


# What to break


def weights(change: Callable[[bytes], bytes], file: str = SINGLE, start: Maker = whole) -> Maker:
    """Other bytes in a weight file."""

    def make(folder: Path) -> Path:
        path = start(folder)
        (path / file).write_bytes(change((path / file).read_bytes()))
        return path

    return make


def header(change: Callable[[dict[str, Any]], object]) -> Maker:
    """Another JSON in the header, the data as it was."""

    def rewrite(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        parsed = json.loads(content[8 : 8 + length])
        change(parsed)
        text = json.dumps(parsed).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return weights(rewrite)


def header_text(old: str, new: str) -> Maker:
    """The header's own text, where a dict could not hold what is wrong."""

    def rewrite(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        text = content[8 : 8 + length].decode()
        assert old in text
        replaced = text.replace(old, new, 1).encode()
        return struct.pack("<Q", len(replaced)) + replaced + content[8 + length :]

    return weights(rewrite)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], start: Maker = whole, file: str = SINGLE) -> Maker:
    """Other tensors, in a file that is whole."""

    def rewrite(content: bytes) -> bytes:
        held = load(content)
        change(held)
        return save({name: value.clone().contiguous() for name, value in held.items()}, {"format": "pt"})

    return weights(rewrite, file, start)


def config(*removed: str, start: Maker = whole, **keys: Any) -> Maker:
    """Other keys in config.json."""

    def make(folder: Path) -> Path:
        path = start(folder)
        held = {**json.loads((path / CONFIG).read_text()), **keys}
        (path / CONFIG).write_text(json.dumps({key: value for key, value in held.items() if key not in removed}))
        return path

    return make


def file(name: str, content: bytes | str, start: Maker = whole) -> Maker:
    """Another file in the folder, or another content of one."""

    def make(folder: Path) -> Path:
        path = start(folder)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def index(change: Callable[[dict[str, Any]], object]) -> Maker:
    """Another index beside the two shards."""

    def make(folder: Path) -> Path:
        path = sharded(folder)
        held = json.loads((path / INDEX).read_text())
        change(held)
        (path / INDEX).write_text(json.dumps(held))
        return path

    return make


def without(name: str, start: Maker = whole) -> Maker:
    """A file gone."""

    def make(folder: Path) -> Path:
        path = start(folder)
        (path / name).unlink()
        return path

    return make


def text(content: bytes) -> Maker:
    """A whole checkpoint, and the text bad.txt beside it."""

    def make(folder: Path) -> Path:
        (path := whole(folder)).parent.joinpath("bad.txt").write_bytes(content)
        return path

    return make


def shard_elsewhere(name: str) -> Maker:
    """An index that puts one tensor in another place; a real weight file lies there, to be tempting."""

    def make(folder: Path) -> Path:
        path = index(lambda held: held["weight_map"].update({QUERY: name.format(folder=folder)}))(folder)
        (folder / "outside.safetensors").write_bytes((path / FIRST).read_bytes())
        (path / "sub").mkdir()
        (path / "sub" / "inside.safetensors").write_bytes((path / FIRST).read_bytes())
        return path

    return make


def one_file(name: str, content: bytes) -> Maker:
    """A single file as SRC."""

    def make(folder: Path) -> Path:
        whole(folder)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def pickled(content: Any = None) -> bytes:
    import io

    stream = io.BytesIO()
    torch.save(content or {"weight": torch.zeros(2)}, stream)
    return stream.getvalue()


def only_pickles(folder: Path) -> Path:
    path = without(SINGLE)(folder)
    (path / "pytorch_model.bin").write_bytes(pickled())
    return path


def empty_folder(folder: Path) -> Path:
    whole(folder)
    (folder / "empty").mkdir()
    return folder / "empty"


def nowhere(folder: Path) -> Path:
    whole(folder)
    return folder / "nowhere.safetensors"


def link_loop(folder: Path) -> Path:
    whole(folder)
    (folder / "a.safetensors").symlink_to(folder / "b.safetensors")
    (folder / "b.safetensors").symlink_to(folder / "a.safetensors")
    return folder / "a.safetensors"


def weights_loop(folder: Path) -> Path:
    path = without(SINGLE)(folder)
    (path / SINGLE).symlink_to(path / SINGLE)
    return path


def pipe(folder: Path) -> Path:
    whole(folder)
    os.mkfifo(folder / "pipe.safetensors")
    return folder / "pipe.safetensors"


def pipe_inside(folder: Path) -> Path:
    path = without(SINGLE)(folder)
    os.mkfifo(path / SINGLE)
    return path


def folder_as_weights(folder: Path) -> Path:
    path = without(SINGLE)(folder)
    (path / SINGLE).mkdir()
    return path


def folder_by_suffix(folder: Path) -> Path:
    whole(folder)
    (folder / "x.safetensors").mkdir()
    return folder / "x.safetensors"


def unreadable(folder: Path) -> Path:
    path = whole(folder)
    (path / SINGLE).chmod(0)
    return path


def bare(folder: Path) -> Path:
    """A file without config.json: shapes alone do not tell the heads."""
    path = whole(folder)
    (path / SINGLE).rename(folder / "bare.safetensors")
    return folder / "bare.safetensors"


def adapter(folder: Path) -> Path:
    whole(folder)
    path = folder / "adapter"
    path.mkdir()
    tensor = torch.zeros(4, 32)
    content = save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": tensor}, {"format": "pt"})
    (path / "adapter_model.safetensors").write_bytes(content)
    return path


def own_table(content: str) -> Maker:
    """The model brings its own family table, and that is what is wrong."""
    return file("tlt.toml", content)


def tokenizer_of_ids(largest: int) -> str:
    """A tokenizer.json whose word "time" has an id of its own choosing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    engine = Tokenizer(models.WordLevel({"?": 0, "upon": 1, "time": largest}, unk_token="?"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(engine.to_str())


def _shape(name: str, *shape: int) -> Callable[[dict[str, Any]], object]:
    return lambda held: held[name].update(shape=list(shape))


def _move(name: str, by: int) -> Callable[[dict[str, Any]], object]:
    return lambda held: held[name].update(data_offsets=[offset + by for offset in held[name]["data_offsets"]])


def _last(held: dict[str, Any]) -> str:
    return max((name for name in held if name != "__metadata__"), key=lambda name: held[name]["data_offsets"][1])


def _set(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(value)


def _copy_first_layer(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if ".layers.0." in name]:
        held[name.replace(".0.", ".3.")] = held[name]


def _drop(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def drop(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if part in name]:
            del held[name]

    return drop


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

BROKEN: dict[str, Broken] = {
    # one file's bytes
    "header cut short": Broken(weights(lambda b: b[:200]), "model.safetensors: its header takes"),
    "length cut short": Broken(weights(lambda b: b[:5]), "5 bytes long, but a safetensors file starts with an 8-byte"),
    "empty weights": Broken(weights(lambda b: b""), "model.safetensors: 0 bytes long"),
    "data cut short": Broken(weights(lambda b: b[:-1]), "beyond the end of the file"),
    "data cut in half": Broken(weights(lambda b: b[: len(b) // 2]), "it was cut short"),
    "trailing bytes": Broken(weights(lambda b: b + b"\0"), "1 trailing bytes behind"),
    "header length 0": Broken(weights(lambda b: bytes(8) + b[8:]), "its header length is 0"),
    "header length huge": Broken(weights(lambda b: b"\xff" * 8 + b[8:]), "18446744073709551615 bytes, more than"),
    "header length past the end": Broken(
        weights(lambda b: struct.pack("<Q", 99_000_000) + b[8:]), "its header takes 99000000 bytes, but the file ends"
    ),
    "header not JSON": Broken(weights(lambda b: b[:8] + b"?" + b[9:]), "not valid JSON"),
    "header not UTF-8": Broken(weights(lambda b: b[:12] + b"\xff" + b[13:]), "not valid UTF-8"),
    "header a list": Broken(weights(lambda b: struct.pack("<Q", 2) + b"[]"), "the JSON must be an object"),
    "zeroed weights": Broken(weights(lambda b: bytes(len(b))), "its header length is 0"),
    # one file's header
    "overlapping tensors": Broken(header(_move(QUERY, -4)), "overlaps"),
    "a hole": Broken(
        header(lambda held: _move(_last(held), 4)(held)), "beyond the end of the file"
    ),
    "a hole with its bytes": Broken(
        weights(lambda b: b + bytes(4), start=header(lambda held: _move(_last(held), 4)(held))), "a hole of 4 bytes"
    ),
    "offsets out of range": Broken(header(lambda held: _move(_last(held), 10**9)(held)), "beyond the end of the file"),
    "offsets reversed": Broken(header(lambda h: h[QUERY]["data_offsets"].reverse()), "after its end at"),
    "offsets negative": Broken(header(lambda h: h[QUERY].update(data_offsets=[-4, 4092])), "wanted [begin, end]"),
    "unknown dtype": Broken(header(lambda h: h[QUERY].update(dtype="float32")), "unknown dtype 'float32'; known are"),
    "dtype too wide": Broken(header(lambda h: h[QUERY].update(dtype="F64")), f"'{QUERY}' is F64 [32, 32] = 8192 bytes"),
    "shape too large": Broken(header(_shape(QUERY, 32, 33)), f"'{QUERY}' is F32 [32, 33] = 4224 bytes, but"),
    "shape negative": Broken(header(_shape(QUERY, -32, -32)), "wanted a list of integers from 0 up"),
    "shape overflowing": Broken(header(_shape(QUERY, 2**40, 2**40)), "overflows 63 bits"),
    "shape of text": Broken(header(lambda h: h[QUERY].update(shape="32, 32")), "has shape '32, 32'"),
    "a tensor without offsets": Broken(header(lambda h: h[QUERY].pop("data_offsets")), "must have dtype, shape and"),
    "a name twice": Broken(header_text(".0.self_attn.q_proj", ".1.self_attn.q_proj"), f"'{QUERY}' occurs 2 times"),
    "metadata not text": Broken(header(lambda h: h["__metadata__"].update(step=3)), "'step' must be a string, not 3"),
    "metadata a list": Broken(header(lambda h: h.update(__metadata__=["pt"])), "__metadata__ must be an object"),
    "metadata config broken": Broken(
        lambda folder: header(lambda h: h["__metadata__"].update(config="{"))(folder) / SINGLE,
        "__metadata__ config: not valid JSON",
    ),
    "a name of two lines": Broken(header_text("model.norm.weight", r"model\nnorm.weight"), "has a control character"),
    # what lies at the path
    "nothing there": Broken(nowhere, "nowhere.safetensors: no such file or folder"),
    "an empty folder": Broken(empty_folder, "no checkpoint in it: wanted model.safetensors"),
    "no weights": Broken(without(SINGLE), "no checkpoint in it: wanted model.safetensors"),
    "only pickles": Broken(only_pickles, "holds only pickle weights (pytorch_model.bin): pickle files can run code"),
    "a pickle by suffix": Broken(one_file("model.bin", pickled()), "model.bin: refused: pickle files can run code"),
    "a pickle renamed": Broken(one_file("model.safetensors", pickled()), "it is a pickle under another name"),
    "an old pickle renamed": Broken(one_file("model.st", b"\x80\x02}q\x00.." * 9), "it is a pickle under another name"),
    "an LFS pointer": Broken(
        one_file("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "run `git lfs pull`"
    ),
    "another kind of file": Broken(one_file("model.gguf", b"GGUF"), "model.gguf: not a checkpoint: wanted a .safe"),
    "a text file": Broken(one_file("model.txt", b"hello"), "model.txt: not a checkpoint"),
    "a loop of links": Broken(link_loop, "a.safetensors: a link that leads nowhere"),
    "weights a loop of links": Broken(weights_loop, "generation_config.json, model.safetensors (not a file)"),
    "a pipe": Broken(pipe, "pipe.safetensors: not a regular file"),
    "a pipe inside": Broken(pipe_inside, "model.safetensors (not a file)"),
    "a folder as weights": Broken(folder_as_weights, "model.safetensors (not a file)"),
    "a folder by suffix": Broken(folder_by_suffix, "x.safetensors: no checkpoint in it"),
    "unreadable weights": Broken(unreadable, "model.safetensors: cannot open: Permission denied"),
    "two weight files": Broken(
        file("other.safetensors", b"", start=lambda folder: _renamed(folder, SINGLE, "one.safetensors")),
        "holds 2 weight files (one.safetensors, other.safetensors) and neither model.safetensors nor",
    ),
    # shards
    "a missing shard": Broken(without(SECOND, sharded), f"1 of 2 shards missing: {SECOND}"),
    "a shard cut short": Broken(weights(lambda b: b[:-9], SECOND, sharded), f"{SECOND}: tensor"),
    "index not JSON": Broken(file(INDEX, "{", sharded), f"{INDEX}: not valid JSON"),
    "index a list": Broken(file(INDEX, "[]", sharded), f"{INDEX}: the JSON must be an object"),
    "index without a map": Broken(index(lambda held: held.pop("weight_map")), "must have a weight_map"),
    "index of an empty map": Broken(index(lambda held: held.update(weight_map={})), "must have a weight_map"),
    "index of numbers": Broken(index(lambda held: held["weight_map"].update({QUERY: 1})), f"puts '{QUERY}' in 1;"),
    "index leading up": Broken(shard_elsewhere("../outside.safetensors"), "in '../outside.safetensors'; wanted the"),
    "index leading to a root": Broken(shard_elsewhere("{folder}/outside.safetensors"), "wanted the plain name of"),
    "index leading into a subfolder": Broken(shard_elsewhere("sub/inside.safetensors"), "wanted the plain name of"),
    "index leading to a pickle": Broken(shard_elsewhere("pytorch_model.bin"), "wanted the plain name of a"),
    "index of a tensor that is not there": Broken(
        index(lambda held: held["weight_map"].update({"model.ghost.weight": FIRST})),
        "lists 1 tensors that their shards lack, the first is 'model.ghost.weight'",
    ),
    "index without a tensor": Broken(
        index(lambda held: held["weight_map"].pop(QUERY)), f"'{QUERY}' is in {SECOND}, but the index does not list it"
    ),
    "index with a tensor elsewhere": Broken(
        index(lambda held: held["weight_map"].update({QUERY: FIRST})), f"but the index puts it in {FIRST}"
    ),
    "a tensor in two shards": Broken(
        tensors(lambda held: held.update({"lm_head.weight": torch.zeros(2)}), sharded, SECOND),
        "'lm_head.weight' is in two shards",
    ),
    "a stale file beside the index": Broken(
        file(SINGLE, b"", sharded), "cannot tell which of the two is stale: delete it"
    ),
    # config.json
    "config not JSON": Broken(file(CONFIG, "{'a': 1}"), "config.json: not valid JSON"),
    "config empty": Broken(file(CONFIG, ""), "config.json: not valid JSON"),
    "config a list": Broken(file(CONFIG, "[1]"), "config.json: must be a JSON object, not list"),
    "config nested beyond reason": Broken(file(CONFIG, "[" * 200_000), "not valid JSON: nested too deeply"),
    "config not UTF-8": Broken(file(CONFIG, b'{"a": "\xff"}'), "config.json: not valid UTF-8 at byte 7"),
    "config of a lone surrogate": Broken(file(CONFIG, r'{"a": "\ud800"}'), "config.json: not valid JSON"),
    "config of NaN": Broken(config(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number", MODEL_FAULT),
    "sizes of text": Broken(config(hidden_size="32"), "hidden_size='32'; expected a whole number", MODEL_FAULT),
    "sizes negative": Broken(config(hidden_size=-32), "hidden_size=-32; expected a whole number", MODEL_FAULT),
    "sizes zero": Broken(config(num_attention_heads=0), "num_attention_heads=0; expected a whole number", MODEL_FAULT),
    "sizes true": Broken(config(num_hidden_layers=True), "num_hidden_layers=True; expected a whole", MODEL_FAULT),
    "sizes broken": Broken(config(intermediate_size=48.5), "intermediate_size=48.5; expected a whole", MODEL_FAULT),
    "a size missing": Broken(config("vocab_size"), "config.json has no vocab_size", MODEL_FAULT),
    "no architecture": Broken(
        config("architectures", "model_type"), "config.json has neither architectures nor model_type", MODEL_FAULT
    ),
    "an unknown architecture": Broken(
        config(architectures=["BertModel"], model_type="bert"), "no family table for 'BertModel'", MODEL_FAULT
    ),
    "architectures of text": Broken(config(architectures="LlamaForCausalLM"), "must be a list of names", MODEL_FAULT),
    "another family's config": Broken(
        config(architectures=["GPT2LMHeadModel"]), "is in the file but in no row of the gpt2 table", MODEL_FAULT
    ),
    "heads that do not divide": Broken(config("head_dim", num_attention_heads=5), "is not a whole number", MODEL_FAULT),
    "groups cut in half": Broken(
        config(num_key_value_heads=3), "num_attention_heads / num_key_value_heads = 4 / 3 is not a whole", MODEL_FAULT
    ),
    "odd rotary halves": Broken(config(head_dim=7), "head_dim / 2 = 7 / 2 is not a whole number", MODEL_FAULT),
    "a vocabulary too large": Broken(
        config(vocab_size=301), "weight is [300, 32], but the llama table says", MODEL_FAULT
    ),
    "a tied flag of text": Broken(config(tie_word_embeddings="no"), "must be true or false", MODEL_FAULT),
    "biases switched on": Broken(config(attention_bias=True), "self_attn.q_proj.bias is missing", MODEL_FAULT),
    "a quantized config": Broken(config(quantization_config={"bits": 4}), "sets quantization_config", MODEL_FAULT),
    "YaRN": Broken(config(rope_parameters=YARN), "rotary scaling 'yarn'", MODEL_FAULT),
    "LongRoPE": Broken(config(rope_parameters=LONG), "rotary scaling 'longrope'", MODEL_FAULT),
    "rope of text": Broken(config(rope_parameters="yarn"), "rope_parameters must be an object", MODEL_FAULT),
    "half rotated heads": Broken(config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5", MODEL_FAULT),
    "an unknown activation": Broken(config(hidden_act="mish"), "activation 'mish' is not known", MODEL_FAULT),
    "an activation of a list": Broken(config(hidden_act=["silu"]), "hidden_act must be a name", MODEL_FAULT),
    # tensors against the table
    "a tensor of another shape": Broken(
        tensors(lambda held: held.update({QUERY: torch.zeros(32, 31)})),
        f"{QUERY} is [32, 31], but the llama table says '(kv group 2 rotary) <- hidden' = [32, 32] with hidden=32",
        MODEL_FAULT,
    ),
    "a transposed tensor": Broken(
        tensors(lambda held: held.update({k: v.T for k, v in held.items() if "1.mlp.up_proj" in k})),
        "model.layers.1.mlp.up_proj.weight is [32, 48], but the llama table says 'ffn <- hidden' = [48, 32]",
        MODEL_FAULT,
    ),
    "a missing tensor": Broken(
        tensors(lambda held: held.pop(QUERY)), f"{QUERY} is missing; the llama table expects it in every", MODEL_FAULT
    ),
    "a missing layer": Broken(tensors(_drop(".layers.2.")), "model.layers.2.input_layernorm.weight is", MODEL_FAULT),
    "an extra layer": Broken(tensors(_copy_first_layer), "model.layers.3.", MODEL_FAULT),
    "more layers than there are": Broken(config(num_hidden_layers=10**12), "layers.3.", MODEL_FAULT),
    "an extra tensor": Broken(
        tensors(lambda held: held.update({"model.extra.weight": torch.zeros(3)})),
        "model.extra.weight [3] is in the file but in no row of the llama table; write a table",
        MODEL_FAULT,
    ),
    "no tensors": Broken(tensors(lambda held: held.clear()), "is missing; the llama table expects it", MODEL_FAULT),
    "no head": Broken(tensors(_drop("lm_head")), "lm_head.weight is missing", MODEL_FAULT),
    "tied, yet two values": Broken(
        config(tie_word_embeddings=True), "lm_head.weight and model.embed_tokens.weight differ in value", MODEL_FAULT
    ),
    "heads unknown": Broken(bare, "key/value heads from shapes alone; pass --axis kv=N", MODEL_FAULT),
    "an adapter": Broken(adapter, "no family matches", MODEL_FAULT),
    "NaN in the weights": Broken(tensors(_set(float("nan"))), "layers.1.mlp.up_proj.weight holds", MODEL_FAULT),
    "infinity in the weights": Broken(tensors(_set(float("inf"))), "layers.1.mlp.up_proj.weight holds", MODEL_FAULT),
    # a table of its own
    "own table not TOML": Broken(own_table("[axes"), "family table tlt: not valid TOML"),
    "own table empty": Broken(own_table(""), "family table tlt: the section [axes] is missing"),
    # tokenizer and text
    "tokenizer not JSON": Broken(file("tokenizer.json", "{"), "tokenizer.json", TEXT_FAULT),
    "tokenizer empty": Broken(file("tokenizer.json", ""), "tokenizer.json", TEXT_FAULT),
    "tokenizer of nothing": Broken(file("tokenizer.json", "{}"), "tokenizer.json", TEXT_FAULT),
    "tokenizer beyond the vocabulary": Broken(
        file("tokenizer.json", tokenizer_of_ids(300)), "disagrees with the vocabulary: id 300", TEXT_FAULT
    ),
    "vocab.json broken": Broken(
        file("vocab.json", "{", file("merges.txt", "#version: 0.2\n")), "vocab.json", TEXT_FAULT
    ),
    "only SentencePiece": Broken(file("tokenizer.model", b"\x0a"), "SentencePiece", TEXT_FAULT),
    "text not UTF-8": Broken(text(b"caf\xe9 "), "bad.txt is not UTF-8 text: byte 3 is 0xe9", TEXT_FAULT, "bad.txt"),
    "text empty": Broken(text(b""), "bad.txt is empty", TEXT_FAULT, "bad.txt"),
    "text of one token": Broken(text(b"a"), "1 token; at least 2 are needed", TEXT_FAULT, "bad.txt"),
    "text missing": Broken(whole, "bad.txt: no such file", TEXT_FAULT, "bad.txt"),
    "text a folder": Broken(whole, "cannot read", TEXT_FAULT, "model"),
}  # fmt: skip


def _renamed(folder: Path, old: str, new: str) -> Path:
    path = whole(folder)
    (path / old).rename(path / new)
    return path
