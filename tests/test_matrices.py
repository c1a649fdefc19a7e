"""Every matrix of a checkpoint is found, read and put back, however it is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_zoo import ZOO, make_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from tlt_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit, fit
from tlt_cli.surgery.matrices import LINEARS, Matrix, matrices, part_of, put, read_matrix, write_back


def opened(folder: Path) -> tuple[Checkpoint, Fit, dict[str, tuple[int, ...]]]:
    checkpoint = open_checkpoint(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return checkpoint, fit(shapes, checkpoint.config), shapes


@pytest.mark.parametrize("family", ZOO)
def test_a_family_has_its_linears_and_no_more(tmp_path: Path, family: str) -> None:
    _, fitted, shapes = opened(make_checkpoint(tmp_path, family))
    found = matrices(shapes, fitted)
    roles = [role for role in LINEARS if role in fitted.family.roles]
    assert sorted((m.layer, m.role) for m in found) == sorted(
        (i, r) for i in range(fitted.sizes["layer"]) for r in roles
    )
    assert len({m.name for m in found}) == len(found)
    hidden, ffn = fitted.sizes["hidden"], fitted.sizes["ffn"]
    sizes = {m.role: (m.rows, m.columns) for m in found}
    assert sizes["up"] == (ffn, hidden) and sizes["down"] == (hidden, ffn)
    assert sizes["query"] == (fitted.heads * fitted.head_dim, hidden)
    assert sizes["key"] == (fitted.kv_heads * fitted.head_dim, hidden)


@pytest.mark.parametrize("family", ZOO)
def test_embeddings_only_where_they_are_named(tmp_path: Path, family: str) -> None:
    _, fitted, shapes = opened(make_checkpoint(tmp_path, family))
    table = fitted.family.roles["embedding"].name
    (named,) = matrices(shapes, fitted, only=[f"*{table.rpartition('.')[2]}"])
    assert (named.role, named.rows, named.columns) == ("embedding", fitted.sizes["hidden"], fitted.sizes["vocab"])
    assert named.name not in {m.name for m in matrices(shapes, fitted)}


def test_a_linear_is_what_the_model_multiplies_by(tmp_path: Path) -> None:
    """Orientation and parts, told by the module's own outputs: y = W x for every part of a fused, transposed weight."""
    import transformers

    checkpoint, fitted, shapes = opened(make_checkpoint(tmp_path, "gpt2"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randn(5, fitted.sizes["hidden"])
    block = model.transformer.h[1]
    fused = block.attn.c_attn(x) - block.attn.c_attn.bias
    by_role = {m.role: read_matrix(checkpoint, m) for m in matrices(shapes, fitted) if m.layer == 1}
    for part, role in enumerate(("query", "key", "value")):
        torch.testing.assert_close(x @ by_role[role].T, fused.chunk(3, dim=1)[part])
        assert not torch.allclose(x @ by_role[role].T, fused.chunk(3, dim=1)[(part + 1) % 3])
    torch.testing.assert_close(x @ by_role["up"].T, block.mlp.c_fc(x) - block.mlp.c_fc.bias)


STORED = {
    "plain": (Matrix("a", "t", 4, 6, False, stored=(4, 6)), (4, 6)),
    "transposed": (Matrix("a", "t", 4, 6, True, stored=(6, 4)), (6, 4)),
    "fused": (Matrix("a.1", "t", 4, 6, False, 1, 3, stored=(12, 6)), (12, 6)),
    "fused, transposed": (Matrix("a.1", "t", 4, 6, True, 1, 3, stored=(6, 12)), (6, 12)),
    "convolution": (Matrix("a", "t", 4, 6, False, stored=(4, 2, 3, 1)), (4, 2, 3, 1)),
}


class Held:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def read(self, name: str) -> Tensor:
        return self.value

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.value[start:stop]


@pytest.mark.parametrize("how", STORED)
def test_written_back_is_what_is_read(how: str) -> None:
    matrix, shape = STORED[how]
    stored, value = torch.randn(shape), torch.randn(matrix.rows, matrix.columns)
    changed = write_back(stored, {matrix: value})
    assert changed.shape == stored.shape
    torch.testing.assert_close(read_matrix(Held(changed), matrix), value)
    assert torch.equal(
        write_back(changed, {matrix: read_matrix(Held(stored), matrix)}), stored
    )  # the rest is untouched
    assert int((changed != stored).sum()) == matrix.size


def test_written_in_place_through_a_view() -> None:
    matrix, shape = STORED["fused, transposed"]
    stored = torch.zeros(shape)
    put(stored, matrix, torch.ones(matrix.rows, matrix.columns))
    assert part_of(stored, matrix).all() and int(stored.sum()) == matrix.size


def test_without_a_family_every_matrix_counts() -> None:
    shapes = {
        "conv.weight": (8, 3, 5, 5), "linear.weight": (4, 7), "bare": (6, 5), "stack": (2, 3, 4), "norm.weight": (9,),
        "thin.weight": (1, 9), "scalar": (),
    }  # fmt: skip
    found = matrices(shapes, None)
    assert [(m.name, m.rows, m.columns) for m in found] == [("conv", 8, 75), ("linear", 4, 7), ("bare", 6, 5)]
    assert [m.name for m in matrices(shapes, None, only=["lin*", "bare"])] == ["linear", "bare"]


def test_a_glob_that_matches_nothing_names_what_is_near() -> None:
    with pytest.raises(UsageError, match=r"--only down_prj: .*down_proj"):
        matrices({"down_proj.weight": (4, 4), "up.weight": (4, 4)}, None, only=["up", "down_prj"])


@pytest.mark.parametrize("rows, columns", [(4, 4), (4096, 4096), (1024, 4096), (3, 17), (2, 2)])
def test_break_even(rows: int, columns: int) -> None:
    least = Matrix("a", "a", rows, columns, False).break_even
    assert least * (rows + columns) >= rows * columns > (least - 1) * (rows + columns)


def test_broken_weights_are_named(tmp_path: Path) -> None:
    save_file({"a.weight": torch.tensor([[1.0, float("nan")], [2.0, 3.0]])}, tmp_path / "a.st")
    checkpoint = open_checkpoint(tmp_path / "a.st")
    (matrix,) = matrices({"a.weight": (2, 2)}, None)
    with pytest.raises(TltError, match=r"a\.weight holds NaN"):
        read_matrix(checkpoint, matrix)
