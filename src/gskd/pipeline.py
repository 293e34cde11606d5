"""A recipe carried out from end to end: data, models, the teacher's own score, training, final scores."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gskd.architectures import build_model, has_own_weights, require_trusted, without_pretraining
from gskd.cache import CacheSource, TeacherCache, fill_cache
from gskd.checkpoint import write_text
from gskd.data import SegmentationDataset
from gskd.data.datasets import Cached, open_dataset
from gskd.data.selection import find_unreadable, without
from gskd.distiller import Distiller, Layers, Term, resolve_layers, tap_names
from gskd.distributed import lost_process_named, rank
from gskd.errors import GSKDError, near_names
from gskd.evaluation import evaluate
from gskd.losses import LOSSES
from gskd.metrics import Score
from gskd.models import check_classes, count_parameters, load_weights
from gskd.progress import Progress
from gskd.recipe import (
    EvalRecipe,
    ModelRecipe,
    Recipe,
    TeacherRecipe,
    TermRecipe,
    TrainRecipe,
    Unreadable,
    dump_recipe,
    load_recipe,
    set_value,
)
from gskd.run import Run, autocast_dtype, device_of, inference_of
from gskd.stops import Stopped, StopRequest
from gskd.taps import channels
from gskd.trainer import build_accelerator, fit


def open_split(recipe: Recipe, split: str) -> SegmentationDataset:
    """A split of the recipe's data, decoded samples kept in memory as far as the recipe allows."""
    data = open_dataset(recipe.data.dataset, recipe.data.root, split, recipe.data.options)
    return Cached(data, recipe.data.cache_gib) if recipe.data.cache_gib > 0 else data


def train_model(
    recipe: Recipe,
    run: Run,
    *,
    distill: bool,
    resume: bool = False,
    accept_changes: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the recipe's model, alone or against its teacher, and scores it.

    Args:
        recipe: what to do.
        run: the run folder; new, or with ``resume`` one that was begun with the same recipe.
        distill: with teacher and terms; without, both are left out even if the recipe names them.
        resume: continue where the run's newest valid checkpoint stands; a folder without a run is begun.
        accept_changes: with ``resume``, go on though recipe, teacher or training samples have changed since; they
            become the run's, which then is no longer what its recipe alone would give.
        progress: where lines for people go.

    Returns:
        The content of ``result.json``: scores of the best and the last weights on the val and (where named) test split,
        the teacher's own scores, parameters, seconds and peak memory.

    Raises:
        GSKDError: anything in recipe, data, models or run folder that the user must put right. Found before the run
            folder is touched, as far as it can be.
        Stopped: SIGTERM or Ctrl-C came; what was done is saved, and ``resume`` goes on from there.
    """
    if distill and (recipe.teacher is None or not recipe.terms):
        raise GSKDError("distill: the recipe names no " + ("teacher" if recipe.teacher is None else "terms"))
    kind = "distill" if distill else "train"
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    accelerator = build_accelerator(recipe.train, run)
    resume = resume and run.exists
    if resume:
        begun = run.info().get("kind")
        if begun != kind:
            raise GSKDError(f"run {run.path}: was begun by gskd {begun}; it cannot be continued by gskd {kind}")
        if not accept_changes:
            run.check_recipe(recipe)
            if distill and recipe.teacher is not None:
                run.check_teacher(recipe.teacher)
    else:
        run.check_free()
    progress = progress or Progress()
    progress.enabled = progress.enabled and accelerator.is_main_process
    if resume and run.result.is_file():  # written last
        progress.say(f"{run.path}: is finished; nothing is left to do")
        return run.read_result()
    splits = {
        name: open_split(recipe, name)
        for name in dict.fromkeys([recipe.data.train, recipe.data.val, recipe.data.test])
        if name
    }
    train_data, val_data = splits[recipe.data.train], splits[recipe.data.val]
    left_out: list[str] = []
    if recipe.data.unreadable == Unreadable.skip:
        # A run goes on with the samples it was begun with, whatever was put right since, unless others are accepted.
        as_begun = resume and not accept_changes
        left_out = run.info().get("left_out", []) if as_begun else _unreadable(train_data, accelerator.device, progress)
        train_data = without(train_data, left_out)
    if resume and not accept_changes:
        run.check_samples(train_data)
    torch.manual_seed(recipe.seed)  # the student's first weights depend on the seed alone, not on teacher or terms
    student = build_recipe_model(recipe.model, train_data, "model", recipe.augment.crop)
    teacher_model, distiller = None, Distiller(student)
    if distill:
        distiller, teacher_model = build_distiller(recipe, student, train_data)
    teacher = distiller.teacher
    accelerator.wait_for_everyone()  # all have looked at the folder before the first one lays it out
    if accelerator.is_main_process:
        taught_by = recipe.teacher if distill else None
        if not resume:
            run.create(recipe, kind, train_data, taught_by, left_out)
        elif accept_changes:
            run.accept(recipe, taught_by, train_data, left_out)
    accelerator.wait_for_everyone()

    with progress, lost_process_named(), StopRequest() as stop:
        progress.say(
            f"{run.path}: {type(student).__name__} with {count_parameters(student) / 1e6:.2f} M parameters"
            f" on {accelerator.device}"
        )
        scored = {split: splits[split] for split in (recipe.data.val, recipe.data.test) if split}
        teacher_score: Score | None = None
        if teacher is not None and teacher_model is not None:
            assert recipe.teacher is not None
            spec = replace(recipe, model=teacher_model)
            inference = inference_of(spec)
            if recipe.teacher.precision is not None and recipe.eval.precision is None:
                inference = replace(inference, dtype=autocast_dtype(recipe.teacher.precision))
            layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
            teacher.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
            counter = progress.counter(f"scoring the teacher on {recipe.data.val}")
            teacher_score = evaluate(teacher, val_data, inference, counter, stop)
            progress.score(f"teacher on {recipe.data.val}", teacher_score)
        try:
            cache = None
            if teacher_model is not None and recipe.teacher is not None and recipe.teacher.cache is not None:
                cache = _whole_cache(CacheSource(recipe, distiller, teacher_model, train_data), progress, stop)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # of scoring the teacher
            last, seconds = fit(
                distiller, recipe, run, accelerator, train_data, val_data, progress, resume, teacher_model, stop, cache
            )
        except GSKDError:
            if accelerator.is_main_process:
                run.discard_if_unused()  # a mistake found in the first step must not block the folder
            raise
        memory = _peak_memory()  # before scoring, which takes whole images
        accelerator.wait_for_everyone()  # the first process may still be writing the best weights
        result = _final_scores(recipe, run, student, scored, last, progress, stop)
    result |= {
        "best_step": run.best_step(),
        "parameters": count_parameters(student),
        "seconds": seconds,
        "peak_memory_gib": memory,
        "teacher": teacher_score and {recipe.data.val: teacher_score.to_dict(val_data.classes)},
    }
    if accelerator.is_main_process:
        write_text(run.result, json.dumps(result, indent=1))
    accelerator.end_training()  # at the very end: it takes the processes apart
    return result


def _unreadable(data: SegmentationDataset, device: torch.device, progress: Progress) -> list[str]:
    """Names of the samples that are left out, after a line for each."""
    with progress:
        found = find_unreadable(data, device, progress.counter("reading all samples"))
    for index, reason in found.items():
        progress.say(f"left out: {reason or data.name(index)}")
    if found:
        progress.say(f"{len(found)} of {len(data)} training samples are left out (data.unreadable)")
    return [data.name(index) for index in found]


def prepare_caches(recipes: Sequence[Recipe], progress: Progress) -> None:
    """Fills the teacher caches that recipes name, before they are run.

    Recipes that share teacher and views share a pass of the teacher, whatever their terms.

    Raises:
        GSKDError: as `gskd.cache.fill_cache`, and whatever a recipe cannot be built for.
    """
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        if recipe.teacher is not None and recipe.teacher.cache is not None and recipe.terms:
            train = TrainRecipe(precision=recipe.train.precision, channels_last=recipe.train.channels_last)
            same = replace(recipe, output="", seed=0, terms={}, train=train, eval=EvalRecipe())
            groups.setdefault(dump_recipe(same), []).append(recipe)
    for group in groups.values():
        terms = {
            f"{name}_{number}": replace(term, loss=term.loss or name)
            for number, recipe in enumerate(group)
            for name, term in recipe.terms.items()
        }
        build_cache(replace(group[0], terms=terms), progress)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the runs, which are other processes


def cache_source(recipe: Recipe) -> CacheSource:
    """What a recipe's teacher cache is filled from, built anew.

    Raises:
        GSKDError: the recipe names no cache, or cannot be built.
    """
    if recipe.teacher is None or recipe.teacher.cache is None or not recipe.terms:
        raise GSKDError("cache: expected a recipe with terms and teacher.cache, the folder for the teacher's results")
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    data = open_split(recipe, recipe.data.train)
    if recipe.data.unreadable == Unreadable.skip:
        data = without(data, _unreadable(data, torch.device("cpu"), Progress(enabled=False)))
    student = build_recipe_model(recipe.model, data, "model", recipe.augment.crop)
    distiller, teacher_model = build_distiller(recipe, student, data)
    once = {json.dumps(distiller.target_settings(name), sort_keys=True): name for name in distiller.losses}
    if len(once) < len(recipe.terms):  # several terms need the same of the teacher
        recipe = replace(recipe, terms={name: recipe.terms[name] for name in once.values()})
        distiller, teacher_model = build_distiller(recipe, student, data)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    distiller.to(device_of(recipe), memory_format=layout)  # type: ignore[call-overload]
    return CacheSource(recipe, distiller, teacher_model, data)


def build_cache(recipe: Recipe, progress: Progress) -> TeacherCache:
    """A recipe's teacher cache, made where it was missing or damaged.

    Raises:
        GSKDError: as `cache_source` and `gskd.cache.fill_cache`.
        Stopped: SIGTERM or Ctrl-C came; what was done is kept.
    """
    source = cache_source(recipe)
    with progress, StopRequest() as stop:
        return _whole_cache(source, progress, stop)


def _whole_cache(source: CacheSource, progress: Progress, stop: StopRequest) -> TeacherCache:
    """The cache of a source, made by all processes together."""
    cache = TeacherCache(source)
    if rank() == 0:
        for line in cache.tidy(stop):
            progress.say(line)
    _stop_together(stop)
    fill_cache(cache, source, progress, stop)
    _stop_together(stop)
    cache.require_whole()
    return cache


def _stop_together(stop: StopRequest) -> None:
    """Waits for all processes; stops all where one was asked to."""
    if stop.agreed():
        raise Stopped("the teacher cache")


def build_distiller(
    recipe: Recipe, student: nn.Module, data: SegmentationDataset, fold: bool = True
) -> tuple[Distiller, ModelRecipe]:
    """The recipe's teacher and terms around a student, and what the teacher was built from.

    Args:
        recipe: names teacher and terms.
        student: the network around which they go.
        data: whose classes both have.
        fold: run the teacher with its batch normalisation folded, see `Distiller.fold_teacher`.
    """
    assert recipe.teacher is not None
    teacher, teacher_model = _build_teacher(recipe.teacher, data, recipe.augment.crop)
    terms = _build_terms(recipe.terms, student, teacher, len(data.classes), recipe.augment.crop)
    precision = recipe.teacher.precision
    dtype = autocast_dtype(precision) if precision is not None else None
    distiller = Distiller(student, teacher, terms, teacher_dtype=dtype)
    if fold:
        distiller.fold_teacher(torch.randn(1, 3, *recipe.augment.crop, generator=torch.Generator().manual_seed(0)))
    return distiller, teacher_model


def _peak_memory() -> float | None:
    """GiB at the highest: on CUDA that of training, else of this whole process; None where the system is silent."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _final_scores(
    recipe: Recipe,
    run: Run,
    student: nn.Module,
    scored: dict[str, SegmentationDataset],
    last: Score,
    progress: Progress,
    stop: StopRequest,
) -> dict[str, Any]:
    """Scores of the last and the best weights; val picked the best, so only its test score is free of that choice."""
    inference = inference_of(recipe)
    scores: dict[str, dict[str, Score]] = {"last": {recipe.data.val: last}, "best": {}}
    for which in ("last", "best"):
        if which == "best" and run.best_step() == recipe.train.steps:
            scores["best"] = scores["last"]
        elif which == "best" and run.best_step() is not None:
            load_weights(student, run.student)
        for split, data in scored.items():
            if split not in scores[which]:
                counter = progress.counter(f"scoring the {which} weights on {split}")
                scores[which][split] = evaluate(student, data, inference, counter, stop)
            progress.score(f"{which} weights on {split}", scores[which][split])
    classes = scored[recipe.data.val].classes
    return {which: {split: s.to_dict(classes) for split, s in by.items()} for which, by in scores.items()}


def build_recipe_model(spec: ModelRecipe, data: SegmentationDataset, where: str, size: Sequence[int]) -> nn.Module:
    """The network a recipe names, with its weights, checked to give one logit per class on images of ``size``."""
    require_trusted(spec.name, where)
    if spec.weights is None:
        model = build_model(spec.name, spec.args, len(data.classes))
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


def _build_teacher(
    spec: TeacherRecipe, data: SegmentationDataset, size: Sequence[int]
) -> tuple[nn.Module, ModelRecipe]:
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
