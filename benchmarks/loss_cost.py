"""What each loss term costs: forward and backward time, and peak memory, side by side in one run.

    python benchmarks/loss_cost.py [--device cuda] [--threads 2] [--batch 4] [--height 64] [--width 128] ...

Student and teacher maps are leaves; the student's gradient is computed, as in training. Memory is what the step
allocates above its inputs at its peak: from the CUDA allocator on a GPU, and on a CPU from the running sum of the
profiler's allocation events (one step, not the timed ones).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gskd.environment import commit, processor
from gskd.losses import (
    AdversarialLoss,
    AFDCDLoss,
    ATLoss,
    AttnFDLoss,
    BPKDLoss,
    CIRKDLoss,
    CIRKDMemoryLoss,
    CSDLoss,
    CWDLoss,
    DISTLoss,
    GSKDLoss,
    IFVDLoss,
    KDLoss,
    LogitGSKDLoss,
    MGDLoss,
    MSELoss,
    Pixels,
    PSDLoss,
    SKDLoss,
    TopKDLoss,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "batch": 4,
        "student-channels": 128,
        "teacher-channels": 256,
        "height": 64,
        "width": 128,
        "classes": 19,
        "samples-per-class": 8,
        "threads": 1,
        "repeats": 30,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--terms", nargs="+", metavar="NAME", help="only these, and kd; all by default")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    return parser.parse_args()


class Cached(nn.Module):
    """A loss whose target was made before."""

    def __init__(self, loss: Any, teacher: Tensor, pixels: Pixels) -> None:
        super().__init__()
        self.loss, self.target = loss, loss.target(teacher, pixels)

    def forward(self, student: Tensor, teacher: None, pixels: Pixels) -> Tensor:
        found: Tensor = self.loss.compare(student, self.target, pixels)
        return found


def street_labels(args: argparse.Namespace) -> Tensor:
    """Labels in blobs of every class, and 5 % ignored, at four times the features' resolution."""
    coarse = torch.randint(args.classes, (args.batch, args.height // 8, args.width // 8))
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    labels[torch.rand(labels.shape) < 0.05] = 255
    return labels.to(args.device)


def peak_memory(step: Callable[[], None], device: str) -> float:
    """MiB that one step allocates above what is there before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    held = highest = 0
    for event in sorted(
        (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        highest = max(highest, held)
    return highest / 2**20


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    memory_format = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format

    def maps(channels: int, grad: bool = False) -> Tensor:
        made = torch.randn(args.batch, channels, args.height, args.width, device=args.device)
        return made.contiguous(memory_format=memory_format).requires_grad_(grad)

    labels = street_labels(args)
    # A teacher that is right on about nine pixels in ten.
    truth = Pixels(labels, num_classes=args.classes).labels_at((args.height, args.width)).clamp(max=args.classes - 1)
    teacher_logits = maps(args.classes) + 5.5 * nn.functional.one_hot(truth, args.classes).permute(0, 3, 1, 2)
    teacher_logits = teacher_logits.contiguous(memory_format=memory_format)
    student_logits = maps(args.classes, grad=True)
    student, teacher = maps(args.student_channels, grad=True), maps(args.teacher_channels)
    widths = {"student_channels": args.student_channels, "teacher_channels": args.teacher_channels}
    features, logits = (student, teacher), (student_logits, teacher_logits)
    early = [maps[:, : maps.shape[1] // 2] for maps in features]
    terms: dict[str, tuple[nn.Module, Any, Any]] = {
        "kd": (KDLoss(), *logits),
        "kd_top": (TopKDLoss(), *logits),
        "gskd": (GSKDLoss(args.samples_per_class), *features),
        "gskd_logits": (LogitGSKDLoss(args.samples_per_class), *logits),
        "gskd, projector": (GSKDLoss(args.samples_per_class, projector=True, **widths), *features),
        "mse": (MSELoss(**widths), *features),
        "at": (ATLoss(), *features),
        "skd": (SKDLoss(), *features),
        "adversarial": (AdversarialLoss(args.classes), *logits),
        "ifvd": (IFVDLoss(), *features),
        "cwd, logits": (CWDLoss(), *logits),
        "cwd, features": (CWDLoss(**widths), *features),
        "psd": (PSDLoss(), [early[0], student], [early[1], teacher]),
        "csd": (CSDLoss(), *logits),
        "cirkd": (CIRKDLoss(), *features),
        "cirkd_memory": (CIRKDMemoryLoss(**widths, num_classes=args.classes), *features),
        "dist": (DISTLoss(), *logits),
        "mgd": (MGDLoss(**widths), *features),
        "afdcd": (AFDCDLoss(**widths), *features),
        "bpkd": (BPKDLoss(), *logits),
        "attnfd": (AttnFDLoss(**widths), *features),
    }
    # The same as from a teacher cache: which points, and how similar the teacher finds them, is known.
    for name in ("gskd", "gskd_logits"):
        term, leaf, target = terms[name]
        terms[f"{name}, cached"] = (Cached(term, target, Pixels(labels, teacher_logits)), leaf, None)
    if args.terms:
        terms = {name: term for name, term in terms.items() if name.split(",")[0] in {*args.terms, "kd"}}

    def step(term: nn.Module, leaf: Any, target: Any) -> None:
        student.grad = student_logits.grad = None
        term.zero_grad(set_to_none=True)
        # Fresh every time: the first term of a step pays for the labels and the teacher's prediction.
        term(leaf, target, Pixels(labels, teacher_logits)).backward()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in terms}
    for term, _, _ in terms.values():
        term.to(args.device)
    for repeat in range(args.repeats + 3):
        for name, inputs in terms.items():  # in turn, so that a busy moment hits all alike
            start = time.perf_counter()
            step(*inputs)
            if repeat >= 3:
                times[name].append(time.perf_counter() - start)

    hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else processor()
    print(f"{hardware}, {args.threads} threads; torch {torch.__version__}; commit {commit()}")
    print(f"B {args.batch}, C {args.teacher_channels} -> {args.student_channels}, {args.height}x{args.width}, ", end="")
    print(f"{args.classes} classes, N {args.samples_per_class}, {args.layout}; median of {args.repeats}")
    print(f"{'term':20s}{'ms':>8s}{'fastest':>9s}{'x KD':>7s}{'peak MiB':>10s}")
    kd = median(times["kd"])
    for name, inputs in terms.items():
        student.grad = student_logits.grad = None
        middle = median(times[name])
        memory = peak_memory(lambda inputs=inputs: step(*inputs), args.device)
        print(f"{name:20s}{1e3 * middle:8.2f}{1e3 * min(times[name]):9.2f}{middle / kd:7.2f}{memory:10.1f}")


if __name__ == "__main__":
    main()
