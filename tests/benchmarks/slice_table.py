"""Perplexity of a checkpoint cut to smaller sizes, order by order; each row but one is a `tlt slice`.

    python tests/benchmarks/slice_table.py CHECKPOINT CALIBRATION.txt EVALUATION.txt [--sizes 'ffn=288;ffn=192']

Every row is the command it names, run as a user would, and `tlt eval` of what it wrote with windows of 512 tokens. The
activation-ranked row is no option of the command: it is what Minitron orders by, for the comparison. "gap" is what is
left of the perplexity that the plain prefix cut adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tlt_cli.calibration.importance import ACTIVATION
from tlt_cli.calibration.slicing import calibrated
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import write
from tlt_cli.families import fit
from tlt_cli.model.nested import SIZES as SLICED
from tlt_cli.model.text import load_tokenizer, load_tokens
from tlt_cli.surgery.slice import Chosen, Wanted, sliced, wanted_sizes
from tlt_cli.surgery.targets import Sizes

CONTEXT = 512
ROWS: dict[str, list[str] | None] = {
    "prefix": [],
    "activation-ranked": None,
    "importance": ["--order", "importance"],
    "prefix, refit": ["--refit"],
    "importance, refit": ["--order", "importance", "--refit"],
    "pca": ["--order", "pca"],
    "pca, refit": ["--order", "pca", "--refit"],
}
SIZES = "ffn=288;ffn=192;heads=4,kv-heads=2;dim=96,ffn=384,heads=8,kv-heads=4;dim=96"  # the last takes all with it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--sizes", default=SIZES, help="options of `tlt slice`, sets of them apart by ';'")
    parser.add_argument("--rows", help="names, apart by ';' (default: all)")
    chosen = parser.parse_args()
    dense = perplexity(chosen.checkpoint, chosen.evaluation)
    print("| sizes | order | perplexity | gap | seconds |\n| --- | --- | --- | --- | --- |")
    print(f"| the whole | | {dense:.2f} | | |", flush=True)
    for listed in chosen.sizes.split(";"):
        sizes = dict(pair.split("=") for pair in listed.split(","))
        gap = 0.0
        for name in chosen.rows.split(";") if chosen.rows else ROWS:
            if name.startswith("pca") and "dim" not in sizes:
                continue  # there is nothing to turn
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                cut(chosen.checkpoint, sizes, name, chosen.calibration, Path(folder) / "out")
                seconds = time.perf_counter() - start
                found = perplexity(f"{folder}/out", chosen.evaluation)
            gap = gap or found - dense
            words = " ".join(f"{size} {value}" for size, value in sizes.items())
            print(f"| {words} | {name} | {found:.2f} | {(found - dense) / gap:.0%} | {seconds:.0f} |", flush=True)


def cut(source: str, sizes: dict[str, str], name: str, calibration: str, output: Path) -> None:
    """One row's checkpoint."""
    options = ROWS[name]
    if options is None:
        by_activation(
            source, {size.replace("-", "_"): int(value) for size, value in sizes.items()}, calibration, output
        )
        return
    words = ["slice", source, *(word for size, value in sizes.items() for word in (f"--{size}", value)), *options]
    words += ["--calibration", calibration, "--context", str(CONTEXT)] if options else []
    run([*words, "-o", str(output)])


def by_activation(source: str, sizes: dict[str, str], calibration: str, output: Path) -> None:
    """The entries of the largest mean |activation|."""
    checkpoint = open_checkpoint(source)
    fitted = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    ids = load_tokens(load_tokenizer(checkpoint.companions, fitted.sizes["vocab"]), [calibration]).ids
    named = Sizes(**{size.replace("-", "_"): int(value) for size, value in sizes.items()})
    wanted = {size: value for size, value in wanted_sizes(fitted, Wanted(sizes=named))[0].items() if size in SLICED}
    found = calibrated(
        fitted, checkpoint, ids, wanted, order="importance", refit=False, norm=None, context=CONTEXT, by=ACTIVATION
    )
    assert found.part is not None
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    plan = sliced(fitted, dtypes, Chosen(found.part))[1]
    files = {path.name: path for path in checkpoint.companions}
    write(output, plan.tensors, checkpoint, config=plan.config, metadata={"format": "pt"}, files=files)


def perplexity(source: str, text: str) -> float:
    return float(run(["eval", source, "--data", text, "--context", str(CONTEXT)])["perplexity"])


def run(words: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tlt_cli", *words, "--json", "-q"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"tlt {' '.join(words)}: {done.stderr}")
    report: dict[str, float] = json.loads(done.stdout)
    return report


if __name__ == "__main__":
    main()
