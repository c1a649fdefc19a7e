"""What merging costs beside `cp`: wall and peak memory of merging four models and of taking one out again.

    python tests/benchmarks/merge.py [--gigabytes 0.4] [--models 4] [--folder DIR]

Random bf16 llamas of that size each; every measurement is a process of its own, all in turn on the same files, several
times over, and the fastest run of each counts. `cp` copies all the models, and "times cp" is to its time per byte read
and written. The bound is 2, and 0.3 GiB. `--mergekit COMMAND` names an installed mergekit-yaml, whose linear merge of
two of the models, which writes one model, is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from runpy import run_path
from typing import Any

_IO = run_path(str(Path(__file__).with_name("io.py")))  # a module of that name is Python's own
make_model, measured, size_of = _IO["make_model"], _IO["_measured"], _IO["_bytes"]

YAML = """merge_method: linear
dtype: bfloat16
models:
  - {{model: {0}, parameters: {{weight: 0.5}}}}
  - {{model: {1}, parameters: {{weight: 0.5}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.4, help="size of each model")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--mergekit", help="an installed mergekit-yaml to measure beside")
    chosen = parser.parse_args()
    print("| what | seconds | times cp | peak GiB | written GB |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as work:
        for run, ratio in measure(Path(work), chosen.gigabytes, chosen.models, chosen.rounds, chosen.mergekit):
            print(
                f"| {run.name} | {run.seconds:.2f} | {ratio:.2f} | {run.peak / 2**30:.3f} | {run.written / 1e9:.2f} |"
            )


def measure(work: Path, gigabytes: float, models: int, rounds: int, mergekit: str | None) -> list[tuple[Any, float]]:
    """All runs, each with its ratio to `cp` for the bytes that it reads and writes."""
    sources = [work / f"model{number}" for number in range(models)]
    for source in sources:
        make_model(source, gigabytes)
    size, paths = sum(map(size_of, sources)), list(map(str, sources))
    commands = {
        "cp": ["sh", "-c", f"mkdir OUT && cp -r {' '.join(paths)} OUT"],
        "cp, synced": ["sh", "-c", f"mkdir OUT && cp -r {' '.join(paths)} OUT && sync -f OUT"],
        "merge": ["tlt", "merge", *paths, "-o", "OUT", "--no-verify"],
        "merge, verified": ["tlt", "merge", *paths, "-o", "OUT"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    if mergekit:
        (work / "linear.yml").write_text(YAML.format(*paths))
        commands["mergekit linear, two"] = [mergekit, str(work / "linear.yml"), "OUT"]
    best: dict[str, Any] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            out = work / "out"
            run = measured(name, [part.replace("OUT", str(out)) for part in command], out)
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if run is not None:
                best[name] = min(run, best.get(name, run), key=lambda one: one.seconds)
    per_byte = best["cp"].seconds / (2 * size)
    return [(run, run.seconds / (per_byte * (size + run.written)) if run.written else 0.0) for run in best.values()]


if __name__ == "__main__":
    main()
