"""What a text shows of each matrix is what stock transformers shows; what is made of it loses what it says."""

from __future__ import annotations

import gc
import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint, some_ids
from growing import Source, opened
from torch.nn import functional

from tlt_cli.calibration import options
from tlt_cli.calibration.blocks import Blocks, calibration_windows
from tlt_cli.calibration.compress import Compressed, install, refine, start_from, start_globally
from tlt_cli.calibration.drift import STAGES, cross
from tlt_cli.calibration.moments import Moments, block_moments, moments, streams
from tlt_cli.calibration.neurons import refit_kept, removal_order
from tlt_cli.calibration.options import menus
from tlt_cli.calibration.pieces import Dense, Low
from tlt_cli.calibration.refine import refine_block
from tlt_cli.calibration.shelf import Shelf
from tlt_cli.errors import TltError
from tlt_cli.model.compare import compare
from tlt_cli.surgery.decompose import DAMPING, decompose
from tlt_cli.surgery.matrices import Matrix, matrices, read_matrix

everywhere = pytest.mark.parametrize("family", ZOO)


def matrices_of(source: Source) -> list[Matrix]:
    return matrices({name: info.shape for name, info in source.checkpoint.tensors.items()}, source.fitted)


def stock_moments(folder: Path, ids: torch.Tensor, names: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per module E[x xT] of its input and E[g gT] of the summed loss's gradient at its output."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    seen: dict[str, list[torch.Tensor]] = {}
    for name in names:
        seen[name] = []

        def hook(_: torch.nn.Module, given: tuple[torch.Tensor], out: torch.Tensor, name: str = name) -> None:
            out.retain_grad()
            seen[name] += [given[0], out]

        model.get_submodule(name).register_forward_hook(hook)
    logits = model(ids).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").backward()
    found = {}
    for name, (given, out) in seen.items():
        x, g = given.detach().flatten(0, -2).double(), out.grad.flatten(0, -2).double()
        found[name] = x.T @ x / len(x), g.T @ g / len(g)
    return found


@everywhere
def test_moments_are_those_of_stock_transformers(tmp_path: Path, family: str) -> None:
    source, ids = opened(make_checkpoint(tmp_path, family)), some_ids(batch=5, length=20)
    found = moments(Blocks(source.checkpoint, source.fitted), ids, gradients=True, batch=2)
    forward = moments(Blocks(source.checkpoint, source.fitted), ids, gradients=False, batch=2)
    wanted = [matrix for matrix in matrices_of(source) if matrix.layer == 1]
    stock = stock_moments(tmp_path, ids, sorted({m.tensor.removesuffix(".weight") for m in wanted}))
    for matrix in wanted:
        inputs, outputs = stock[matrix.tensor.removesuffix(".weight")]
        part = slice((matrix.part or 0) * matrix.rows, ((matrix.part or 0) + 1) * matrix.rows)
        assert torch.allclose(
            found.inputs(1, matrix.role), inputs, rtol=1e-3, atol=1e-4 * float(inputs.diagonal().mean())
        )
        assert torch.allclose(forward.inputs(1, matrix.role), found.inputs(1, matrix.role))
        felt = found.outputs(1, matrix.role)
        assert felt is not None and forward.outputs(1, matrix.role) is None
        expected = outputs[part, part]
        assert torch.allclose(felt, expected, rtol=1e-3, atol=1e-3 * float(expected.diagonal().mean()) + 1e-12)
    other = moments(Blocks(source.checkpoint, source.fitted), some_ids(batch=5, length=20, seed=9), gradients=False)
    assert not torch.allclose(other.inputs(1, "up"), forward.inputs(1, "up"), rtol=1e-2)


def test_blocks_come_one_at_a_time(tmp_path: Path) -> None:
    """Last to first with gradients, and no tensor of another block is held while one is looked at."""
    source = opened(make_checkpoint(tmp_path, "llama"))
    blocks = Blocks(source.checkpoint, source.fitted)
    order = []
    for layer, _ in block_moments(blocks, some_ids(), gradients=True):
        order.append(layer)
        assert all(f"layers.{layer}." in name for name in blocks._held)
    assert order == [2, 1, 0]
    assert [layer for layer, _ in block_moments(blocks, some_ids(), gradients=False)] == [0, 1, 2]


def test_a_block_that_overflows_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(make_checkpoint(tmp_path, "llama") / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = opened(tmp_path)
    for gradients in (True, False):
        with pytest.raises(TltError, match="block 1 gives values that are not finite"):
            moments(Blocks(source.checkpoint, source.fitted), some_ids(), gradients=gradients)


def test_windows_are_spread_over_the_text() -> None:
    found = calibration_windows(torch.arange(1000), 10, 5)
    assert found[:, 0].tolist() == [0, 250, 500, 740, 990] and found.shape == (5, 10)
    assert len(calibration_windows(torch.arange(1000), 10)) == 100


# --- neurons -----------------------------------------------------------------------------------------------------


def random_moment(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def lost(change: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    return float((outputs @ change @ inputs @ change.T).trace())


def test_removed_neurons_lose_what_is_said() -> None:
    down = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    inputs, outputs = random_moment(20, 1), random_moment(6, 2)
    removal = removal_order(down, inputs, outputs, most=15)
    assert len(set(removal.order.tolist())) == 15 and (removal.loss.diff() > -1e-9).all()
    for count in (1, 5, 15):
        kept = torch.tensor([index for index in range(20) if index not in removal.order[:count]])
        new = torch.zeros(6, 20, dtype=torch.float64)
        new[:, kept] = refit_kept(down, inputs, kept)
        assert lost(new - down.double(), inputs, outputs) == pytest.approx(float(removal.loss[count]), rel=1e-4)
        cut = torch.zeros(6, 20, dtype=torch.float64)
        cut[:, kept] = down[:, kept].double()
        assert lost(cut - down.double(), inputs, outputs) > 1.02 * float(removal.loss[count])
    singles = []
    for index in range(20):
        kept = torch.tensor([other for other in range(20) if other != index])
        new = torch.zeros(6, 20, dtype=torch.float64)
        new[:, kept] = refit_kept(down, inputs, kept)
        singles.append(lost(new - down.double(), inputs, outputs))
    assert int(torch.tensor(singles).argmin()) == int(removal.order[0])


# --- options and their allocation --------------------------------------------------------------------------------


@everywhere
def test_options_cost_and_lose_what_they_say(tmp_path: Path, family: str) -> None:
    source, ids = opened(make_checkpoint(tmp_path, family)), some_ids(batch=6)
    found = moments(Blocks(source.checkpoint, source.fitted), ids, gradients=True)
    here = {matrix.role: matrix for matrix in matrices_of(source) if matrix.layer == 0}
    weights = {str(role): read_matrix(source.checkpoint, matrix) for role, matrix in here.items()}
    groups = list(menus(weights, found, 0))
    assert len(groups) == 3
    for menu in groups:
        costs, losses = menu.costs.tolist(), menu.losses.tolist()
        assert all(a < b for a, b in itertools.pairwise(costs)) and all(a > b for a, b in itertools.pairwise(losses))
        assert losses[-1] == 0 and costs[-1] == sum(weights[role].numel() for role in menu.roles)
        for index in range(0, len(costs), max(1, len(costs) // 12)):
            pieces, kept = menu.make(index, weights, found, 0), menu.kept(index)
            made = Compressed()
            made.pieces.put(0, pieces)
            assert made.parameters([here[role] for role in pieces]) == costs[index]
            total = 0.0
            for role, piece in pieces.items():
                new, old = piece.weight().double(), weights[role].double()
                inputs, outputs = found.inputs(0, role), found.outputs(0, role)
                assert outputs is not None
                outputs = outputs + DAMPING * outputs.diagonal().mean() * torch.eye(len(outputs))
                if kept is not None and role == "down":
                    wide = torch.zeros_like(old)
                    wide[:, kept] = new
                    new = wide
                elif kept is not None:
                    old, outputs = old[kept], outputs[kept][:, kept]
                total += lost(new - old, inputs, outputs)
            # the loss adds up what neurons and ranks lose one after the other, each measured in its own metric
            assert total == pytest.approx(losses[index], rel=0.35 if kept is not None else 2e-3, abs=1e-7)


def test_the_budget_is_kept_and_structure_helps(tmp_path: Path) -> None:
    source, ids = opened(make_checkpoint(tmp_path, "llama")), some_ids(batch=8)
    found = matrices_of(source)
    total = sum(matrix.size for matrix in found)
    before = float("inf")
    for keep in (0.3, 0.5, 0.8):
        made = start_globally(source.checkpoint, source.fitted, found, ids, budget=int(keep * total))
        assert 0.97 * keep * total <= made.parameters(found) <= keep * total
        assert made.loss < before
        before = made.loss
    assert len(made.pieces.parts) == len(found)


# --- refits ------------------------------------------------------------------------------------------------------


def cut(source: Source, rank: int) -> Compressed:
    """Every matrix at one rank by plain SVD: a poor start."""
    return start_from(
        source.checkpoint, matrices_of(source), lambda m: decompose(read_matrix(source.checkpoint, m)).factors(rank)
    )


def divergence(source: Source, made: Compressed, ids: torch.Tensor) -> float:
    """KL divergence of the compressed model's next tokens from the original's, in nats."""
    blocks = Blocks(source.checkpoint, source.fitted)
    for layer in range(blocks.layers):
        install(made, blocks, source.fitted, matrices_of(source), layer)
    return compare(Blocks(source.checkpoint, source.fitted).decoder, blocks.decoder, ids).kl


@everywhere
def test_each_refit_comes_closer(tmp_path: Path, family: str) -> None:
    source, ids = opened(make_checkpoint(tmp_path, family)), some_ids(batch=24)
    errors = []
    for drift, steps in ((False, 0), (True, 0), (True, 40)):
        made = cut(source, 6)
        if drift:
            refine(made, source.checkpoint, source.fitted, matrices_of(source), ids, drift=drift, steps=steps)
        errors.append(divergence(source, made, ids))
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.9 * errors[1]


def test_a_refit_is_anchored_to_the_original(tmp_path: Path) -> None:
    """The target is what the original wrote, not what its matrix makes of a changed input."""
    source, ids = opened(make_checkpoint(tmp_path, "llama")), some_ids(batch=24)
    made, found = cut(source, 6), matrices_of(source)
    plain, now = Blocks(source.checkpoint, source.fitted), Blocks(source.checkpoint, source.fitted)
    install(made, now, source.fitted, found, 0)
    install(made, now, source.fitted, found, 1)
    original, changed = dict(streams(plain, ids)), dict(streams(now, ids))
    matrix = next(m for m in found if m.layer == 1 and m.role == "up")
    crossed = cross(plain, now, 1, ["gate", "up"], False, original[1], changed[1])
    old, best = read_matrix(source.checkpoint, matrix).double(), crossed.refit("up")
    target = crossed.targets["up"]

    def error(weight: torch.Tensor) -> float:
        return float((weight @ crossed.inputs @ weight.T).trace() - 2 * (weight @ target.T).trace())

    assert error(best) < error(old)
    nudged = best + 1e-2 * torch.randn(best.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(best) < error(nudged)
    assert [role for stage, _ in STAGES for role in stage] == ["query", "key", "value", "output", "gate", "up", "down"]


def test_tuning_moves_only_what_it_is_given(tmp_path: Path) -> None:
    source, ids = opened(make_checkpoint(tmp_path, "llama")), some_ids(batch=16)
    made, blocks = cut(source, 6), Blocks(source.checkpoint, source.fitted)
    stream = dict(streams(Blocks(source.checkpoint, source.fitted), ids))
    pieces = made.pieces.block(1)
    install(made, blocks, source.fitted, matrices_of(source), 1, pieces)
    before = {role: piece.weight().clone() for role, piece in pieces.items()}
    leaves = [leaf for piece in pieces.values() for leaf in piece.leaves()]
    losses = refine_block(blocks, 1, leaves, stream[1], stream[2], steps=60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    for role, piece in pieces.items():
        assert not torch.equal(piece.weight(), before[role])
        assert not any(leaf.requires_grad for leaf in piece.leaves())
        assert torch.equal(made.pieces.piece((1, role)).weight(), before[role]), "kept as it was until it is put back"
    again = refine_block(blocks, 1, leaves, stream[1], stream[2], steps=60, rate=0.0)
    assert max(again) < max(losses)


def test_aligned_ranks_and_neurons(tmp_path: Path) -> None:
    source, ids = opened(make_checkpoint(tmp_path, "llama")), some_ids(batch=8)
    found = matrices_of(source)
    total = sum(matrix.size for matrix in found)
    losses = []
    for align in (1, 8):
        made = start_globally(source.checkpoint, source.fitted, found, ids, budget=total // 2, align=align)
        losses.append(made.loss)
        assert made.parameters(found) <= total // 2
        ranks = [part.rank for part in made.pieces.parts.values() if part.rank is not None]
        sizes = [*ranks, *map(len, made.kept.values())]
        assert ranks and all(size % 8 == 0 for size in sizes) == (align == 8)
    assert losses[0] <= losses[1]


# --- memory ------------------------------------------------------------------------------------------------------


def test_what_is_put_away_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shelf = Shelf[str]()
    values = {
        "double": torch.randn(3, 5, dtype=torch.float64), "half": torch.randn(7).bfloat16(),
        "codes": torch.arange(6, dtype=torch.int8).reshape(2, 3).T, "none": torch.zeros(0, 4), "one": torch.tensor(2.5),
    }  # fmt: skip
    shelf.update(values)
    for name, value in values.items():
        assert shelf[name].dtype == value.dtype and torch.equal(shelf[name], value)
    shelf["double"].zero_()
    assert torch.equal(shelf["double"], values["double"]), "a reader's changes are the reader's"
    shelf["double"] = torch.ones(2)
    assert torch.equal(shelf.pop("double"), torch.ones(2)) and "double" not in shelf and len(shelf) == 4
    for name in ("half", "codes", "none", "one"):
        assert torch.equal(shelf[name], values[name]), "what stays is where it was"
    assert not list(tmp_path.iterdir()), "nothing that a killed program would leave behind"


def test_a_shelf_takes_no_more_room_than_it_must() -> None:
    shelf = Shelf[int]()
    for layer in range(4):
        shelf[layer] = torch.full((1000,), float(layer))
        shelf[layer] = shelf[layer] + 1  # in the same place
    assert file_size(shelf) == 16_000
    for layer in reversed(range(4)):
        assert torch.equal(shelf.pop(layer), torch.full((1000,), layer + 1.0))
        assert file_size(shelf) == 4000 * layer
    shelf[0], shelf[1] = torch.ones(10), torch.ones(10)
    del shelf[0]
    assert file_size(shelf) == 80  # no hole is filled
    shelf[0] = torch.zeros(5)
    assert torch.equal(shelf[1], torch.ones(10)) and torch.equal(shelf[0], torch.zeros(5))


def file_size(shelf: Shelf[int]) -> int:
    return os.fstat(shelf._file.fileno()).st_size


def most_held(monkeypatch: pytest.MonkeyPatch, source: Source, ids: torch.Tensor, *, on_disk: bool) -> int:
    """The most bytes of tensors that are alive whenever a block of the model has just been run."""
    most, last, run = 0, -1, Blocks.run

    def counted(blocks: Blocks, layer: int, stream: torch.Tensor) -> torch.Tensor:
        nonlocal most, last
        if layer != last:  # once per block: looking takes its time
            gc.collect()
            alive = {each.data_ptr(): each.untyped_storage().nbytes() for each in tensors_alive()}
            most, last = max(most, sum(alive.values())), layer
        return run(blocks, layer, stream)

    with monkeypatch.context() as patch, nothing_older():
        patch.setattr(Blocks, "run", counted)
        patch.setattr(options, "_REMOVALS", 2)
        if not on_disk:
            patch.setattr(Shelf, "__new__", lambda *_: {})
        found = matrices_of(source)
        total = sum(matrix.size for matrix in found)
        made = start_globally(source.checkpoint, source.fitted, found, ids, budget=total // 2)
        refine(made, source.checkpoint, source.fitted, found, ids)
    return most


@contextmanager
def nothing_older() -> Iterator[None]:
    """The collector looks at what is made from here on alone, for all that is imported takes it long."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tensors_alive() -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [each for each in gc.get_objects() if type(each) is torch.Tensor and each.device.type == "cpu"]


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four more blocks may add less than two (blocks that are cut to higher ranks are larger); in the control, where
    what lies on disk lies in memory, they add several times that."""
    held, ids = {}, some_ids(batch=4, length=16)
    for layers in (2, 6):
        source = opened(make_checkpoint(tmp_path / str(layers), "llama", num_hidden_layers=layers))
        for on_disk in (True, False):
            held[layers, on_disk] = most_held(monkeypatch, source, ids, on_disk=on_disk)
    block = 4 * sum(matrix.size for matrix in matrices_of(source) if matrix.layer == 0)
    assert held[6, True] - held[2, True] < 2 * block
    assert held[6, False] - held[2, False] > 8 * block


# --- what was asked for ------------------------------------------------------------------------------------------


def naive_importance(folder: Path, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """E[(g_i x_j)^2] per token: the squared gradient of every token's own term of the weight's gradient, by autograd
    through a copy of the weight for each token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    copies: dict[str, torch.Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.detach().T if transposed else module.weight.detach()
        copies[name] = weight.expand(*ids.shape, *weight.shape).clone().requires_grad_(True)

        def forward(x: torch.Tensor, name: str = name, bias: torch.Tensor | None = module.bias) -> torch.Tensor:
            out = (copies[name] @ x[..., None])[..., 0]
            return out if bias is None else out + bias

        module.forward = forward
    logits = model(ids).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return {name: copy.grad.double().square().mean((0, 1)) for name, copy in copies.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_squared_gradients_of_entries_are_those_of_autograd(tmp_path: Path, family: str) -> None:
    source, ids = opened(make_checkpoint(tmp_path, family)), some_ids(batch=3, length=8)
    found = moments(Blocks(source.checkpoint, source.fitted), ids, gradients=True, entries=True, batch=2)
    here = [matrix for matrix in matrices_of(source) if matrix.layer == 1]
    naive = naive_importance(tmp_path, ids, sorted({matrix.tensor.removesuffix(".weight") for matrix in here}))
    for matrix in here:
        whole = naive[matrix.tensor.removesuffix(".weight")]
        part = slice((matrix.part or 0) * matrix.rows, ((matrix.part or 0) + 1) * matrix.rows)
        expected, importance = whole[part], found.importance(1, str(matrix.role))
        assert importance is not None and importance.shape == (matrix.rows, matrix.columns)
        assert torch.allclose(importance, expected, rtol=2e-3, atol=1e-4 * float(expected.mean()))
        rows, columns = found.outputs(1, str(matrix.role)), found.inputs(1, str(matrix.role))
        assert rows is not None
        product = torch.outer(rows.diagonal(), columns.diagonal())
        assert float((product - expected).norm()) > 0.05 * float(expected.norm()), "the control: no product of both"
    assert moments(Blocks(source.checkpoint, source.fitted), ids, gradients=True).importance(1, "up") is None


def test_moments_hold_what_they_were_asked_for() -> None:
    empty = Moments({}, {}, {}, 0)
    assert empty.outputs(0, "query") is None
    assert empty.importance(0, "query") is None
    with pytest.raises(KeyError):
        empty.inputs(0, "query")
    assert Dense(torch.eye(2)).weight().equal(torch.eye(2))
    assert torch.equal(Low(torch.ones(1, 3), torch.ones(2, 1)).weight(), torch.ones(2, 3))
