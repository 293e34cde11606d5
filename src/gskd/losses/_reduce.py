"""Sums over pixels that leave the ignored ones out, and means over images that have any left.

Shape suffixes: B images, C channels, P pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gskd.distributed import mean_over_processes
from gskd.losses._pixels import promote

_MASKED = -1e30  # finite, so that an image without a valid pixel gives a uniform distribution and not NaN


def mean_over_images(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of ``values`` (B,) over the images of all processes that are ``counted`` (B,) bool; zero where none is."""
    return mean_over_processes(torch.where(counted, values, 0.0).sum(), counted.sum())


def mean_over_pixels(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` over the pixels of all processes that are ``valid`` (same shape, bool); zero where none is."""
    return mean_over_processes(torch.where(valid, values, 0.0).sum(), valid.sum())


def spatial_log_softmax(maps: Tensor, valid: Tensor) -> Tensor:
    """Every channel as one distribution over the valid pixels.

    Args:
        maps: (B, C, P).
        valid: (B, P) bool.

    Returns:
        (B, C, P) log-probabilities; an ignored pixel has probability 0 and gets zero gradient.
    """
    return maps.masked_fill(~valid.unsqueeze(1), _MASKED).log_softmax(dim=2)


def unit_length(vectors: Tensor, dim: int) -> Tensor:
    """``vectors`` divided by their L2 norm along ``dim``; a zero vector stays zero, with zero gradient (not 1e12)."""
    squares = vectors.square().sum(dim=dim, keepdim=True)
    nonzero = squares > 0
    return torch.where(nonzero, vectors * torch.where(nonzero, squares, 1.0).rsqrt(), 0.0)


def masked_max_pool(maps: Tensor, valid: Tensor, kernel: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Max-pooling of the valid pixels alone; windows at the edge may be smaller.

    Args:
        maps: (B, C, h, w).
        valid: (B, h, w) bool.
        kernel: side or (height, width) of a window, also its stride.

    Returns:
        (B, C, h', w'), float32 or wider, zero where a window has no valid pixel; and (B, h', w') bool, where it has.
    """
    low = torch.finfo(maps.dtype if maps.dtype == torch.float64 else torch.float32).min
    filled = promote(maps).masked_fill(~valid.unsqueeze(1), low)
    there = F.max_pool2d(valid.unsqueeze(1).float(), kernel, ceil_mode=True) > 0
    return torch.where(there, F.max_pool2d(filled, kernel, ceil_mode=True), 0.0), there.squeeze(1)


def masked_mean_pool(maps: Tensor, valid: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Mean-pooling of the valid pixels alone, as ``masked_max_pool``."""
    weight = valid.unsqueeze(1).to(promote(maps).dtype)
    share = F.avg_pool2d(weight, kernel, ceil_mode=True)
    summed = F.avg_pool2d(torch.where(valid.unsqueeze(1), promote(maps), 0.0), kernel, ceil_mode=True)
    there = share > 0
    return torch.where(there, summed / torch.where(there, share, 1.0), 0.0), there.squeeze(1)
