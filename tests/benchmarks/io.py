"""What writing costs beside `cp`: wall and peak memory of copying, growing and slicing a checkpoint, at two sizes.

    python tests/benchmarks/io.py [--gigabytes 1.5] [--folder DIR]

A random bf16 checkpoint in the shape of a llama is made on the disk of DIR, row block by row block. Each measurement is
a process of its own; all run in turn on the same files, several times over, and the fastest run of each counts. `cp`
reads and writes the model, and "times cp" is to its time per byte read and written: growing writes more than it reads.
What is written here is also synced to the disk, which `cp` does not do. The bound is 2, importing torch not counted;
memory has to stay under 0.35 GiB plus the largest tensor's work, and must not rise with the size of the model.
The marks to compare with, measured elsewhere on 1.5 GB models: mergekit's linear merge of two, 6.3 s and 2.3 GiB;
a prototype that streams, 1.7 s and 0.27 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tlt_cli.checkpoint.header import build_header

_BLOCK = 1 << 22
_LAYERS = 16
_SMALL = bytes(0x3C | byte & 0x80 for byte in range(256))  # the high byte: sign and exponent

_COPY = """
import sys
from pathlib import Path
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import write
source = open_checkpoint(sys.argv[1])
same = [PlannedTensor(info.name, info.shape, {dtype}, info.name) for info in source.tensors.values()]
write(Path(sys.argv[2]), same, source, config=source.config, metadata={{}})
"""


@dataclass(frozen=True)
class Run:
    """One measured process: seconds, peak resident bytes, bytes of its output."""

    name: str
    seconds: float
    peak: int
    written: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the larger model")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    chosen = parser.parse_args()
    print("| model | what | seconds | times cp | peak GiB | written GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for gigabytes in (chosen.gigabytes / 2, chosen.gigabytes):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as work:
            for run, ratio in measure(Path(work), gigabytes, chosen.rounds):
                print(
                    f"| {gigabytes:g} GB | {run.name} | {run.seconds:.2f} | {ratio:.2f} "
                    f"| {run.peak / 2**30:.3f} | {run.written / 1e9:.2f} |",
                    flush=True,
                )


def measure(work: Path, gigabytes: float, rounds: int) -> list[tuple[Run, float]]:
    """All runs on one model, each with its ratio to `cp` for the bytes that it reads and writes."""
    source = work / "source"
    hidden = make_model(source, gigabytes)
    size = _bytes(source)
    python = [sys.executable, "-c"]
    commands = {
        "cp": ["cp", "-r", str(source), "OUT"],
        "cp, synced": ["sh", "-c", f"cp -r {source} OUT && sync -f OUT"],
        "copy": [*python, _COPY.format(dtype="info.dtype"), str(source), "OUT"],
        "cast to F16": [*python, _COPY.format(dtype="'F16'"), str(source), "OUT"],
        "import torch": [*python, "import torch"],
    }
    if shutil.which("tlt"):
        wide = hidden * 5 // 4 // 64 * 64
        grow = ["tlt", "grow", str(source), "--to-dim", str(wide), "-o", "OUT", "--no-verify"]
        commands[f"grow {hidden} to {wide}"] = grow
        narrow = hidden // 2 // 64 * 64
        for what, options in (
            (f"slice {hidden} to {narrow}", ["--dim", str(narrow)]),
            (f"slice ffn {4 * hidden} to {2 * hidden}", ["--ffn", str(2 * hidden)]),
        ):
            commands[what] = ["tlt", "slice", str(source), *options, "-o", "OUT", "--no-verify"]
    best: dict[str, Run] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            out = work / "out"
            run = _measured(name, [part.replace("OUT", str(out)) for part in command], out)
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if run is not None:
                best[name] = min(run, best.get(name, run), key=lambda one: one.seconds)
    per_byte = best["cp"].seconds / (2 * size)
    return [(run, run.seconds / (per_byte * (size + run.written)) if run.written else 0.0) for run in best.values()]


def make_model(folder: Path, gigabytes: float) -> int:
    """A llama of about that many GB, its width chosen to fit; returns the width."""
    vocab = 32_000
    hidden = 64
    while 2 * sum(rows * columns for rows, columns in _shapes(hidden + 64, vocab).values()) <= gigabytes * 1e9:
        hidden += 64
    folder.mkdir()
    shapes = _shapes(hidden, vocab)
    header, starts = build_header(
        [(name, "BF16", shape if shape[0] > 1 else shape[1:]) for name, shape in shapes.items()], {"format": "pt"}
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for name in sorted(starts, key=starts.__getitem__):
            left = 2 * shapes[name][0] * shapes[name][1]
            while left:
                file.write(_noise(min(left, _BLOCK)))
                left -= min(left, _BLOCK)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "num_hidden_layers": _LAYERS, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()
    return hidden


def _shapes(hidden: int, vocab: int) -> dict[str, tuple[int, int]]:
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (1, hidden)}
    shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(_LAYERS):
        start = f"model.layers.{layer}"
        for part in ("q", "k", "v", "o"):
            shapes[f"{start}.self_attn.{part}_proj.weight"] = (hidden, hidden)
        shapes[f"{start}.mlp.gate_proj.weight"] = (4 * hidden, hidden)
        shapes[f"{start}.mlp.up_proj.weight"] = (4 * hidden, hidden)
        shapes[f"{start}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
        shapes[f"{start}.input_layernorm.weight"] = (1, hidden)
        shapes[f"{start}.post_attention_layernorm.weight"] = (1, hidden)
    return shapes


def _noise(count: int) -> bytes:
    """`count` bytes of bf16 numbers with random digits and signs, all about 0.01."""
    raw = bytearray(os.urandom(count))
    raw[1::2] = bytes(raw[1::2]).translate(_SMALL)
    return bytes(raw)


def _measured(name: str, command: list[str], out: Path) -> Run | None:
    """None where the command fails, with what it said on stderr."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"{name}: failed: {said.decode().strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(name, seconds, usage.ru_maxrss * unit, _bytes(out))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
