"""The command under `torchrun`: two ranks and one process take the same steps, however the windows are shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from family_zoo import make_checkpoint
from merging import made, merged
from test_ranks import RANKS, Ended, free_port, run_ranks
from test_world import SPLITS

STEPS, BOUND = 4, 3e-6  # nats
CASES = {
    # three windows for one rank and two for the other, one at a time: the one that is done waits in step
    # and so it is where what is held out makes three pieces, of which one rank gets two
    "all": ("--micro-batch", "1", "--held-out", "0.1"),
    # the balance of leaves is that of all windows of a step, not the mean of each rank's own
    "tree": ("--lora-tree", "2", "--rank", "2", "--route", "token", "--lr", "0.03"),
    # a block has its rows, whichever rank reads them
    "fractal": ("--fractal", "3", "--split", "2", "--micro-batch", "1"),
    # several models side by side are split as one is
    "merged": ("--micro-batch", "2"),
    # categories are found on each, and agreed on
    "ordered": ("--hierarchy", "emergent", "--clusters", "4", "--held-out", "0.1"),
    "taught": ("--distill", "model", "--lora", "2", "--held-out", "0.1"),
}


def losses(folder: Path, name: str, *arguments: str, ranks: int = 1, torchrun: bool = False) -> list[float]:
    """The loss of every step of `tlt train`, and all numbers of its first evaluation. Ranks are started by torchrun, or
    as it starts them, which is quicker."""
    command = ["train", "model", "--data", "text.txt", "--steps", str(STEPS), "--context", "32", "--batch-size", "5",
               "--save-every", "0", "-q", "-o", name, *arguments]  # fmt: skip
    if torchrun:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr",
                  "127.0.0.1", "--master-port", str(free_port()), "-m", "tlt_cli", *command]  # fmt: skip
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            launch, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        ended = [Ended(done.returncode, done.stdout, done.stderr)]
    else:
        ended = run_ranks(folder, command, ranks=ranks)
    assert {one.code for one in ended} == {0} and "".join(one.stdout for one in ended) == f"{name}\n", ended
    entries = [json.loads(line) for line in (folder / f"{name}.log.jsonl").read_text().splitlines()]
    found = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(found) == STEPS
    for name, value in next(entry["evaluation"] for entry in entries if "evaluation" in entry).items():
        values = value if isinstance(value, list) else [value]
        found += [model["loss"] for model in values] if name == "models" else values
    return found


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one_process(tmp_path: Path, case: str) -> None:
    if case in ("all", "merged", "ordered") and not SPLITS:
        pytest.skip("this torch does not split weights over CPU processes")
    sizes = {"vocab_size": 256, "num_hidden_layers": 2}
    if case == "merged":
        merged(tmp_path / "model", made(tmp_path, "llama", False, [sizes, {**sizes, "hidden_size": 48}]))
    else:
        make_checkpoint(tmp_path / "model", "llama", **sizes)
    (tmp_path / "text.txt").write_text(" ".join(str(number * number) for number in range(1000)))
    one = losses(tmp_path, "one", *CASES[case])
    two = losses(tmp_path, "two", *CASES[case], ranks=RANKS, torchrun=case == "all")
    print(f"{case}: {apart(one, two):.1e}")
    assert apart(one, two) <= BOUND
    if case == "tree":  # the mean of balances of parts of a step is another one
        assert apart(one, losses(tmp_path, "parts", *CASES[case], "--micro-batch", "3")) > 10 * BOUND
