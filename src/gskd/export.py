"""The student alone, as a file that other programs run (run folder -> export).

The exported network takes pixels as they are and gives logits of the image's size: normalisation, padding to the
network's stride and enlarging are inside, so that nobody has to repeat them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gskd.checkpoint import require_new_file
from gskd.errors import GSKDError, described
from gskd.evaluation import DIVISOR
from gskd.models import scale_and_shift
from gskd.outputs import logits_of
from gskd.recipe import Recipe
from gskd.run import Run, inference_of

FORMATS = (".onnx", ".pt2")
AGREEMENT = 0.999
"""The least share of pixels to which the exported network must give the class that the original gives."""
DEVIATION = 0.01
"""The largest difference of a logit, as a share of the largest logit: classes can agree where logits do not."""


class Deployed(nn.Module):
    """A network with what belongs before and behind it: uint8 pixels in, logits of their size out.

    Args:
        model: gives logits (B, K, h, w) for normalised images, see `gskd.logits_of`.
        mean, std: of the channels in 0..1, as the model was trained.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        # Not by `normalise`: what it keeps between calls must not be filled while a network is traced.
        scale, shift = scale_and_shift(tuple(mean), tuple(std), torch.device("cpu"))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("shift", shift.clone())

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> (B, K, H, W) float32 logits."""
        height, width = image.shape[-2:]
        images = torch.addcmul(self.shift, image.float(), self.scale)  # type: ignore[arg-type]
        # As much as is ever needed, and then cut by index: padding by a free size, and slices, are traced with the
        # question whether there is anything to do, and only images with the same answer could be run.
        images = F.pad(images, (0, DIVISOR - 1, 0, DIVISOR - 1))
        # Nothing negative is divided: ONNX rounds that the other way.
        images = _cut(images, (height + DIVISOR - 1) // DIVISOR * DIVISOR, (width + DIVISOR - 1) // DIVISOR * DIVISOR)
        logits = logits_of(self.model(images))
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return _cut(logits, height, width)


def _cut(images: Tensor, height: int, width: int) -> Tensor:
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    return images.index_select(-2, rows).index_select(-1, columns)


@dataclass(frozen=True)
class Check:
    """The exported network beside the original on one batch of random pixels."""

    shape: tuple[int, ...]
    """(B, 3, H, W)."""
    error: float
    """Largest difference of a logit."""
    agreement: float
    """Share of pixels with the same class; 0 to 1."""


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares."""

    path: Path
    fixed: tuple[int, int] | None
    """Height and width, where the network takes no other."""
    checks: tuple[Check, ...]
    note: str
    """Why the size is fixed, or empty."""


def deployed(run: Run, recipe: Recipe | None = None) -> Deployed:
    """The run's best student with what belongs around it, in eval mode on the CPU."""
    recipe = recipe or run.load_recipe()
    inference = inference_of(recipe)
    return Deployed(run.load_model(recipe), inference.mean, inference.std).eval()


def export_run(run: Run, output: Path, size: tuple[int, int] | None = None, fixed: bool = False) -> Export:
    """Writes a run's best student, see `export_model`. Metadata hold classes, palette, scores and their scales.

    Args:
        run: a run with scored weights.
        output, fixed: see `export_model`.
        size: the crop of training by default.

    Raises:
        GSKDError: the run has no weights; whatever `export_model` refuses.
    """
    _check_output(output)  # before the weights are read
    recipe = run.load_recipe()
    size = size or (recipe.augment.crop[0], recipe.augment.crop[1])
    return export_model(deployed(run, recipe), output, size, fixed, _facts(run, recipe))


def export_model(
    model: Deployed, output: Path, size: tuple[int, int], fixed: bool = False, facts: Mapping[str, str] | None = None
) -> Export:
    """Writes a network as ONNX or as a program of ``torch.export``, and compares it with the original.

    Input ``image`` is (B, 3, H, W) uint8 RGB, output ``logits`` is (B, K, H, W) float32; B is free, and so are H and W
    where the network allows it (adaptive pooling to a grid, as in PSPNet, does not).

    Args:
        model: in eval mode, on the CPU.
        output: a new file, ``.onnx`` or ``.pt2``.
        size: height and width to fix where they must be; else they are traced with, or more if they are small.
        fixed: fix the size in any case.
        facts: text by name, for the file's metadata.

    Raises:
        GSKDError: the file exists or has another ending, a package of the extra ``export`` is missing, the network
            cannot be exported, or the exported one does not agree with it on batches and sizes it was not traced with.
            No file is left then.
    """
    _check_output(output)
    write, load = (_write_onnx, open_onnx) if output.suffix == ".onnx" else (_write_program, _open_program)
    partial = output.with_name(f".partial-{output.name}")
    note = ""
    try:
        for attempt in [True] if fixed else [False, True]:
            known = {**(facts or {}), **({"size": json.dumps(list(size))} if attempt else {})}
            try:
                write(model, partial, size, attempt, known)
                checks = _compare(model, load(partial), size, attempt)
                break
            except GSKDError as error:
                if attempt:
                    raise GSKDError(f"export {output}: {error}") from None
                note = f"with free height and width {error}"
        os.replace(partial, output)
    except OSError as error:
        raise GSKDError(f"export {output}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return Export(output, size if attempt else None, checks, note)


def _check_output(output: Path) -> None:
    if output.suffix not in FORMATS:
        raise GSKDError(f"export {output}: expected a file that ends in {' or '.join(FORMATS)}")
    require_new_file(output, "export")


def _facts(run: Run, recipe: Recipe) -> dict[str, str]:
    """What a program that finds the file alone would want to know."""
    info = run.info()
    facts = {
        "classes": json.dumps(info["classes"]),
        "palette": json.dumps(info["palette"]),
        "input": "image: (B, 3, H, W) uint8 RGB, not normalised",
        "output": "logits: (B, K, H, W) float32 of the input's height and width",
        "scored_at_scales": json.dumps(list(recipe.eval.scales)),
    }
    if run.result.is_file():
        best = run.read_result()["best"]
        facts["miou"] = json.dumps({split: score["miou"] for split, score in best.items()})
    return facts


def _example(size: tuple[int, int], fixed: bool) -> Tensor:
    # Two images, and where sizes are free features of more than one pixel: exporters take what is 1 for a constant.
    size = size if fixed else _traced(size)
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _traced(size: tuple[int, int]) -> tuple[int, int]:
    return max(size[0], 3 * DIVISOR), max(size[1], 3 * DIVISOR)


def _free(fixed: bool) -> dict[int, str]:
    """The dimensions of the image that are free, and what they are called in the file."""
    return {0: "batch"} if fixed else {0: "batch", 2: "height", 3: "width"}


def _write_onnx(model: Deployed, path: Path, size: tuple[int, int], fixed: bool, facts: Mapping[str, str]) -> None:
    require_packages("onnx", "onnxscript", "onnxruntime")
    try:
        with quietly():
            program = torch.onnx.export(
                model,
                (_example(size, fixed),),
                dynamo=True,
                dynamic_shapes=(_free(fixed),),
                input_names=["image"],
                output_names=["logits"],
                verbose=False,
            )
        assert program is not None
        for key, value in facts.items():
            program.model.metadata_props[f"gskd.{key}"] = value
        program.save(str(path))
    except OSError:
        raise
    except Exception as error:  # whatever an exporter raises: this network is not for it
        raise GSKDError(f"cannot be exported to ONNX: {described(error)}") from None


def _write_program(model: Deployed, path: Path, size: tuple[int, int], fixed: bool, facts: Mapping[str, str]) -> None:
    try:
        with quietly():
            free = dict.fromkeys(_free(fixed), torch.export.Dim.DYNAMIC)
            program = torch.export.export(model, (_example(size, fixed),), dynamic_shapes=(free,))
            torch.export.save(program, path, extra_files={f"gskd.{key}": value for key, value in facts.items()})
    except OSError:
        raise
    except Exception as error:  # likewise
        raise GSKDError(f"cannot be exported by torch.export: {described(error)}") from None


def open_onnx(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function from (B, 3, H, W) uint8 to logits, run by onnxruntime on the CPU.

    Args:
        path: the file.
        threads: of one inference; onnxruntime's choice by default.

    Raises:
        GSKDError: onnxruntime is missing, or cannot read the file; when called, it cannot run it.
    """
    require_packages("onnxruntime")
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions as well
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
    except Exception as error:  # onnxruntime has many kinds
        raise GSKDError(f"{path}: not an ONNX file that onnxruntime reads: {described(error)}") from None

    def call(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        except Exception as error:  # likewise
            raise GSKDError(f"cannot be run on {tuple(images.shape)}: {described(error)}") from None

    return call


def _open_program(path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.load(path).module()

    def call(images: Tensor) -> Tensor:
        try:
            found: Tensor = program(images)
            return found
        except Exception as error:  # a guard on a size, or the program's own
            raise GSKDError(f"cannot be run on {tuple(images.shape)}: {described(error)}") from None

    return call


def _compare(
    model: Deployed, exported: Callable[[Tensor], Tensor], size: tuple[int, int], fixed: bool
) -> tuple[Check, ...]:
    """On batches, and where they are free sizes, that were not traced."""
    height, width = _traced(size)
    other = [size, size, size] if fixed else [(height + DIVISOR, width), (width, height + 13), (height - 7, width + 45)]
    generator = torch.Generator().manual_seed(1)
    checks = []
    for batch, (h, w) in zip((1, 3, 1), other, strict=True):
        images = torch.randint(0, 256, (batch, 3, h, w), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected, found = model(images), exported(images)
        if found.shape != expected.shape:
            raise GSKDError(f"gives {tuple(found.shape)} for {tuple(images.shape)}, expected {tuple(expected.shape)}")
        same = (found.argmax(1) == expected.argmax(1)).float().mean().item()
        checks.append(Check(tuple(images.shape), (found - expected).abs().max().item(), same))
        if not (same >= AGREEMENT and checks[-1].error <= DEVIATION * expected.abs().max().item()):
            raise GSKDError(
                f"agrees with the original on {100 * same:.2f} % of the pixels of {tuple(images.shape)}, largest"
                f" difference of a logit {checks[-1].error:.2g} of {expected.abs().max().item():.2g}; expected at least"
                f" {100 * AGREEMENT:g} % and at most {DEVIATION:g} of it"
            )
    return tuple(checks)


def require_packages(*packages: str) -> None:
    """Raises `GSKDError` where a package of the extra ``export`` is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise GSKDError(f"export: needs {package}, pip install 'gskd[export]'")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The exporters print and warn of what they do inside."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
