"""Two ranks train what one process trains, and either goes on from the state of the other."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_loop
import torch
from family_zoo import make_checkpoint
from safetensors.torch import load_file
from small_loop import CASES, MIDDLE, SPLITS, STOP, Run, everything, model_of, start, train
from test_ranks import RANKS, free_port
from torch import Tensor

from tlt_cli.checkpoint.ranks import Ranks
from tlt_cli.errors import TltError
from tlt_cli.training.state import load_state, save_state
from tlt_cli.training.world import ALONE, World, portion, start_world

# Losses in nats, and weights and moments relative to the largest of their tensor; Muon computes in bfloat16.
LOSS_BOUND, STATE_BOUND = (3e-6, 1e-3), (3e-5, 2e-2)


def state_of(here: Path, case: str, ranks: str) -> Path:
    return here / f"{case}-{ranks}" / f"step-{MIDDLE:08d}"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks and one process left: per case `<case>-<what>.safetensors` of two, states of both."""
    base = tmp_path_factory.getbasetemp()
    here = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world"
    with here.with_suffix(".lock").open("w") as lock:  # one of all the processes that run tests does it for all
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not here.exists():
            prepare(here)
    return here


def prepare(here: Path) -> None:
    make_checkpoint(here / "llama", "llama", tied=True)
    make_checkpoint(here / "gpt2", "gpt2", tied=True)
    for case in CASES:
        run = start(model_of(here, case), case, ALONE)
        train(run, 0, MIDDLE)
        save_state(here / f"{case}-one", MIDDLE, run.trained, run.optimizers, {"recipe": {}}, world=ALONE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--master-addr",
              "127.0.0.1", "--master-port", str(free_port()), small_loop.__file__, str(here)]  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def of_two(here: Path, case: str, what: str) -> dict[str, Tensor]:
    return load_file(here / f"{case}-{what}.safetensors")


def of_one(here: Path, case: str) -> dict[str, Tensor]:
    """The same run by one process, from start to end."""
    run = start(model_of(here, case), case, ALONE)
    losses = train(run, 0, STOP)
    return {**everything(run), "losses": torch.tensor(losses, dtype=torch.float64)}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float]:
    """Largest difference of a loss, and of any weight or moment relative to the largest of its tensor."""
    assert one.keys() == other.keys()
    loss = (one["losses"] - other["losses"]).abs().max()
    scales = {name: value.abs().max().clamp(min=1e-30) for name, value in one.items() if name != "losses"}
    return float(loss), max(float((one[name] - other[name]).abs().max() / scale) for name, scale in scales.items())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    assert one.keys() == other.keys() and any("exp_avg" in name for name in one)
    return all(name == "losses" or torch.equal(value, other[name]) for name, value in one.items())


def loaded(here: Path, case: str, ranks: str) -> Run:
    run = start(model_of(here, case), case, ALONE)
    extra = load_state(state_of(here, case, ranks), run.trained, run.optimizers, world=ALONE)
    assert extra == {"recipe": {}, "step": MIDDLE}
    return run


cases = pytest.mark.parametrize("case", CASES)


@cases
def test_two_ranks_train_what_one_process_does(here: Path, case: str) -> None:
    one = of_one(here, case)
    loss, state = apart(one, of_two(here, case, "end"))
    wrong_loss, wrong_state = apart(one, of_two(here, case, "wrong"))
    print(f"{case}: losses {loss:.1e}, state {state:.1e}; each rank's own mean: {wrong_loss:.1e}, {wrong_state:.1e}")
    assert loss <= LOSS_BOUND[case == "muon"] and state <= STATE_BOUND[case == "muon"]
    assert wrong_loss > 20 * LOSS_BOUND[case == "muon"] and wrong_state > 20 * STATE_BOUND[case == "muon"]


@cases
def test_two_ranks_resume_bit_for_bit(here: Path, case: str) -> None:
    end, resumed = of_two(here, case, "end"), of_two(here, case, "resumed")
    assert same(end, resumed) and torch.equal(end["losses"][MIDDLE:], resumed["losses"])
    assert not same(end, of_two(here, case, "middle"))


@cases
def test_one_process_resumes_bit_for_bit(here: Path, case: str) -> None:
    end, run = of_one(here, case), loaded(here, case, "one")
    losses = train(run, MIDDLE, STOP)
    assert losses == end["losses"].tolist()[MIDDLE:] and same(end, {**everything(run), "losses": end["losses"]})


@cases
def test_one_process_loads_every_slice_that_two_saved(here: Path, case: str) -> None:
    middle, run = of_two(here, case, "middle"), loaded(here, case, "two")
    assert same(middle, {**everything(run), "losses": middle["losses"]})
    train(run, MIDDLE, STOP)
    end = of_two(here, case, "end")
    assert apart(end, {**everything(run), "losses": end["losses"]})[1] <= STATE_BOUND[case == "muon"]


@cases
def test_two_ranks_load_every_slice_that_one_saved(here: Path, case: str) -> None:
    found = of_two(here, case, "loaded")
    assert same(found, {**everything(loaded(here, case, "one")), "losses": found["losses"]})


@pytest.mark.skipif(not SPLITS, reason="this torch does not split weights over CPU processes")
def test_weights_are_split(here: Path) -> None:
    files = [file.stat().st_size for file in state_of(here, "llama", "two").glob("*.distcp")]
    assert len(files) == RANKS and max(files) < 0.7 * sum(files)


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 3), (2, 2), (0, 2)])
def test_portions_are_all_rows_once(count: int, size: int) -> None:
    shares = [portion(count, World(Ranks(rank, size), torch.device("cpu"))) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_without_a_gpu_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TltError, match=r"this machine has 2 GPU\(s\)"), start_world(torch.device("cuda")):
        pass
