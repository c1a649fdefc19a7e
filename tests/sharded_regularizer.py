"""One of two processes of a test: sharded matrices move as whole ones do. Imports no more than that takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tlt_cli.model.decoder import Decoder
from tlt_cli.training.init import initial_config
from tlt_cli.training.regularize import Regularizer, regularize, targets
from tlt_cli.training.start import blank, new_decoder


def one_of_two(rank: int, folder: str, regularizers: Sequence[Regularizer]) -> None:
    """Fused and transposed matrices, and rows that do not split evenly; leaves a file behind where all is well."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for regularizer in regularizers:
        whole, part = some_decoder(), some_decoder()
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        numbers = [regularize(targets(one), regularizer, rate=0.1, step=0) for one in (whole, part)]
        assert numbers[0] == numbers[1]
        untouched = dict(some_decoder().named_parameters())
        for (name, mine), expected in zip(part.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine.full_tensor(), expected) and mine.to_local().numel() < expected.numel()
            acted = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            assert torch.equal(expected, untouched[name]) == (not acted)
    (Path(folder) / f"done-{rank}").touch()
    dist.destroy_process_group()


def some_decoder() -> Decoder:
    return new_decoder(blank(initial_config("gpt2:dim=32,layers=1,heads=4,ffn=49", vocab=97, context=64)))
