"""How long `tlt --help` takes beside an empty typer app: python tests/benchmarks/startup.py [RUNS].

Prints the median of both and their ratio; the aim is at most 1.5.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

BARE = """
import typer
app = typer.Typer()
@app.command()
def one() -> None: ...
@app.command()
def two() -> None: ...
app(["--help"])
"""
OURS = "from tlt_cli.cli import app; app(['--help'])"


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    pairs = [(seconds(BARE), seconds(OURS)) for _ in range(runs)]  # in turns, so that both meet the same load
    bare, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"bare typer app {bare:.3f} s, tlt --help {ours:.3f} s, ratio {ours / bare:.2f}")


if __name__ == "__main__":
    main()
