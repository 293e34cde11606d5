"""Counts and gathers across processes: where a loss meets data-parallel training.

Everything here is a no-op on one process, so that a loss needs no flag to run in both worlds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gskd.errors import GSKDError


def world_size() -> int:
    """The number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them; 0 without ``torch.distributed``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def lost_process_named() -> Iterator[None]:
    """Turns what a backend raises when another process is gone into one line.

    Raises:
        GSKDError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, with its source file or the state of the socket in the message.
        text = str(error)
        told = isinstance(error, dist.DistError) or "gloo" in text or "Connection closed" in text
        if isinstance(error, GSKDError) or world_size() == 1 or not told:
            raise
        raise GSKDError(
            f"process {rank()} of {world_size()}: another process of this run was killed or cannot be reached; what was"
            " saved is kept, and the same command goes on with --resume"
        ) from None


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, without gradient.

    Args:
        tensor: any shape, the same on every process. It is not changed.

    Returns:
        A new detached tensor; on one process ``tensor`` itself.
    """
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_processes(total: Tensor, count: Tensor) -> Tensor:
    """A mean over all processes' items, as the loss each process must call ``backward`` on.

    ``DistributedDataParallel`` averages gradients over processes. With ``total * world_size / sum(count)`` that
    average is the gradient one process would have on the concatenated batch, also when the counts differ.

    Args:
        total: this process's sum over its valid items; keeps its graph.
        count: this process's number of valid items, a scalar tensor on the same device.

    Returns:
        The scaled total, dtype of ``total``; zero (not NaN) where no process has an item. Nothing is copied to the
        host.
    """
    everyone = sum_over_processes(count).clamp(min=1).to(total.dtype)
    return total * world_size() / everyone


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every process's loss depends on this process's rows: their gradients add up.
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.chunk(world_size())[rank()]


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Concatenates ``tensor`` (B, ...) over processes in rank order, and lets the gradient flow back to its owner.

    ``torch.distributed.all_gather`` alone returns tensors without a graph: a loss on them changes value, yet trains
    nothing.

    Args:
        tensor: (B, ...) of the same shape and dtype on every process.

    Returns:
        (world_size * B, ...); on one process ``tensor`` itself. Its gradient on each process is the sum, over
        processes, of the gradients for that process's rows: under ``DistributedDataParallel`` (which averages) a loss
        that every process computes on the whole gathered batch trains as it would on one process.
    """
    return tensor if world_size() == 1 else cast(Tensor, _AllGather.apply(tensor))  # type: ignore[no-untyped-call]


def sum_with_grad(tensor: Tensor) -> Tensor:
    """As ``sum_over_processes``, with gradient: the same rule as ``gather_with_grad``.

    Args:
        tensor: any shape, the same on every process.
    """
    return tensor if world_size() == 1 else gather_with_grad(tensor.unsqueeze(0)).sum(dim=0)
