"""A run folder: everything about one run, so that it can be moved, resumed, scored and used with no other argument.

::

    recipe.yaml          the recipe, every default spelled out
    run.json             kind of run, classes, palette, environment
    metrics.jsonl        one JSON object a line: steps and scores
    checkpoints/         see gskd.checkpoint
    student.safetensors  the best model by val mIoU, without projectors
    result.json          final scores, written last
    tensorboard/         events for TensorBoard
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gskd.architectures import build_model, require_trusted, without_pretraining
from gskd.checkpoint import write_text
from gskd.data import SegmentationDataset
from gskd.data.views import Augmentation
from gskd.environment import environment
from gskd.errors import GSKDError
from gskd.evaluation import Inference
from gskd.fast_teacher import TeacherPath
from gskd.models import load_weights, read_metadata
from gskd.recipe import Precision, Recipe, TeacherPrecision, TeacherRecipe, dump_recipe, load_recipe

_HELD: set[int] = set()
"""Open folders whose lock this process has. A loading process, which may outlive a kill, must not have it too."""


def _let_go() -> None:
    for folder in _HELD:
        os.close(folder)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class Run:
    """A run folder by its path; opening one reads nothing."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def info_file(self) -> Path:
        """Kind, classes, palette, environment."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """Weights of the best model."""
        return self.path / "student.safetensors"

    @property
    def result(self) -> Path:
        """Final scores."""
        return self.path / "result.json"

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.recipe_file.is_file()

    def create(
        self,
        recipe: Recipe,
        kind: str,
        data: SegmentationDataset,
        teacher: TeacherRecipe | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """Lays out a new run folder; kept are a hash of the teacher's weights, and which samples there are.

        Raises:
            GSKDError: the folder holds anything already, or cannot be written; what is there stays as it was.
        """
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GSKDError(f"output {self.path}: cannot be made: {error.strerror or error}") from None
        info = {
            "kind": kind,
            "classes": list(data.classes),
            "palette": np.asarray(data.palette).tolist(),
            **_origins(teacher, data),
            "left_out": list(left_out),
            "environment": environment(),
        }
        write_text(self.info_file, json.dumps(info, indent=1))
        write_text(self.recipe_file, dump_recipe(recipe))  # last: it is what makes the folder a run

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While this lasts no other process may train in the folder; ended by a kill too. Nothing is left in it.

        Raises:
            GSKDError: another process does.
        """
        if os.name == "nt":  # no lock on a folder
            yield
            return
        import fcntl

        folder = os.open(self.path, os.O_RDONLY)
        _HELD.add(folder)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GSKDError(f"run {self.path}: another process is training it") from None
            except OSError:
                pass  # a network disk that has no locks
            yield
        finally:
            _HELD.discard(folder)
            os.close(folder)

    def check_free(self) -> None:
        """Raises `GSKDError` where the folder cannot take a new run."""
        if self.exists:
            raise GSKDError(f"output {self.path}: holds another run; continue it with --resume or name another folder")
        try:
            # What a kill inside `create` leaves blocks nobody.
            begun = {self.info_file.name, f"{self.info_file.name}.partial", f"{self.recipe_file.name}.partial"}
            if self.path.exists() and (not self.path.is_dir() or any(f.name not in begun for f in self.path.iterdir())):
                raise GSKDError(f"output {self.path}: expected a new or empty folder, found other files")
        except OSError as error:
            raise GSKDError(f"output {self.path}: cannot be read: {error.strerror or error}") from None

    def discard_if_unused(self) -> None:
        """Takes back a run that recorded no step, score or checkpoint. Only what `create` made is removed."""
        recorded = self.metrics.is_file() and self.metrics.stat().st_size > 0
        if recorded or self.student.exists() or any(self.checkpoints.glob("step-*")):
            return
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        for file in (self.recipe_file, self.info_file, self.metrics):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # holds something else
            self.checkpoints.rmdir()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def load_recipe(self, overrides: tuple[str, ...] = ()) -> Recipe:
        """The recipe the run was made with."""
        if not self.exists:
            raise GSKDError(
                f"run {self.path}: holds no recipe.yaml; expected a folder made by gskd train or gskd distill"
            )
        return load_recipe(self.recipe_file, overrides)

    def info(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        try:
            info: dict[str, Any] = json.loads(self.info_file.read_text(encoding="utf-8"))
            if not isinstance(info["classes"], list) or len(info["classes"]) != len(info["palette"]):
                raise ValueError("classes and palette do not match")
            return info
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GSKDError(f"run {self.path}: run.json cannot be read: {error}") from None

    def read_result(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        try:
            result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
            return result
        except (OSError, ValueError) as error:
            raise GSKDError(f"run {self.path}: result.json cannot be read: {error}") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; one that a kill cut short is left out."""
        lines = []
        if self.metrics.is_file():
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return lines

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises `GSKDError` where the run was begun with another recipe.

        Where things stand, how data are loaded, how much is computed at a time and how often it reports may change.
        """
        if differing := self.changes(recipe):
            raise GSKDError(f"run {self.path}: was begun with another recipe: " + "; ".join(differing[:3]))

    def changes(self, recipe: Recipe) -> list[str]:
        """What makes another run of it than the recipe it was begun with, a line for each field."""
        alone = self.info().get("kind") == "train"  # then teacher and terms were left out
        return _differences(_core(self.load_recipe(), alone), _core(recipe, alone))

    def check_teacher(self, teacher: TeacherRecipe) -> None:
        """Raises `GSKDError` where the run was begun with other weights of the teacher."""
        begun = self.info().get("teacher_sha256")
        if begun is not None and begun != _weights_hash(teacher):
            raise GSKDError(f"run {self.path}: was begun with another teacher: its weights have changed since")

    def check_samples(self, data: SegmentationDataset) -> None:
        """Raises `GSKDError` where the training samples, or their order, are not those the run was begun with."""
        begun = self.info().get("samples_sha256")
        if begun is not None and begun != _names_hash(data):
            raise GSKDError(
                f"run {self.path}: was begun with other training samples: files were added, removed or renamed since"
            )

    def accept(
        self, recipe: Recipe, teacher: TeacherRecipe | None, data: SegmentationDataset, left_out: Sequence[str] = ()
    ) -> None:
        """Makes recipe, teacher and samples of now those of the run, which is then not finished any more.

        Its metrics keep a line that this was done.
        """
        changes = self.changes(recipe)
        info = self.info() | _origins(teacher, data) | {"left_out": list(left_out)}
        info.pop("teacher_path", None)
        write_text(self.info_file, json.dumps(info, indent=1))
        write_text(self.recipe_file, dump_recipe(recipe))
        self.add_metrics({"step": 0, "accepted": changes})
        self.result.unlink(missing_ok=True)

    def teacher_path(self) -> TeacherPath | None:
        """How the teacher ran in this run, where that was probed."""
        kept = self.info().get("teacher_path")
        return kept and TeacherPath.from_json(kept)

    def keep_teacher_path(self, path: TeacherPath) -> None:
        """Remembers what was probed: a resumed run must compute the same."""
        write_text(self.info_file, json.dumps(self.info() | {"teacher_path": path.to_json()}, indent=1))

    def check_classes(self, data: SegmentationDataset, where: str = "run") -> None:
        """Raises `GSKDError` unless the data has the classes, in the order, that the run was trained on."""
        theirs, ours = self.info()["classes"], list(data.classes)
        if theirs != ours:
            raise GSKDError(f"{where} {self.path}: was trained on {len(theirs)} classes {theirs}; the data has {ours}")

    def load_model(self, recipe: Recipe | None = None) -> nn.Module:
        """The best model of the run, in eval mode."""
        recipe, classes = recipe or self.load_recipe(), self.info()["classes"]
        if not self.student.is_file():
            raise GSKDError(
                f"run {self.path}: has no scored weights yet, the first come at step {recipe.eval.every} or the last;"
                " continue it with --resume"
            )
        # The run's weights replace whatever the encoder would have been started from: do not fetch that.
        args = without_pretraining(recipe.model.name, recipe.model.args)
        require_trusted(recipe.model.name, f"run {self.path}: model")
        model = build_model(recipe.model.name, args, len(classes))
        load_weights(model, self.student)
        return model.eval()

    def best_step(self) -> int | None:
        """The step whose weights ``student.safetensors`` holds; None where there are none yet."""
        if not self.student.is_file():
            return None
        return int(read_metadata(self.student).get("step", -1))

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends a line to ``metrics.jsonl``."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise GSKDError(f"{self.metrics}: cannot be written: {error.strerror or error}") from None

    def drop_metrics_after(self, step: int, and_its_score: bool = False) -> None:
        """Forgets the lines of steps that a resumed run will do again; with a flag, also the score of the last one."""
        if self.metrics.is_file():
            kept = []
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    scored_again = and_its_score and "split" in record and record["step"] == step
                    if record["step"] <= step and not scored_again:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the line a kill cut short
            write_text(self.metrics, "".join(kept))


def autocast_dtype(precision: Precision) -> torch.dtype:
    """The dtype of autocast; float32 stands for none."""
    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}[precision]


def teacher_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of autocast around the teacher, where nothing was probed."""
    assert recipe.teacher is not None
    named = recipe.teacher.precision
    if named is None or named == TeacherPrecision.auto:
        return autocast_dtype(recipe.train.precision)
    return autocast_dtype(Precision(named.value))


def inference_of(recipe: Recipe) -> Inference:
    """How the recipe's model is scored."""
    spec = recipe.eval
    return Inference(
        mode=spec.mode.value,
        window=(spec.window[0], spec.window[1]),
        overlap=spec.overlap,
        scales=tuple(spec.scales),
        flip=spec.flip,
        mean=tuple(recipe.model.mean),
        std=tuple(recipe.model.std),
        dtype=autocast_dtype(spec.precision or recipe.train.precision),
    )


def augmentation_of(recipe: Recipe) -> Augmentation:
    """What the recipe's views are drawn from."""
    spec = recipe.augment
    return Augmentation(
        crop=(spec.crop[0], spec.crop[1]),
        scale=(spec.scale[0], spec.scale[1]),
        **{name: getattr(spec, name) for name in ("flip", "brightness", "contrast", "saturation", "hue")},
    )


def layout_of(recipe: Recipe) -> torch.memory_format:
    """How networks and images lie in memory."""
    return torch.channels_last if recipe.train.channels_last else torch.contiguous_format


def device_of(recipe: Recipe) -> torch.device:
    """Where the recipe's model is scored and used: CUDA where there is one, unless the recipe says cpu."""
    return torch.device("cuda" if recipe.train.device == "auto" and torch.cuda.is_available() else "cpu")


def _weights_hash(teacher: TeacherRecipe) -> str | None:
    """Of the file that the teacher's weights come from; None where it has none, or none that can be read."""
    place = teacher.run or (teacher.model and teacher.model.weights)
    if not place:
        return None
    run = Run(Path(place).expanduser())
    file = run.student if run.exists else run.path
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _origins(teacher: TeacherRecipe | None, data: SegmentationDataset) -> dict[str, Any]:
    """What a run was made from, apart from its recipe."""
    return {"teacher_sha256": teacher and _weights_hash(teacher), "samples_sha256": _names_hash(data)}


def _names_hash(data: SegmentationDataset) -> str:
    """Of the names in their order; that is what the order of training is drawn over."""
    names = json.dumps([data.name(index) for index in range(len(data))])
    return hashlib.sha256(names.encode()).hexdigest()


def _core(recipe: Recipe, alone: bool) -> dict[str, Any]:
    """What makes a run what it is."""
    if alone:
        recipe = replace(recipe, teacher=None, terms={})
    train = replace(recipe.train, log_every=1, checkpoint_every=1, keep=1, tensorboard=True, threads=None)
    data = replace(recipe.data, workers=0, cache_gib=0.0, root=None)
    model, teacher = replace(recipe.model, weights=None), recipe.teacher
    if teacher is not None:
        own = teacher.model and replace(teacher.model, weights=None)
        teacher = replace(teacher, run=teacher.run and "", model=own, cache=teacher.cache and "", cache_gib=1.0)
    return asdict(replace(recipe, output="", train=train, data=data, model=model, teacher=teacher))


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in {**old, **new} for line in _differences(old.get(key), new.get(key), f"{where}.{key}")]
    return [] if old == new else [f"{where.lstrip('.')} was {old}, is now {new}"]
