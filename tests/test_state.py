"""Training states: every bit comes back, by name, and only whole ones are ever seen."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.optim import AdamW, Optimizer

from tlt_cli.errors import TltError
from tlt_cli.training import state
from tlt_cli.training.state import check_same, latest, load_state, read_extra, reserved, save_state
from tlt_cli.training.world import ALONE

Make = Callable[[list[nn.Parameter]], Sequence[Optimizer]]


def some_model(seed: int = 0) -> dict[str, nn.Parameter]:
    """Matrices, a vector, a number and one in another dtype; what starts with "unused" never has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (5, 3), "b.weight": (3, 5), "gain": (7,), "unused": (2, 2)}
    model = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return {**model, "number": nn.Parameter(torch.tensor(0.5)), "wide": nn.Parameter(torch.ones(4).double())}


def adamw(parameters: list[nn.Parameter]) -> list[Optimizer]:
    return [AdamW(parameters, lr=0.1)]


def fused(parameters: list[nn.Parameter]) -> list[Optimizer]:
    return [AdamW(parameters, lr=0.1, fused=True)]


def two_groups(parameters: list[nn.Parameter]) -> list[Optimizer]:
    """The same, but every parameter has another number: matrices come last."""
    ordered = sorted(parameters, key=lambda parameter: parameter.dim())
    return [AdamW([{"params": ordered[:2]}, {"params": ordered[2:]}], lr=0.1)]


def muon(parameters: list[nn.Parameter]) -> list[Optimizer]:
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.1), *adamw([p for p in parameters if p.dim() != 2])]


MAKERS = [adamw, fused, two_groups, *([muon] if hasattr(torch.optim, "Muon") else [])]
each = pytest.mark.parametrize("make", MAKERS)


def take_steps(model: dict[str, nn.Parameter], optimizers: Sequence[Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for name, parameter in model.items():
            if not name.startswith("unused"):
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        for optimizer in optimizers:
            optimizer.step()


def bits(model: dict[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> dict[str, bytes]:
    names = {id(parameter): name for name, parameter in model.items()}
    held: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.items()}
    for optimizer in optimizers:
        for parameter, slots in optimizer.state.items():
            held.update({f"{slot} {names[id(parameter)]}": value for slot, value in slots.items()})
    return {name: value.numpy().tobytes() for name, value in held.items()}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """One process without a process group is what is meant: nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@each
@pytest.mark.parametrize("steps", [0, 3])
def test_every_bit_comes_back(tmp_path: Path, make: Make, steps: int) -> None:
    model = some_model()
    optimizers = make(list(model.values()))
    take_steps(model, optimizers, 0, steps)
    path = save_state(tmp_path / "s", steps, model, optimizers, {"recipe": {"rate": 0.1}, "at": [1, 2]}, world=ALONE)
    saved = bits(model, optimizers)
    assert len(saved) > len(model) or steps == 0
    take_steps(model, optimizers, steps, steps + 2)

    fresh = some_model(seed=1)
    others = make(list(fresh.values()))
    take_steps(fresh, others, 7, 8)  # state of before must not stay
    addresses = [parameter.data_ptr() for parameter in fresh.values()]
    extra = load_state(path, fresh, others, world=ALONE)
    assert extra == {"recipe": {"rate": 0.1}, "at": [1, 2], "step": steps} == read_extra(path)
    assert bits(fresh, others) == saved
    assert addresses == [parameter.data_ptr() for parameter in fresh.values()]
    take_steps(fresh, others, steps, steps + 2)
    assert bits(fresh, others) == bits(model, optimizers) != saved


def test_state_follows_names_not_numbers(tmp_path: Path) -> None:
    model = some_model()
    optimizers = adamw(list(model.values()))
    take_steps(model, optimizers, 0, 2)
    path = save_state(tmp_path, 2, model, optimizers, {}, world=ALONE)
    other = dict(reversed(some_model().items()))
    regrouped = two_groups(list(other.values()))
    load_state(path, other, regrouped, world=ALONE)
    assert bits(other, regrouped) == bits(model, optimizers)

    numbered = adamw(list(other.values()))  # what optimizers themselves save goes by number, and lands elsewhere
    numbered[0].load_state_dict(optimizers[0].state_dict())
    assert bits(other, numbered) != bits(model, optimizers)


def test_the_last_states_stay(tmp_path: Path) -> None:
    folder, model = tmp_path / "deep" / "training", some_model()
    assert latest(folder) is None
    for step in (5, 10, 100_000_000):
        assert latest(folder) != save_state(folder, step, model, [], {}, world=ALONE, keep=2) == latest(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-100000000"]
    for name in (".step-00000500.partial", ".step-00000500.old", "step-5", "step-00000900.partial", "step-x"):
        (folder / name).mkdir()
    assert latest(folder) == folder / "step-100000000"
    again = save_state(folder, 10, model, [], {"second": True}, world=ALONE)  # a run that was set back to step 5
    assert read_extra(again) == {"second": True, "step": 10} and latest(folder) == again
    assert not any(path.name.startswith(".") for path in folder.iterdir())


class Moments:
    """What a kill would leave at every moment of a work: the folder, copied before each change of it."""

    def __init__(self, folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.copies, self.kinds = folder, copies, list[str]()
        for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        self.busy = False

    def _watched(self, name: str, does: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **options: Any) -> Any:
            if not self.busy:
                self.busy = True
                shutil.copytree(self.folder, self.copies / str(len(self.kinds)))
                self.kinds.append(name)
                self.busy = False
            return does(*given, **options)

        return watched


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = tmp_path / "training", some_model()
    optimizers = adamw(list(model.values()))
    saved = {}
    for step in (1, 2, 3):
        take_steps(model, optimizers, step - 1, step)
        saved[step] = bits(model, optimizers)
        if step < 3:
            save_state(folder, step, model, optimizers, {}, world=ALONE)
    with monkeypatch.context() as patch:
        moments = Moments(folder, tmp_path / "copies", patch)
        save_state(folder, 3, model, optimizers, {}, world=ALONE)
    assert {"mkdir", "fsync", "rename", "unlink"} <= set(moments.kinds)
    found = []
    for number in range(len(moments.kinds)):
        left = moments.copies / str(number)
        last = latest(left)
        assert last is not None
        fresh = some_model(seed=1)
        others = adamw(list(fresh.values()))
        found.append(load_state(last, fresh, others, world=ALONE)["step"])
        assert bits(fresh, others) == saved[found[-1]]
        save_state(left, 4, fresh, others, {}, world=ALONE)
        assert latest(left) == left / "step-00000004" and len(list(left.iterdir())) == 2
    assert found == sorted(found) and set(found) == {2, 3}


def test_a_state_built_under_its_own_name_is_seen_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = tmp_path / "training", some_model()
    folder.mkdir()
    with monkeypatch.context() as patch:
        moments = Moments(folder, tmp_path / "copies", patch)
        patch.setattr(state, "FileSystemWriter", lambda path: FileSystemWriter(folder / "step-00000001"))
        patch.setattr(state, "_put", lambda path, content: None)
        patch.setattr(state, "_remove", lambda path: None)
        with pytest.raises(TltError):
            save_state(folder, 1, model, [], {}, world=ALONE)
    early = [last for number in range(len(moments.kinds)) if (last := latest(moments.copies / str(number)))]
    assert early
    for path in early:
        with pytest.raises(TltError, match="no training state"):
            load_state(path, model, [], world=ALONE)


ENDLESS = """
import sys, torch
from pathlib import Path
from tlt_cli.training.state import save_state
from tlt_cli.training.world import ALONE
for step in range(10**6):
    save_state(Path(sys.argv[1]), step, {str(n): torch.full((9,), float(step)) for n in range(9)}, [], {}, world=ALONE)
    print(step, flush=True)
"""


def test_a_killed_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "training")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(3)]
        process.kill()
    last = latest(tmp_path / "training")
    assert last is not None
    model = {str(number): torch.zeros(9) for number in range(9)}
    step = load_state(last, model, [], world=ALONE)["step"]
    assert step >= seen[-1] and all(tensor.eq(step).all() for tensor in model.values())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = some_model()
    save_state(tmp_path, 1, model, [], {}, world=ALONE)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TltError, match="the disk is full"):
        save_state(tmp_path, 2, model, [], {}, world=ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "out.training"
    other = pytest.raises(TltError, match="another run is writing it")
    with reserved(folder, world=ALONE), other, reserved(folder, world=ALONE):
        pass
    with reserved(folder, world=ALONE):
        save_state(folder, 1, some_model(), [], {}, world=ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["out.training"]


def saved_and_changed(folder: Path, change: Callable[[Path], object]) -> Path:
    path = save_state(folder, 1, some_model(), [], {}, world=ALONE)
    change(path)
    return path


def cut(path: Path) -> None:
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-700])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: (path / "state.json").unlink(), "is no training state"),
        (lambda path: (path / "state.json").write_text("{"), "is no training state"),
        (lambda path: (path / ".metadata").write_bytes(b"x"), "the state is damaged"),
        (lambda path: (path / ".metadata").write_bytes(b""), "the state is damaged"),
        (lambda path: (path / ".metadata").write_bytes(pickle.dumps(Evil())), "posix.mkdir has no place in it"),
        (lambda path: (path / ".metadata").write_bytes(pickle.dumps({})), "holds no table of tensors"),
        (lambda path: (path / ".metadata").unlink(), "the state is damaged"),
        (lambda path: next(path.glob("*.distcp")).unlink(), "the state is damaged"),
        (cut, "the state is damaged"),
    ],
)
def test_damaged_states_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved_and_changed(tmp_path / "training", change)
    with pytest.raises(TltError, match=said):
        load_state(path, some_model(), [], world=ALONE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gain": None}, "it has, and this run has no, model.gain"),
        ({"more": torch.zeros(2)}, "it has no model.more"),
        ({"gain": torch.zeros(8)}, r"model.gain is torch.float32 \[7\], but here torch.float32 \[8\]"),
        ({"gain": torch.zeros(7).half()}, r"model.gain is torch.float32 \[7\], but here torch.float16 \[7\]"),
    ],
)
def test_the_state_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = save_state(tmp_path, 1, some_model(), [], {}, world=ALONE)
    model = {name: tensor for name, tensor in {**some_model(seed=1), **change}.items() if tensor is not None}
    before = bits(model, [])
    with pytest.raises(TltError, match=said):
        load_state(path, model, [], world=ALONE)
    assert bits(model, []) == before


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = some_model()
    optimizers = adamw(list(model.values()))
    take_steps(model, optimizers, 0, 1)
    path = save_state(tmp_path, 1, model, optimizers, {}, world=ALONE)
    with pytest.raises(TltError, match=r"this run has no, optimizer\.exp_avg\.a\.weight"):
        load_state(path, model, adamw([model["gain"]]), world=ALONE)


def test_recipes_that_differ_are_named() -> None:
    extra = {"recipe": {"rate": 0.1, "batch": 8, "betas": [0.9, 0.95]}}
    check_same(extra, {"batch": 8, "betas": (0.9, 0.95), "rate": 0.1}, Path("x"))
    with pytest.raises(TltError) as caught:
        check_same(extra, {"rate": 0.2, "batch": 8, "clip": 1.0, "betas": (0.9, 0.95)}, Path("x/step-00000001"))
    said = str(caught.value)
    assert said.startswith("x/step-00000001: cannot go on from a run with rate 0.1, clip None when rate 0.2, clip 1.0")
    assert "batch" not in said and "betas" not in said
