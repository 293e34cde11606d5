"""What a network costs where it runs: parameters, multiplications, seconds; and whether half precision costs more."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gskd.schema import Precision, TeacherPrecision
from gskd.taps import eval_mode

_WORTH_SAYING = 2.0  # times as long: less may be the network, or what else the machine is doing


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


def slow_precision(device: torch.device, fields: Mapping[str, Precision | TeacherPrecision | None]) -> str:
    """A line for people where bf16 was asked of a CPU that is slow in it; nothing where all is well.

    Without instructions for it a convolution in bf16 takes tens of times as long, and nothing else would tell.

    Args:
        device: where the networks run.
        fields: what a recipe asks for, by the field's name.
    """
    named = [name for name, precision in fields.items() if precision == Precision.bf16.value]
    if device.type != "cpu" or not named or bf16_slowdown() < _WORTH_SAYING:
        return ""
    return f"{', '.join(named)}: on this CPU bf16 takes {bf16_slowdown():.0f} times as long as fp32"


@cache
def bf16_slowdown() -> float:
    """How many times as long a convolution takes on this CPU in bf16 as in fp32, there and back; about a second."""
    with torch.random.fork_rng(devices=[]):  # the random numbers of training stay what they are
        layer = nn.Conv2d(64, 64, 3, padding=1)
    maps = torch.ones(2, 64, 24, 24, requires_grad=True)
    best = {True: float("inf"), False: float("inf")}
    for _ in range(4):  # in turn, and the best of each: a busy machine should not be taken for a slow one
        for half in best:
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found = layer(maps)
            found.sum().backward()
            best[half] = min(best[half], time.perf_counter() - begun)
    return best[True] / best[False]
