"""What a recipe names, built: data, networks with their weights, the distiller around them (recipe -> distiller)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gskd.architectures import build_model, has_own_weights, require_trusted, without_pretraining
from gskd.data import SegmentationDataset
from gskd.data.datasets import Cached, open_dataset
from gskd.data.views import TrainingViews
from gskd.distiller import Distiller, Term
from gskd.errors import GSKDError, near_names
from gskd.fast_teacher import TeacherPath, Trial
from gskd.layers import Layers, channels, resolve_layers, tap_names
from gskd.losses import LOSSES
from gskd.models import check_classes, load_weights, normalise
from gskd.recipe import (
    ModelRecipe,
    Recipe,
    TeacherPrecision,
    TeacherRecipe,
    TermRecipe,
    TrainRecipe,
    load_recipe,
    set_value,
)
from gskd.run import Run, augmentation_of, layout_of, teacher_dtype
from gskd.task_losses import class_balanced_cross_entropy, cross_entropy


def open_split(recipe: Recipe, split: str) -> SegmentationDataset:
    """A split of the recipe's data, decoded samples kept in memory as far as the recipe allows."""
    data = open_dataset(recipe.data.dataset, recipe.data.root, split, recipe.data.options)
    return Cached(data, recipe.data.cache_gib) if recipe.data.cache_gib > 0 else data


def build_distiller(recipe: Recipe, student: nn.Module, data: SegmentationDataset) -> tuple[Distiller, ModelRecipe]:
    """The recipe's teacher and terms around a student, and what the teacher was built from.

    Args:
        recipe: names teacher and terms.
        student: the network around which they go.
        data: whose classes both have.
    """
    assert recipe.teacher is not None
    teacher, teacher_model = build_teacher(recipe.teacher, data, recipe.augment.crop)
    terms = _build_terms(recipe.terms, student, teacher, len(data.classes), recipe.augment.crop)
    dtype = teacher_dtype(recipe) if recipe.teacher.precision is not None else None
    distiller = Distiller(student, teacher, terms, task_loss=task_loss_of(recipe.train), teacher_dtype=dtype)
    return distiller, teacher_model


def task_loss_of(recipe: TrainRecipe) -> Callable[[Tensor, Tensor], Tensor]:
    """What the student learns from the labels."""
    if recipe.class_balance == 0:
        return cross_entropy
    return partial(class_balanced_cross_entropy, weight=recipe.class_balance)


def ready_teacher(
    recipe: Recipe,
    distiller: Distiller,
    teacher_model: ModelRecipe,
    data: SegmentationDataset,
    batch: int,
    path: TeacherPath | None = None,
) -> list[Trial]:
    """Makes the teacher as fast as the recipe allows; before it is run for many images, by all processes.

    Its batch normalisation is folded where that is exact; ``teacher.precision: auto`` is `Distiller.probe_teacher`.

    Args:
        recipe: whose views the teacher will see.
        distiller: with the teacher, where it shall run.
        teacher_model: whose normalisation it wants.
        data: the training split.
        batch: images in each of its passes.
        path: of an earlier probe, to be taken again.

    Returns:
        What was tried; nothing unless the recipe asks for it.
    """
    assert recipe.teacher is not None
    assert distiller.teacher is not None
    views = TrainingViews(data, augmentation_of(recipe), recipe.seed, recipe.augment.views)
    images = torch.stack([views[position][0] for position in range(batch)])
    device = next(distiller.teacher.parameters()).device
    inputs = normalise(images.to(device), teacher_model.mean, teacher_model.std).contiguous(
        memory_format=layout_of(recipe)
    )
    if path is not None:
        distiller.take_path(path, inputs)
    elif recipe.teacher.precision == TeacherPrecision.auto:
        return distiller.probe_teacher(inputs)
    else:
        distiller.fold_teacher(inputs[:1])
    return []


def build_recipe_model(spec: ModelRecipe, data: SegmentationDataset, where: str, size: Sequence[int]) -> nn.Module:
    """The network a recipe names, with its weights, checked to give one logit per class on images of ``size``."""
    require_trusted(spec.name, where)
    if spec.weights is None:
        model = build_model(spec.name, spec.args, len(data.classes), trained=where == "teacher.model")
    else:
        model = build_model(spec.name, without_pretraining(spec.name, spec.args), len(data.classes))
        weights = Run(Path(spec.weights).expanduser())
        if weights.exists:
            _check_weights_run(weights, spec, data, where)
        load_weights(model, weights.student if weights.exists else weights.path)
    check_classes(model, len(data.classes), f"{where} {spec.name!r}", size)
    return model


def named_models(name: str, arguments: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """A model by its name, or a recipe's student and teacher; without weights, to be looked at.

    Args:
        name: of a model, see `gskd.architectures`, or of a recipe.
        arguments: ``key=value``, of the model or of the recipe.

    Returns:
        Titles and models.

    Raises:
        GSKDError: there is no such recipe, or it cannot be built.
    """
    if ":" in name and not Path(name).is_file():
        args: dict[str, Any] = {}
        for argument in arguments:
            set_value(args, argument)
        require_trusted(name, "model")
        return [(name, build_model(name, without_pretraining(name, args)))]
    recipe = load_recipe(name, list(arguments))
    specs = {"student": recipe.model}
    if recipe.teacher is not None and recipe.teacher.model is not None:
        specs["teacher"] = recipe.teacher.model
    for side, spec in specs.items():
        require_trusted(spec.name, side)
    return [(side, build_model(spec.name, without_pretraining(spec.name, spec.args))) for side, spec in specs.items()]


def _check_weights_run(run: Run, spec: ModelRecipe, data: SegmentationDataset, where: str) -> None:
    """Weights of a run are meant for its classes and its normalisation: with others they fit and are wrong."""
    run.check_classes(data, f"{where}.weights")
    made = run.load_recipe().model
    for name, theirs, ours in (("mean", made.mean, spec.mean), ("std", made.std, spec.std)):
        if theirs != ours:
            raise GSKDError(f"{where}.weights {run.path}: was trained with {name} {theirs}; here it would get {ours}")


def build_teacher(spec: TeacherRecipe, data: SegmentationDataset, size: Sequence[int]) -> tuple[nn.Module, ModelRecipe]:
    """The teacher that a recipe names, with its weights, and what it was built from."""
    if spec.model is not None:
        if spec.model.weights is None and not has_own_weights(spec.model.name, spec.model.args):
            raise GSKDError("teacher.model.weights: missing; name the trained teacher's file or run folder")
        return build_recipe_model(spec.model, data, "teacher.model", size), spec.model
    assert spec.run is not None
    run = Run(Path(spec.run).expanduser())
    recipe = run.load_recipe()
    run.check_classes(data, "teacher")
    model = run.load_model(recipe)
    check_classes(model, len(data.classes), f"teacher {recipe.model.name!r}", size)
    return model, recipe.model


def check_terms(specs: dict[str, TermRecipe]) -> None:
    """Raises `GSKDError` for a loss that does not exist or an argument that it does not take; builds nothing."""
    for name, spec in specs.items():
        kind = spec.loss or name
        if kind not in LOSSES:
            raise GSKDError(f"terms.{name}: unknown loss {kind!r}{near_names(kind, LOSSES)}")
        known = _arguments(LOSSES[kind])
        for argument in spec.args:
            if argument not in known:
                near = near_names(argument, known) if known else f"; {kind} takes none"
                raise GSKDError(f"terms.{name}.args: no argument {argument!r}{near}")


def _arguments(loss: type[nn.Module]) -> list[str]:
    """What a recipe may pass to a loss; a generator has no value in YAML."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind in named and p.name != "generator"]


def _build_terms(
    specs: dict[str, TermRecipe], student: nn.Module, teacher: nn.Module, num_classes: int, size: Sequence[int]
) -> dict[str, Term]:
    check_terms(specs)
    loss_types = {name: LOSSES[spec.loss or name] for name, spec in specs.items()}
    layers: dict[str, dict[str, Layers]] = {"student": {}, "teacher": {}}
    for name, spec in specs.items():
        for side, model, given in (("student", student, spec.student), ("teacher", teacher, spec.teacher)):
            layers[side][name] = resolve_layers(model, given, loss_types[name])
    # Also where no loss asks for a width: a layer that never fires is found now and not in the first step.
    example = torch.zeros(1, 3, *size)
    shapes = {
        side: channels(model, tap_names(layers[side].values()), example)
        for side, model in {"student": student, "teacher": teacher}.items()
    }
    terms = {}
    for name, spec in specs.items():
        known = _arguments(loss_types[name])
        filled: dict[str, Any] = {"num_classes": num_classes}
        for side in layers:
            layer = layers[side][name]
            if isinstance(layer, str):
                filled[f"{side}_channels"] = shapes[side][layer][1]
        args = {key: value for key, value in filled.items() if key in known} | spec.args
        try:
            loss = loss_types[name](**args)
        except GSKDError as error:
            raise GSKDError(f"terms.{name}.args: {error}") from None
        except TypeError as error:
            raise GSKDError(f"terms.{name}.args: {spec.loss or name} refuses {args}: {error}") from None
        terms[name] = Term(loss, spec.weight, layers["student"][name], layers["teacher"][name])
    return terms
