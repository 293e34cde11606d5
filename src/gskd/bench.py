"""What a student costs and is worth in each form that it can be shipped in: PyTorch, ONNX, ONNX with 8-bit integers."""

from __future__ import annotations

import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from gskd.assembly import open_split
from gskd.checkpoint import require_new_folder, write_text
from gskd.data import SegmentationDataset
from gskd.data.selection import spread
from gskd.environment import environment
from gskd.errors import GSKDError, described
from gskd.evaluation import scaled
from gskd.export import deployed, export_run, open_onnx, quietly, require_packages
from gskd.metrics import ConfusionMatrix
from gskd.recipe import EvalMode, Recipe
from gskd.run import Run
from gskd.speed import Latency, latency

FORMS = ("torch", "onnx", "onnx int8")
_CALIBRATION = 32  # images of the training split


@dataclass(frozen=True)
class Form:
    """One form of a student, at one number of threads."""

    name: str
    threads: int
    latency: Latency
    memory: float
    """MiB that a process which has loaded and run it holds more than before."""
    size: float
    """MiB of its file; for torch that of the weights."""
    miou: float
    """On the images that were scored; NaN where none has a label."""
    agreement: float
    """Share of pixels with the class that PyTorch gives."""


def bench_run(
    run: Run,
    output: Path,
    recipe: Recipe | None = None,
    images: int = 100,
    threads: Sequence[int] = (1,),
    repeats: int = 30,
    on_progress: Callable[[str], None] = lambda line: None,
) -> list[Form]:
    """Writes a run's best student as ``student.onnx`` and ``student-int8.onnx``, and measures and scores all forms.

    The 8-bit one is quantised after training, statically: weights per channel, activations by the ranges seen on images
    of the training split, convolutions alone. Whether it is worth it is what the numbers are for.

    Args:
        run: with scored weights.
        output: a new or empty folder.
        recipe: the run's, where fields of it should be others.
        images: of the val split are scored, spread evenly over it.
        threads: of one inference; each is measured in a process of its own.
        repeats: passes that are timed, of one image of the size that the val split's first has at ``eval.scales``.
        on_progress: called with what is being done.

    Raises:
        GSKDError: the folder holds anything, a package of the extra ``export`` is missing, or a form cannot be made.
    """
    require_new_folder(output)
    require_packages("onnx", "onnxruntime")
    recipe = recipe or run.load_recipe()
    data = open_split(recipe, recipe.data.val)
    run.check_classes(data)
    scale = recipe.eval.scales[0]
    size = tuple(_scaled(data, 0, scale).shape[-2:])
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GSKDError(f"output {output}: cannot be made: {error.strerror or error}") from None
    exact, small = output / "student.onnx", output / "student-int8.onnx"
    on_progress("exporting")
    export_run(run, exact, (size[0], size[1]))
    on_progress("quantising")
    training = open_split(recipe, recipe.data.train)
    quantise(exact, small, (_scaled(training, index, scale) for index in spread(len(training), _CALIBRATION)))
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "torch": deployed(run, recipe),
        "onnx": open_onnx(exact),
        "onnx int8": open_onnx(small),
    }
    if len(recipe.eval.scales) > 1 or recipe.eval.flip or recipe.eval.mode != EvalMode.whole:
        on_progress(
            f"all forms are scored by one pass over whole images at scale {scale:g}, which the run itself was not"
        )
    on_progress(f"scoring {min(images, len(data))} images of {recipe.data.val}")
    scores = _scores(calls, data, scale, spread(len(data), images))
    files = {"torch": run.student, "onnx": exact, "onnx int8": small}
    rows = []
    for count in threads:
        for name in FORMS:
            on_progress(f"timing {name}, {count} threads")
            source = str(run.path) if name == "torch" else str(files[name])
            seconds, memory = _in_a_process_of_its_own(name, source, (size[0], size[1]), count, repeats)
            rows.append(Form(name, count, seconds, memory, files[name].stat().st_size / 2**20, *scores[name]))
    return rows


def write_rows(rows: Sequence[Form], output: Path) -> None:
    """Writes what was measured, with the hardware, as ``bench.json``."""
    listed = [{**asdict(row), "miou": None if row.miou != row.miou else row.miou} for row in rows]
    write_text(output / "bench.json", json.dumps({"environment": environment(), "rows": listed}, indent=1))


def quantise(model: Path, output: Path, images: Iterator[Tensor]) -> None:
    """Makes an ONNX network of 8-bit integers of one of floats.

    Args:
        model: the file; its input is called ``image``.
        output: where the other goes.
        images: (1, 3, H, W) uint8, like those it will see.

    Raises:
        GSKDError: onnxruntime cannot do it.
    """
    quantization: Any = importlib.import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # what its interface asks for
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
            return None if image is None else {"image": image.numpy()}

    try:
        with quietly():
            quantization.quantize_static(
                str(model),
                str(output),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=["Conv"],
            )
    except Exception as error:  # onnxruntime has many kinds
        raise GSKDError(f"{model}: cannot be quantised: {described(error)}") from None


def _scaled(data: SegmentationDataset, index: int, scale: float) -> Tensor:
    """(1, 3, H, W) uint8, as a program that uses the file would scale it."""
    image = torch.from_numpy(data[index].image).permute(2, 0, 1)[None]
    return scaled(image.float(), scale).round().clamp(0, 255).byte().contiguous()


@torch.no_grad()
def _scores(
    calls: dict[str, Callable[[Tensor], Tensor]], data: SegmentationDataset, scale: float, indices: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """mIoU, and agreement with the first, by form."""
    matrices = {name: ConfusionMatrix(len(data.classes)) for name in calls}
    same, total = dict.fromkeys(calls, 0), 0
    for index in indices:
        image, label = _scaled(data, index, scale), torch.from_numpy(data[index].label)
        found: dict[str, Tensor] = {}
        for name, call in calls.items():
            logits = F.interpolate(call(image), tuple(label.shape), mode="bilinear", align_corners=False)
            found[name] = logits[0].argmax(0)
            matrices[name].update(found[name], label)
        first = next(iter(found.values()))
        total += first.numel()
        for name, one in found.items():
            same[name] += int((one == first).sum())
    return {name: (matrix.score().miou, same[name] / total) for name, matrix in matrices.items()}


def _in_a_process_of_its_own(
    name: str, source: str, size: tuple[int, int], threads: int, repeats: int
) -> tuple[Latency, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (name, source, size, threads, repeats))


def _measure(name: str, source: str, size: tuple[int, int], threads: int, repeats: int) -> tuple[Latency, float]:
    torch.set_num_threads(threads)
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    before = psutil.Process().memory_info().rss
    call = deployed(Run(Path(source))) if name == "torch" else open_onnx(Path(source), threads)
    seconds = latency(call, image, repeats, warm_up=5)
    return seconds, (psutil.Process().memory_info().rss - before) / 2**20
