"""`tlt grow` as several processes that share one plan: the bytes of one process, one voice, and one fate."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from family_zoo import make_checkpoint
from safetensors.torch import load_file, save_file
from warm import quick

RANKS = 2
# The command line, on some ranks with the softmax temperature of grown heads left out.
TOOL = """
import os, sys
from tlt_cli.cli import main
if os.environ["RANK"] in sys.argv.pop(1).split(","):
    from tlt_cli.surgery import arrows, grow
    grow.sides = lambda *given, **options: arrows.sides(*given, **{**options, "temperature": 1.0})
main()
"""


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run_ranks(here: Path, *commands: Sequence[str | Path | int], wrong: str = "", ranks: int = RANKS) -> list[Ended]:
    """Ranks of `tlt`, with a command each or the same for all; `wrong` lists ranks whose maps are wrong."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        tool = [sys.executable, "-c", TOOL, wrong] if wrong else [str(quick() / "tlt")]
        command = [*tool, *map(str, commands[rank % len(commands)])]
        processes.append(
            subprocess.Popen(
                command, env=environment, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refused(ended: Ended) -> str:
    """The one line of a rank that refused."""
    assert ended.code == 1 and ended.stdout == "", ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tlt: error: ")
    return line


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder beside a model."""
    make_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


GROW = ("grow", "../model", "--to-dim", 64, "--to-head-dim", 12, "--max-shard-size", "60KB")


def test_two_ranks_write_the_bytes_of_one(here: Path) -> None:
    first, second = run_ranks(here, [*GROW, "-o", "two"])
    assert (first.code, second.code) == (0, 0), (first, second)
    assert (first.stdout, second.stdout, second.stderr) == ("two\n", "", "")
    assert "KL" in first.stderr
    subprocess.run([sys.executable, "-m", "tlt_cli", *map(str, GROW), "-o", "one", "-q"], cwd=here, check=True)
    one = contents(here / "one")
    assert len([name for name in one if name.endswith(".safetensors")]) > 2 * RANKS
    assert contents(here / "two") == one
    assert sorted(path.name for path in here.iterdir()) == ["one", "two"]


def test_torchrun(here: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--master-addr",
              "127.0.0.1", "--master-port", str(free_port()), "-m", "tlt_cli", *map(str, GROW), "-q"]  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(launch, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "model-dim64-headdim12\n", done.stderr
    assert (here / "model-dim64-headdim12" / "model.safetensors.index.json").is_file()


def test_what_all_refuse_is_said_by_each(here: Path) -> None:
    for ended in run_ranks(here, ["grow", "../model", "--to-dim", 33]):
        assert "nearest that work" in refused(ended)
    assert contents(here) == {}


@pytest.mark.parametrize("failing", range(RANKS))
def test_what_one_rank_refuses_all_do(here: Path, failing: int) -> None:
    commands = [list(GROW), list(GROW)]
    commands[failing][1] = "../missing"
    ended = run_ranks(here, *commands)
    assert "../missing: no such file or folder" in refused(ended[failing])
    assert f"rank {failing} of 2 failed, so nothing was written: ../missing" in refused(ended[1 - failing])
    assert contents(here) == {}


def test_weights_that_one_rank_meets_fail_both(here: Path) -> None:
    path = here.parent / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    lines = [refused(ended) for ended in run_ranks(here, GROW)]
    assert all("model.norm.weight holds 1 NaN" in line for line in lines)
    assert sum("failed, so nothing was written" in line for line in lines) == 1
    assert list(here.iterdir()) == []


def test_a_verification_that_fails_on_the_first_rank_fails_both(here: Path) -> None:
    first, second = (refused(ended) for ended in run_ranks(here, GROW, wrong="0,1"))
    assert "error: verification failed" in first
    assert "rank 0 of 2 failed, so nothing was written: verification failed" in second
    assert list(here.iterdir()) == []
