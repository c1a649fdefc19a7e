"""Low-rank regularizers: the closed forms are the penalties' own gradients, and no step goes below the target rank."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_zoo import ZOO
from sharded_regularizer import one_of_two
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tlt_cli.errors import UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.surgery.matrices import matrices, part_of
from tlt_cli.training.regularize import FORMS, Regularizer, Target, regularize, spectra, stepped, targets
from tlt_cli.training.start import blank, new_decoder

SHAPES = [(12, 20), (20, 12), (16, 16)]
ALL = [
    Regularizer("concentration", 2.0),
    Regularizer("participation", 2.0),
    Regularizer("participation", 2.0, target_rank=4),
    Regularizer("nuclear", 2.0),
    Regularizer("nuclear", 2.0, target_rank=3),
]
IDS = [f"{one.form}-{one.target_rank}" for one in ALL]
SHARPENING = [Regularizer("concentration", 2.0, target_rank=4), Regularizer("participation", 2.0, target_rank=4)]


def some_matrix(shape: tuple[int, ...] = (12, 20), seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ratio(matrix: Tensor) -> float:
    """The participation ratio, by its definition."""
    share = torch.linalg.svdvals(matrix.double()).square()
    return float(share.sum() ** 2 / share.square().sum())


def penalty(matrix: Tensor, regularizer: Regularizer) -> Tensor:
    """What the regularizer says it is, from the singular values, for autograd to differentiate."""
    singular, target = torch.linalg.svdvals(matrix), regularizer.target_rank
    share = singular**2 / (singular**2).sum()
    concentration = (share**2).sum()
    if regularizer.form == "nuclear":
        return regularizer.strength * singular[target or 0 :].sum()
    if regularizer.form == "concentration":
        return regularizer.strength * (1 - concentration)
    return regularizer.strength * torch.relu(-concentration.log() - math.log(target or 1))


def descended(matrix: Tensor, regularizer: Regularizer, rate: float) -> Tensor:
    """A step against the gradient that autograd finds, in the matrix's unit; but for nuclear, back at its length."""
    leaf = matrix.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(leaf, regularizer), leaf)
    if regularizer.form == "nuclear":
        tail = torch.linalg.svdvals(matrix)[regularizer.target_rank or 0 :]
        return matrix - rate * gradient * tail.square().sum() / tail.sum()
    moved = matrix - rate * gradient * matrix.square().sum() / 4
    return moved * matrix.norm() / moved.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regularizer", ALL, ids=IDS)
def test_a_step_is_the_gradients(regularizer: Regularizer, shape: tuple[int, int]) -> None:
    matrix = some_matrix(shape)
    moved, before = stepped(matrix, regularizer, rate=1e-2)
    assert before.penalty == pytest.approx(float(penalty(matrix, regularizer)), rel=1e-12)
    assert before.participation == pytest.approx(ratio(matrix), rel=1e-12)
    assert torch.allclose(moved, descended(matrix, regularizer, 1e-2), rtol=0, atol=1e-12)
    for other in ALL:  # and not that of any other form; of the hinge's, a target only says where it ends
        same = other.form == regularizer.form and (other.form == "participation" or other == regularizer)
        assert torch.allclose(moved, descended(matrix, other, 1e-2), rtol=0, atol=1e-6) == same


@pytest.mark.parametrize("regularizer", ALL, ids=IDS)
def test_a_step_knows_no_scale(regularizer: Regularizer) -> None:
    """A matrix a thousand times as large moves a thousand times as far; the bare gradient would move it less far."""
    matrix = some_matrix()
    moved, _ = stepped(matrix, regularizer, rate=1e-2)
    larger, _ = stepped(1000 * matrix, regularizer, rate=1e-2)
    assert torch.allclose(larger / 1000, moved, rtol=0, atol=1e-12)
    if regularizer.form != "nuclear":
        leaf = matrix.clone().requires_grad_()
        (near,) = torch.autograd.grad(penalty(leaf, regularizer), leaf)
        leaf = (1000 * matrix).requires_grad_()
        (far,) = torch.autograd.grad(penalty(leaf, regularizer), leaf)
        assert float(far.norm() / near.norm()) == pytest.approx(1e-3)


@pytest.mark.parametrize("shape", [(8, 8), (24, 200), (96, 64)], ids=str)
def test_strength_has_the_unit_of_weight_decay(shape: tuple[int, int]) -> None:
    """At strength 1 and a rate of 1e-4 a 1e-4th goes: of the smallest singular value under participation, and under
    nuclear of the length, though not of each; under concentration a PR-th of that, which is not the same for all."""
    left, old, right = torch.linalg.svd(some_matrix(shape), full_matrices=False)
    old[-1] = 0.1 * old[-2]  # a last one whose share of the energy is nothing
    matrix = left * old @ right

    def lost(form: str) -> tuple[float, float, float]:
        new = torch.linalg.svdvals(stepped(matrix, Regularizer(form, 1.0), rate=1e-4)[0])
        first, last, length = 1 - new[0] / old[0], 1 - new[-1] / old[-1], 1 - new.norm() / old.norm()
        return float(first) * 1e4, float(last) * 1e4, float(length) * 1e4

    assert lost("participation")[1] == pytest.approx(1, rel=0.02)
    assert lost("concentration")[1] == pytest.approx(1 / ratio(matrix), rel=0.02)
    assert lost("nuclear")[2] == pytest.approx(1, rel=0.02)
    assert lost("nuclear")[1] > 2 > 0.9 > lost("nuclear")[0]


@pytest.mark.parametrize("regularizer", ALL, ids=IDS)
def test_what_keeps_the_norm(regularizer: Regularizer) -> None:
    matrix = some_matrix()
    norm = float(stepped(matrix, regularizer, rate=0.1)[0].norm() / matrix.norm())
    assert norm < 0.99 if regularizer.form == "nuclear" else norm == pytest.approx(1, rel=1e-12)


def walked(matrix: Tensor, regularizer: Regularizer, *, rate: float, steps: int) -> tuple[Tensor, list[float]]:
    ratios = []
    for _ in range(steps):
        matrix, _ = stepped(matrix, regularizer, rate=rate)
        ratios.append(ratio(matrix))
    return matrix, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rate", [0.05, 0.3, 1e6])
@pytest.mark.parametrize("regularizer", SHARPENING, ids=FORMS[:2])
def test_no_step_goes_below_the_target(regularizer: Regularizer, rate: float, dtype: torch.dtype) -> None:
    """It is reached, and stays, whatever the size of the steps; a step that is not cut goes far below."""
    _, ratios = walked(some_matrix((30, 40), dtype=dtype), regularizer, rate=rate, steps=300)
    assert min(ratios) > 4 * (1 - 1e-5) and ratios[-1] == pytest.approx(4, rel=1e-5)
    uncut = Regularizer(regularizer.form, regularizer.strength)
    assert walked(some_matrix((30, 40), dtype=dtype), uncut, rate=rate, steps=300)[1][-1] < 1.1


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_a_step_that_would_go_below_lands_on_the_target(share: float) -> None:
    """In one step, also where a single direction runs ahead of all others; one that stays above is not cut."""
    matrix = torch.tensor([6.0, 2.5] + [1.0] * 40, dtype=torch.float64).sqrt().diag()
    for target in range(2, 11):
        uncut, _ = stepped(matrix, Regularizer("participation", 1.0), rate=share)
        moved, _ = stepped(matrix, Regularizer("participation", 1.0, target_rank=target), rate=share)
        assert ratio(moved) == pytest.approx(max(ratio(uncut), target), rel=1e-9)
    assert ratio(uncut) < 6 < 10 < ratio(matrix)


def test_a_matrix_below_the_target_is_left_alone() -> None:
    low = some_matrix((30, 2)) @ some_matrix((2, 40))
    for form in FORMS:
        moved, before = stepped(low, Regularizer(form, 3.0, target_rank=4), rate=0.1)
        assert torch.allclose(moved, low, rtol=0, atol=1e-12)
        assert before.penalty == pytest.approx(3 * (1 - 1 / ratio(low)) if form == "concentration" else 0, abs=1e-4)
    small = some_matrix((3, 40))  # it cannot have that rank at all
    assert torch.equal(stepped(small, Regularizer("nuclear", 3.0, target_rank=4), rate=0.1)[0], small)


def test_nuclear_leaves_leading_singular_values() -> None:
    """With a target the rest goes to zero, all the way; without, the leading ones shrink like all others."""
    matrix = some_matrix((30, 40))
    old = torch.linalg.svdvals(matrix)
    moved, _ = walked(matrix, Regularizer("nuclear", 1.0, target_rank=5), rate=0.1, steps=100)
    new = torch.linalg.svdvals(moved)
    assert torch.allclose(new[:5], old[:5]) and float(new[5:].max()) < 1e-3 * float(old[5])
    plain, _ = walked(matrix, Regularizer("nuclear", 1.0), rate=0.1, steps=100)
    assert float(torch.linalg.svdvals(plain)[0]) < 0.6 * float(old[0])
    huge, _ = stepped(matrix, Regularizer("nuclear", 1.0), rate=1e6)
    assert float(huge.abs().max()) < 1e-9  # stops at zero, does not come out on the other side


@pytest.mark.parametrize("regularizer", ALL, ids=IDS)
def test_nothing_stays_nothing(regularizer: Regularizer) -> None:
    """A zero matrix has no direction to favour; at a rate of zero even missing ranks stay what they are."""
    moved, before = stepped(torch.zeros(4, 6), regularizer, rate=0.1)
    assert torch.equal(moved, torch.zeros(4, 6)) and before.penalty == 0
    low = some_matrix((30, 6)) @ some_matrix((6, 40))
    low[:, :20] = 0
    assert torch.allclose(stepped(low, regularizer, rate=0.0)[0], low, rtol=0, atol=1e-12)


@pytest.mark.parametrize("regularizer", ALL, ids=IDS)
def test_narrow_weights_are_reckoned_wide(regularizer: Regularizer) -> None:
    matrix = some_matrix((64, 96), dtype=torch.float32).bfloat16()
    target = Target("one", nn.Parameter(matrix.clone()))
    regularize([target], regularizer, rate=0.1, step=0)
    wide, _ = stepped(matrix.double(), regularizer, rate=0.1)
    assert float((target.parameter.detach().double() - wide).abs().max() / wide.abs().max()) < 2**-8  # one rounding


# --- which matrices ------------------------------------------------------------------------------------------------


def some_decoder(family: str = "llama", **overrides: Any) -> Decoder:
    config = ZOO[family](**overrides).to_dict()
    return new_decoder(blank({**config, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]}))


@pytest.mark.parametrize("family", ZOO)
def test_targets_are_the_matrices_that_factor_sees(family: str) -> None:
    decoder = some_decoder(family)
    config = ZOO[family]().to_dict()
    fitted = blank({**config, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]})
    seen = matrices({name: tuple(p.shape) for name, p in decoder.named_parameters()}, fitted)
    found = {target.name: target.of(target.parameter) for target in targets(decoder)}
    assert sorted(found) == sorted(matrix.name for matrix in seen)
    for matrix in seen:
        expected = part_of(decoder.weight(matrix.tensor), matrix)
        assert found[matrix.name].data_ptr() == expected.data_ptr() and found[matrix.name].shape == expected.shape


def test_targets_by_name() -> None:
    decoder = some_decoder()
    assert not any("embed" in target.name or "head" in target.name for target in targets(decoder))
    named = {target.name for target in targets(decoder, only=["*.1.mlp.*", "model.embed_tokens.weight"])}
    assert named == {"model.embed_tokens", *(f"model.layers.1.mlp.{one}_proj" for one in ("down", "gate", "up"))}
    with pytest.raises(UsageError, match=r"is called model.layers.1.mlp.gate_prj \(did you mean 'model.layers.1.mlp.g"):
        targets(decoder, only=["*.1.*", "model.layers.1.mlp.gate_prj"])
    fused = some_decoder("gpt2")  # by the stored tensor's name, and by its own
    slots = [target.name for target in targets(fused, only=["*.0.attn.c_attn.weight"])]
    assert slots == [f"transformer.h.0.attn.c_attn.{part}" for part in range(3)]
    assert [target.name for target in targets(fused, only=["*.0.attn.c_attn.1"])] == slots[1:2]


def test_only_what_is_trained() -> None:
    decoder = some_decoder()
    query = "model.layers.0.self_attn.q_proj"
    decoder.requires_grad_(False)
    with pytest.raises(UsageError, match="acts on matrices that are trained"):
        targets(decoder)
    decoder.weight(f"{query}.weight").requires_grad_(True)
    assert [target.name for target in targets(decoder)] == [query]


def test_factors_are_no_targets() -> None:
    """What is stored as factors has its rank already; a fused module's other parts are stored one by one."""
    dense = some_decoder("gpt2")
    ranks = {"transformer.h.1.attn.c_attn.0": 4, "transformer.h.1.mlp.c_fc": 4}
    factored = Decoder({**dense.description, "lowrank": {"ranks": ranks}})
    found = {target.name: target for target in targets(factored)}
    assert set(found) == {target.name for target in targets(dense)} - set(ranks)
    apart = found["transformer.h.1.attn.c_attn.1"]
    assert apart.parameter is factored.weight(f"{apart.name}.weight") and apart.parts == 1


# --- in place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularizer", ALL, ids=IDS)
def test_fused_matrices_move_one_by_one(regularizer: Regularizer) -> None:
    """Query, key and value in one tensor, inputs by outputs: as if each were alone, and not as the whole would."""
    decoder = some_decoder("gpt2")
    fused = decoder.weight(next(name for name in decoder.stored if name.endswith("0.attn.c_attn.weight")))
    torch.nn.init.normal_(fused, generator=torch.Generator().manual_seed(0))
    before = fused.detach().clone()
    regularize(targets(decoder, only=["*.0.attn.c_attn.*"]), regularizer, rate=0.05, step=0)
    alone = torch.cat([stepped(part, regularizer, rate=0.05)[0] for part in before.chunk(3, dim=1)], dim=1)
    assert torch.equal(fused, alone) and not torch.equal(fused, before)
    for wrong in (
        stepped(before, regularizer, rate=0.05)[0],
        torch.cat([stepped(part, regularizer, rate=0.05)[0] for part in before.chunk(3, dim=0)]),
    ):
        assert float((fused - wrong).detach().norm() / (fused - before).detach().norm()) > 0.03


def test_it_acts_when_it_is_its_turn() -> None:
    """Every third step three times as far, and only what it was given moves."""
    matrix, other = nn.Parameter(some_matrix()), nn.Parameter(some_matrix(seed=1))
    every = Regularizer("participation", 1.0, every=3)
    numbers = []
    for step in range(3):
        assert torch.equal(matrix, some_matrix())
        numbers.append(regularize([Target("one", matrix)], every, rate=0.01, step=step))
    assert torch.equal(matrix, stepped(some_matrix(), Regularizer("participation", 1.0), rate=0.03)[0])
    assert torch.equal(other, some_matrix(seed=1)) and matrix.requires_grad
    assert numbers[:2] == [{}, {}]
    first = ratio(some_matrix())
    assert numbers[2] == pytest.approx({"penalty": math.log(first), "participation": first})


def test_numbers_are_of_all_matrices() -> None:
    both = [some_matrix(), some_matrix((20, 9), seed=1)]
    numbers = regularize(
        [Target(str(index), nn.Parameter(matrix)) for index, matrix in enumerate(both)],
        Regularizer("concentration", 2.0), rate=0.0, step=0,
    )  # fmt: skip
    assert numbers["participation"] == pytest.approx(sum(map(ratio, both)) / 2)
    assert numbers["penalty"] == pytest.approx(sum(2 * (1 - 1 / ratio(matrix)) for matrix in both))


def test_ranks_of_a_spectrum() -> None:
    """All ranks of a projection are its rank; otherwise the stable one is the least and the effective one the most."""
    basis = torch.linalg.qr(some_matrix((20, 5)))[0]
    flat = spectra([Target("flat", basis @ basis.T)])
    assert flat == pytest.approx({"stable_rank": 5, "participation": 5, "effective_rank": 5})
    matrix = some_matrix()
    share = torch.linalg.svdvals(matrix).square()
    share = share / share.sum()
    found = spectra([Target("one", nn.Parameter(matrix))])
    assert found["stable_rank"] == pytest.approx(float(1 / share[0]))
    assert found["participation"] == pytest.approx(ratio(matrix))
    assert found["effective_rank"] == pytest.approx(float((-share * share.log()).sum().exp()))
    assert found["stable_rank"] < found["participation"] < found["effective_rank"] < 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"form": "nuklear"}, "regularizer nuklear: unknown .did you mean 'nuclear'.*expected concentration"),
        ({"strength": -1.0}, "strength -1.0: expected 0 or more"),
        ({"strength": math.nan}, "strength nan"),
        ({"target_rank": 0}, "target rank 0: expected 1 or more"),
        ({"every": 0}, "every 0 steps: expected 1 or more"),
    ],
    ids=str,
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Regularizer(**{"form": "nuclear", "strength": 1.0, **given})


# --- what it is for ------------------------------------------------------------------------------------------------


def taught(regularizer: Regularizer | None, *, seed: int, rank: int, steps: int = 300) -> float:
    """The error on fresh inputs, cut to a rank, of a network that learned a map of rank 3 from noisy examples."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    teacher = normal(16, 3) @ normal(3, 24) / 3**0.5
    inputs, fresh = normal(200, 24), normal(500, 24)
    wanted = inputs @ teacher.T + 0.5 * normal(200, 16)
    first, second = (nn.Parameter(normal(*shape) / shape[1] ** 0.5) for shape in ((32, 24), (16, 32)))
    optimizer = torch.optim.AdamW([first, second], weight_decay=0.0)
    for step in range(steps):
        rate = optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        ((inputs @ first.T).tanh() @ second.T - wanted).square().mean().backward()
        optimizer.step()
        if regularizer is not None:
            regularize([Target("first", first), Target("second", second)], regularizer, rate=rate, step=step)
    with torch.no_grad():
        for matrix in (first, second):
            left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
            matrix.copy_(left[:, :rank] * singular[:rank] @ right[:rank])
        return float(((fresh @ first.T).tanh() @ second.T - fresh @ teacher.T).square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_what_is_trained_with_it_can_be_cut(seed: int) -> None:
    """From the same start, on the same examples, better at the same rank by a third; at strength 0 not by anything."""
    plain = taught(None, seed=seed, rank=3)
    assert taught(Regularizer("nuclear", 1.0, target_rank=3), seed=seed, rank=3) < 0.8 * plain
    assert taught(Regularizer("nuclear", 0.0), seed=seed, rank=3) == pytest.approx(plain, rel=1e-5)


def test_the_example_on_mnist_runs(tmp_path: Path) -> None:
    """On noise in the shape of the data: the table has a line for every setting, and both files are written."""
    generator = np.random.default_rng(0)
    for name, shape, below in (("images-idx3", (250, 28, 28), 256), ("labels-idx1", (250,), 10)):
        values = generator.integers(0, below, shape, dtype=np.uint8)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    example = Path(__file__).resolve().parents[1] / "examples" / "low_rank_mnist.py"
    options = ["--seeds", "2", "--epochs", "1", "--forms", "decay", "nuclear", "--strengths", "0.1", "1"]
    options += ["--json", "all.json", "--plot", "all.png"]
    done = subprocess.run(
        [sys.executable, example, ".", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["none", "0"], ["decay", "0.1"], ["decay", "1"], ["nuclear", "0.1"], ["nuclear", "1"],
    ]  # fmt: skip
    found = json.loads((tmp_path / "all.json").read_text())
    assert {(len(row["accuracy"]), len(row["accuracy"][0])) for row in found["rows"]} == {(2, len(found["ranks"]))}
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_move_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path), ALL[2:4]), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
