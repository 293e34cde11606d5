"""A recipe carried out from end to end: data, models, the teacher's own score, training, final scores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gskd.assembly import build_distiller, build_recipe_model, open_split, ready_teacher, task_loss_of
from gskd.cache import CacheSource, TeacherCache, fill_cache
from gskd.checkpoint import latest_checkpoint, write_text
from gskd.data import SegmentationDataset
from gskd.data.selection import find_unreadable, without
from gskd.distiller import Distiller
from gskd.distributed import lost_process_named, rank, sum_over_processes, world_size
from gskd.environment import peak_memory
from gskd.errors import GSKDError
from gskd.evaluation import evaluate, predictions
from gskd.fast_teacher import TeacherPath, Trial
from gskd.metrics import Score
from gskd.models import count_parameters, load_weights
from gskd.progress import Progress
from gskd.recipe import EvalRecipe, ModelRecipe, Recipe, TrainRecipe, Unreadable, dump_recipe
from gskd.run import Run, device_of, inference_of, layout_of, teacher_dtype
from gskd.speed import slow_precision
from gskd.stops import Stopped, StopRequest
from gskd.trainer import build_accelerator, fit


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
    extended = accept_changes and resume and run.changes(recipe)
    if extended:
        stands, _ = latest_checkpoint(run.checkpoints)
        if stands is not None and stands.step > recipe.train.steps:
            raise GSKDError(
                f"train.steps: {recipe.train.steps}, and run {run.path} has done {stands.step}; expected no fewer"
            )
    if resume and run.result.is_file() and not extended:  # written last
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
    teacher_model, distiller = None, Distiller(student, task_loss=task_loss_of(recipe.train))
    if distill:
        distiller, teacher_model = build_distiller(recipe, student, train_data)
    teacher = distiller.teacher
    accelerator.wait_for_everyone()  # all have looked at the folder before the first one lays it out

    with contextlib.ExitStack() as scope, progress, lost_process_named(), StopRequest() as stop:
        if accelerator.is_main_process:
            taught_by = recipe.teacher if distill else None
            if not resume:
                run.create(recipe, kind, train_data, taught_by, left_out)
            scope.enter_context(run.held())
            if resume and accept_changes:
                run.accept(recipe, taught_by, train_data, left_out)
        accelerator.wait_for_everyone()
        progress.say(
            f"{run.path}: {type(student).__name__} with {count_parameters(student) / 1e6:.2f} M parameters"
            f" on {accelerator.device}"
        )
        taught = recipe.teacher.precision if distill and recipe.teacher is not None else None
        asked = {
            "train.precision": recipe.train.precision,
            "teacher.precision": taught,
            "eval.precision": recipe.eval.precision,
        }
        if slow := slow_precision(accelerator.device, asked):
            progress.say(slow)
        scored = {split: splits[split] for split in (recipe.data.val, recipe.data.test) if split}
        teacher_score: Score | None = None
        try:
            # What cannot be scored must not be found after the first hours of training.
            student.to(accelerator.device)
            with contextlib.closing(predictions(student, val_data, inference_of(recipe), [0])) as first:
                next(first)
            if teacher is not None and teacher_model is not None:
                assert recipe.teacher is not None
                spec = replace(recipe, model=teacher_model)
                inference = inference_of(spec)
                if recipe.teacher.precision is not None and recipe.eval.precision is None:
                    inference = replace(inference, dtype=teacher_dtype(recipe))
                teacher.to(accelerator.device, memory_format=layout_of(recipe))  # type: ignore[call-overload]
                counter = progress.counter(f"scoring the teacher on {recipe.data.val}")
                teacher_score = evaluate(teacher, val_data, inference, counter, stop)
                progress.score(f"teacher on {recipe.data.val}", teacher_score)
            cache = None
            if teacher_model is not None and recipe.teacher is not None and recipe.teacher.cache is not None:
                cache = _whole_cache(CacheSource(recipe, distiller, teacher_model, train_data), progress, stop)
            elif teacher_model is not None:
                _ready_for_steps(recipe, distiller, teacher_model, train_data, run, progress)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # of scoring the teacher
            last, seconds = fit(
                distiller, recipe, run, accelerator, train_data, val_data, progress, resume, teacher_model, stop, cache
            )
        except GSKDError:
            if accelerator.is_main_process:
                run.discard_if_unused()  # a mistake found in the first step must not block the folder
            raise
        memory = peak_memory()  # before scoring, which takes whole images
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


def _ready_for_steps(
    recipe: Recipe,
    distiller: Distiller,
    teacher_model: ModelRecipe,
    data: SegmentationDataset,
    run: Run,
    progress: Progress,
) -> None:
    """The teacher made fast for the steps of a run; a run that goes on takes the path that it was begun with."""
    images = recipe.train.batch // world_size() // recipe.train.accumulate
    begun = run.teacher_path()
    _say(ready_teacher(recipe, distiller, teacher_model, data, images, begun), distiller.teacher_path, progress)
    if distiller.teacher_path is not None and rank() == 0 and begun is None:
        run.keep_teacher_path(distiller.teacher_path)


def _say(trials: Sequence[Trial], path: TeacherPath | None, progress: Progress) -> None:
    for trial in trials:
        progress.say(f"teacher in {trial}")
    if path is not None:
        progress.say(f"the teacher runs in {path}")


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
    distiller.to(device_of(recipe), memory_format=layout_of(recipe))  # type: ignore[call-overload]
    return CacheSource(recipe, distiller, teacher_model, data)


def build_cache(recipe: Recipe, progress: Progress) -> TeacherCache:
    """A recipe's teacher cache, made where it was missing or damaged.

    Raises:
        GSKDError: as `cache_source` and `gskd.cache.fill_cache`.
        Stopped: SIGTERM or Ctrl-C came; what was done is kept.
    """
    source = cache_source(recipe)
    with progress, StopRequest() as stop:
        assert recipe.teacher is not None
        if slow := slow_precision(
            source.device, {"teacher.precision": recipe.teacher.precision or recipe.train.precision}
        ):
            progress.say(slow)
        return _whole_cache(source, progress, stop)


def _whole_cache(source: CacheSource, progress: Progress, stop: StopRequest) -> TeacherCache:
    """The cache of a source, made by all processes together."""
    cache = TeacherCache(source)
    if rank() == 0:
        for line in cache.tidy(stop):
            progress.say(line)
    _stop_together(stop)
    if sum_over_processes(torch.tensor(len(cache.missing()), device=source.device)):
        _say(source.ready(cache), source.distiller.teacher_path, progress)
    fill_cache(cache, source, progress, stop)
    _stop_together(stop)
    cache.require_whole()
    return cache


def _stop_together(stop: StopRequest) -> None:
    """Waits for all processes; stops all where one was asked to."""
    if stop.agreed():
        raise Stopped("the teacher cache")


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
