"""Perplexity of a checkpoint cut to a share of its linear layers, method by method; each row is one `tlt factor`.

    python tests/benchmarks/factor_table.py CHECKPOINT CALIBRATION.txt EVALUATION.txt [OTHER.txt] [--keeps 0.8,0.6,0.4]

Every row is the command it names, run as a user would, and `tlt eval` of what it wrote with windows of 256 tokens. The
other text is a control out of the calibration's domain, not a claim about quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = {
    "plain SVD": ["--method", "svd"],
    "FWSVD": ["--method", "fisher", "--allocate", "uniform", "--refine", "none"],
    "every entry by its squared gradient": ["--method", "weighted", "--allocate", "uniform", "--refine", "none"],
    "ASVD": ["--method", "activation", "--allocate", "uniform", "--refine", "none"],
    "SVD-LLM's optimum": ["--method", "whiten", "--allocate", "uniform", "--refine", "none"],
    "raw energy, allocated": ["--method", "whiten", "--allocate", "global", "--refine", "none"],
    "K-FAC": ["--method", "kfac", "--allocate", "uniform", "--refine", "none"],
    "SVD-LLM's optimum, drift": ["--method", "whiten", "--allocate", "uniform", "--refine", "drift"],
    "SVD-LLM's optimum, block": ["--method", "whiten", "--allocate", "uniform", "--refine", "block"],
    "K-FAC, allocated": ["--refine", "none"],
    "K-FAC, allocated, drift": ["--refine", "drift"],
    "the default": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("other", nargs="?")
    parser.add_argument("--keeps", default="0.8,0.6,0.4")
    parser.add_argument("--rows", help="names, separated by ';' (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of the default row")
    chosen = parser.parse_args()
    texts = [text for text in (chosen.evaluation, chosen.other) if text]
    print("| method | keep | really kept | " + " | ".join(Path(text).name for text in texts) + " | seconds |")
    print("| --- | --- | --- |" + " --- |" * (len(texts) + 1))
    _row("dense", "1", "1", [_perplexity(chosen.checkpoint, text) for text in texts], 0.0)
    for name in chosen.rows.split(";") if chosen.rows else ROWS:
        for keep in chosen.keeps.split(","):
            for seed in range(chosen.seeds if name == "the default" else 1):
                with tempfile.TemporaryDirectory() as folder:
                    words = ["factor", chosen.checkpoint, "--keep", keep, *ROWS[name], "-o", f"{folder}/out"]
                    words += ["--seed", str(seed)] if seed else []
                    words += [] if "svd" in ROWS[name] else ["--calibration", chosen.calibration]
                    start = time.perf_counter()
                    report = _run(words)
                    seconds = time.perf_counter() - start
                    found = [_perplexity(f"{folder}/out", text) for text in texts]
                    label = f"{name}, seed {seed}" if seed else name
                    _row(label, keep, f"{report['keep']:.4f}", found, seconds)


def _row(name: str, keep: str, kept: str, found: list[float], seconds: float) -> None:
    print(f"| {name} | {keep} | {kept} | " + " | ".join(f"{x:.2f}" for x in found) + f" | {seconds:.0f} |", flush=True)


def _perplexity(source: str, text: str) -> float:
    return float(_run(["eval", source, "--data", text, "--context", "256"])["perplexity"])


def _run(words: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tlt_cli", *words, "--json", "-q"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"tlt {' '.join(words)}: {done.stderr}")
    report: dict[str, float] = json.loads(done.stdout)
    return report


if __name__ == "__main__":
    main()
