"""Several processes that train one model: who am I, who holds which weights, and what is summed over all of us.

Each rank reads its own rows of a step. A rank's loss is its sum over its targets, times `size`, over the targets of
all ranks (`loss_share`): the mean over ranks, which sharded and replicated weights both take of gradients, is then the
gradient of the mean over all targets, however unevenly the ranks share them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grad_norm_

from tlt_cli.checkpoint.ranks import Ranks, joined, world_size
from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_LONGEST_WAIT = timedelta(hours=2)  # rank 0 writes files alone while the others wait


@dataclass(frozen=True)
class World:
    """One process of those that train together: its device, and the mesh of all of them (None where it is alone)."""

    ranks: Ranks
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.ranks.size


ALONE = World(Ranks(0, 1), torch.device("cpu"))


@contextmanager
def start_world(device: torch.device) -> Iterator[World]:
    """The processes that `torchrun` started, on CPU cores or one GPU each; without it, this one and no process group.

    What writes files as several ranks inside of this joins the same processes. Raises TltError where there are fewer
    GPUs than ranks of this machine, or the ranks cannot meet.
    """
    size = world_size()
    if size == 1:
        yield World(Ranks(0, 1), device)
        return
    if device.type == "cuda":
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise TltError(f"{local + 1} or more ranks, but this machine has {devices} GPU(s); one rank needs one GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise TltError(f"several ranks train on cpu or cuda, not on {device.type}")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=_LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise TltError(f"cannot reach the other ranks of {size}: {error}") from error
    try:
        from torch.distributed.device_mesh import init_device_mesh

        # the mesh names its device: where a machine has GPUs, a default mesh would put CPU tensors on them
        with joined() as ranks:
            yield World(ranks, device, init_device_mesh(device.type, (size,)))
    finally:
        distributed.destroy_process_group()


def portion(count: int, world: World) -> range:
    """Which of `count` rows of a step are this rank's: neighbours, and as many as any other rank has, or one less."""
    return range(count * world.rank // world.size, count * (world.rank + 1) // world.size)


# --- weights ---------------------------------------------------------------------------------------------------


def shard(decoder: Decoder, world: World, *, compute: torch.dtype | None = None) -> dict[str, nn.Parameter]:
    """Split every parameter over the ranks (FSDP2), layer by layer; returns all parameters by name.

    To be done before an optimizer is made, and the names taken from here: after a pass without a backward the modules
    hold gathered weights, which the next pass uses as they are. So weights may change only behind a backward, or before
    the first pass. All ranks begin with the weights of rank 0. With `compute` (bfloat16) weights are gathered and used
    in that dtype, while gradients are summed, and weights kept, in their own. Alone, nothing is split. Raises TltError
    where this torch cannot shard on CPU.
    """
    if world.size > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if world.device.type == "cpu" and torch.__version__ < "2.8":  # compared as versions
            raise TltError(
                f"torch {torch.__version__} cannot shard a model over CPU processes; update torch to 2.8 or later, "
                "train in one process, or train an adapter"
            )
        replicate(decoder.parameters(), world)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=None if compute is None else torch.float32)
        for module in (*decoder.rooms.values(), decoder):
            fully_shard(module, mesh=world.mesh, mp_policy=policy)
    return dict(decoder.named_parameters())


def replicate(parameters: Iterable[Tensor], world: World) -> None:
    """Give every rank the values of rank 0, whatever each drew or read."""
    if world.size > 1:
        with torch.no_grad():
            for parameter in parameters:
                distributed.broadcast(parameter, 0)


# --- a step ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def summed(world: World, *values: Tensor | float) -> list[float]:
    """Numbers added up over all ranks, in float64: [losses, targets] make a mean; every rank must call this."""
    if world.size == 1:
        return [float(value) for value in values]
    together = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=world.device) for value in values])
    distributed.all_reduce(together)
    numbers: list[float] = together.tolist()
    return numbers


def loss_share(loss: Tensor, targets: float, world: World) -> Tensor:
    """What a rank runs backward on: its summed `loss` over `targets`, the count of the whole step over all ranks."""
    return loss * (world.size / targets)


def mean_of_rows(value: Tensor, rows: int, world: World) -> Tensor:
    """The mean over the rows of all ranks of what is a mean over this rank's `rows`; every rank must call this.

    Its gradient is that of the rank's own mean: what stands behind it is to be weighed by the rank's share of the rows,
    and summed over ranks.
    """
    if world.size == 1:
        return value
    own = value.detach().double().flatten()
    together = torch.cat([own * rows, own.new_full((1,), rows)])
    distributed.all_reduce(together)
    whole_mean = (together[:-1] / together[-1]).view_as(value).to(value.dtype)
    return value + (whole_mean - value.detach())


def synchronize(decoder: nn.Module, last: bool) -> None:
    """Before each backward of a step: whether it is the last, after which a sharded model sums gradients over ranks."""
    if distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(decoder, FSDPModule):
            decoder.set_requires_gradient_sync(last)
            decoder.set_is_last_backward(last)


def average(parameters: Iterable[nn.Parameter], world: World) -> None:
    """After the backwards of a step: gradients of replicated parameters become their mean over ranks, in one message.

    A parameter that no rank used stays without a gradient, as in one process; one that some used counts as zero on
    the others.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if world.size == 1 or not trained:
        return
    used = torch.tensor([float(parameter.grad is not None) for parameter in trained]).to(trained[0])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    bucket = torch.cat([used, *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(bucket)
    bucket /= world.size
    anywhere, *means = torch.split(bucket, [len(trained), *(parameter.numel() for parameter in trained)])
    for parameter, share, mean in zip(trained, anywhere.tolist(), means, strict=True):
        parameter.grad = mean.view_as(parameter) if share > 0 else None


def clip(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale all gradients down together where their norm is above `most`; returns the norm before, of whole tensors.

    To be called by every rank, after `average` where parameters are replicated. An infinite or NaN norm is returned
    like any other: what it makes of the gradients must not be used.
    """
    return whole(clip_grad_norm_(parameters, most))


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is split over ranks, put together on each, where every rank calls this; any other as it is."""
    together: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return together
