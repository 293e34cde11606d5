"""What a network costs where it runs: parameters, multiplications, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gskd.taps import eval_mode


@dataclass(frozen=True)
class Latency:
    """Of a forward pass, in seconds."""

    median: float
    p95: float


@torch.no_grad()
def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Multiplications with addition (MACs) of convolutions and matrix products in one forward pass."""
    with eval_mode(model), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops()) // 2


@torch.no_grad()
def latency(model: Callable[[Tensor], object], image: Tensor, repeats: int = 20, warm_up: int = 3) -> Latency:
    """Measures a forward pass, as the machine is at this moment.

    Args:
        model: a network, put in eval mode while it is measured; or any other function of the image.
        image: on the device where it is measured.
        repeats: passes that count.
        warm_up: passes before them that do not.
    """
    times = []
    with eval_mode(model) if isinstance(model, nn.Module) else nullcontext():
        for _ in range(warm_up + repeats):
            begun = time.perf_counter()
            model(image)
            if image.device.type == "cuda":
                torch.cuda.synchronize(image.device)
            times.append(time.perf_counter() - begun)
    counted = times[warm_up:]
    return Latency(float(np.median(counted)), float(np.percentile(counted, 95)))
