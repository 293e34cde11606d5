"""The training loop on Accelerate (distiller -> trainer -> run folder). It knows no loss by name.

Every step is a function of (recipe, step): order, views and the randomness inside the step are derived from the seed
and the step's number, so a run that is killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gskd.checkpoint import latest_checkpoint, restore, save_checkpoint
from gskd.data import SegmentationDataset
from gskd.data.views import Augmentation, PositionSampler, TrainingViews, sample_at
from gskd.distiller import Distillation, Distiller
from gskd.distributed import sum_over_processes, world_size
from gskd.errors import GSKDError
from gskd.evaluation import evaluate
from gskd.metrics import Score
from gskd.models import normalise, save_weights
from gskd.progress import Progress
from gskd.recipe import ModelRecipe, OptimizerName, Precision, Recipe, ScheduleName, TrainRecipe
from gskd.run import Run, inference_of
from gskd.step_guard import StepGuard, explain
from gskd.stops import Stopped, StopRequest, ignore_stops

_STEPS_BETWEEN_STOPS = 5


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """The share of the peak learning rate at a step, counted from 0.

    ``onecycle`` (Smith and Topin 2018, arXiv 1708.07120, cosine form): from 1/25 up to 1 over the warm-up, then down to
    1/250000. ``poly``: up from 1/1000 over the warm-up, then (1 - t) ** 0.9. ``constant``: up, then 1.
    """
    warmup = round(recipe.warmup * recipe.steps)
    start = {ScheduleName.onecycle: 1 / 25, ScheduleName.poly: 1e-3, ScheduleName.constant: 1e-3}[recipe.schedule]
    if step < warmup:
        t = step / warmup
        rise = (1 - math.cos(math.pi * t)) / 2 if recipe.schedule == ScheduleName.onecycle else t
        return start + (1 - start) * rise
    t = (step - warmup) / max(1, recipe.steps - warmup)
    if recipe.schedule == ScheduleName.onecycle:
        end = 1 / 250_000
        return end + (1 - end) * (1 + math.cos(math.pi * t)) / 2
    return (1 - t) ** 0.9 if recipe.schedule == ScheduleName.poly else 1.0


def build_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; no weight decay on biases and normalisation (1-D parameters)."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise GSKDError("model: has no parameter that can be trained")
    if recipe.optimizer == OptimizerName.adamw:
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Makes all randomness of a step (dropout, sampling of points) a function of (seed, step, rank)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**63
    torch.manual_seed(mixed)


def build_accelerator(recipe: TrainRecipe, run: Run) -> Any:
    """Accelerate's engine for devices, mixed precision and processes, as the recipe and the launcher ask."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    AcceleratorState._reset_state()  # a second run in one process may ask for another precision
    cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    if cpu and recipe.precision == Precision.fp16:
        raise GSKDError("train.precision: fp16 needs a CUDA device, found none; expected fp32 or bf16")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(recipe.precision, str(recipe.precision)),
        log_with="tensorboard" if recipe.tensorboard else None,
        project_config=ProjectConfiguration(project_dir=str(run.path), logging_dir=str(run.path)),
    )
    accelerator.gradient_accumulation_steps = 1  # ours is train.accumulate; a launcher's setting would scale the loss
    if recipe.batch % (accelerator.num_processes * recipe.accumulate):
        raise GSKDError(
            f"train.batch: {recipe.batch} images do not divide among {accelerator.num_processes} processes"
            f" x {recipe.accumulate} rounds of accumulation"
        )
    return accelerator


def fit(
    distiller: Distiller,
    recipe: Recipe,
    run: Run,
    accelerator: Any,
    train_data: SegmentationDataset,
    val_data: SegmentationDataset,
    progress: Progress,
    resume: bool = False,
    teacher_model: ModelRecipe | None = None,
    stop: StopRequest | None = None,
) -> tuple[Score, float]:
    """Trains until ``recipe.train.steps``.

    Writes ``metrics.jsonl``, ``checkpoints/`` and ``student.safetensors`` (the best by val mIoU) into the run folder.

    Args:
        distiller: student, teacher and terms.
        recipe: its ``train``, ``augment``, ``eval`` and ``seed`` are used.
        run: the run folder.
        accelerator: from `build_accelerator`.
        train_data, val_data: the splits.
        progress: where lines for people go.
        resume: continue from the newest valid checkpoint.
        teacher_model: whose mean and std the teacher wants; by default the student's.
        stop: looked at after each step and while scoring.

    Returns:
        The last score on the val split, and the seconds of training alone, scoring left out, over all resumed parts.

    Raises:
        GSKDError: the loss is not finite, or something does not fit.
        Stopped: ``stop`` was requested; a checkpoint of the last step is written.
    """
    train, student = recipe.train, distiller.student
    main = accelerator.is_main_process
    if train.channels_last:
        distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    distiller.to(accelerator.device)
    if accelerator.device.type == "cuda" and accelerator.num_processes > 1:
        distiller.student = student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
    optimizer = build_optimizer(distiller, train)
    first_step, best, seconds_before, score_is_due, skipped = 0, -1.0, 0.0, False, 0
    stop = stop or StopRequest()
    if resume:
        checkpoint, damaged = latest_checkpoint(run.checkpoints)
        for line in damaged:
            progress.say(line)
        if checkpoint is not None:
            restore(checkpoint, distiller, optimizer)
            first_step, best = checkpoint.step, float(checkpoint.state["best"])
            seconds_before = float(checkpoint.state["seconds"])
            score_is_due = not checkpoint.state.get("scored", True)
            skipped = int(checkpoint.state.get("skipped", 0))
            if accelerator.scaler is not None and checkpoint.state.get("scaler"):
                accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        if main:
            run.drop_metrics_after(first_step, and_its_score=score_is_due)
        progress.say(f"resumed at step {first_step} of {train.steps}")
    model, prepared = accelerator.prepare(distiller, optimizer)
    model.train()
    guard = StepGuard(distiller, train.max_skipped, skipped)
    if train.tensorboard:
        accelerator.init_trackers("tensorboard")

    batches = iter(_loader(recipe, train_data, accelerator, first_step))
    inference = inference_of(recipe)
    score: Score | None = None
    started = time.perf_counter() - seconds_before

    def score_now(done: int) -> Score:
        nonlocal best, started
        paused = time.perf_counter()
        _agree_on_buffers(student, accelerator)
        counter = progress.counter(f"step {done}: scoring {recipe.data.val}")
        found = evaluate(student, val_data, inference, counter, stop)
        is_best = found.miou > best or math.isnan(found.miou)  # a split without labels still leaves weights
        if main:
            run.add_metrics({"step": done, "split": recipe.data.val, **found.to_dict(val_data.classes)})
            if is_best:
                save_weights(student, run.student, {"step": str(done)})
        best = max(best, found.miou)
        accelerator.log({f"{recipe.data.val}/miou": found.miou}, step=done)
        progress.score(f"step {done} {recipe.data.val}", found, best=is_best)
        started += time.perf_counter() - paused  # throughput is that of training alone
        return found

    def save(done: int, scored: bool = True) -> None:
        if main:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            seconds = time.perf_counter() - started
            state = {
                "best": best,
                "seconds": seconds,
                "scaler": scaler,
                "scored": scored,
                "skipped": guard.skipped,
            }
            save_checkpoint(run.checkpoints, done, distiller, optimizer, state, train.keep)

    def stop_here(done: int, scored: bool) -> NoReturn:
        save(done, scored)
        accelerator.wait_for_everyone()  # a launcher ends all when the first one ends
        raise Stopped(f"step {done} of {train.steps}") from None

    if score_is_due:  # it was stopped while it scored this step
        score = score_now(first_step)
    for step in range(first_step, train.steps):
        seed_step(recipe.seed, step, accelerator.process_index)
        rate = train.lr * learning_rate_factor(step, train)
        for group in optimizer.param_groups:
            group["lr"] = rate
        guard.before_forward()
        for round_ in range(train.accumulate):
            images, labels = (x.to(accelerator.device, non_blocking=True) for x in _next(batches))
            inputs = _normalised(images, recipe.model, teacher_model, train.channels_last)
            last_round = round_ == train.accumulate - 1
            with contextlib.nullcontext() if last_round else accelerator.no_sync(model):
                result = _forward(model, inputs, labels)
                accelerator.backward(result.loss / train.accumulate)
        if step == first_step and accelerator.num_processes > 1:
            _check_all_used(distiller)
        done = step + 1
        taken = guard.gradient_is_finite()
        if not taken:
            guard.undo_forward()
            loss, terms = _values(result)
            # A loss scaler finds its scale by steps that overflow; only where the loss itself is bad is it a mistake.
            if accelerator.scaler is None or not math.isfinite(loss) or accelerator.scaler.get_scale() < 1:
                samples = _samples(train_data, recipe, step)
                if guard.count():
                    reason = explain(terms, student, inputs[0], samples, guard.skipped)
                    raise GSKDError(f"step {done}: {reason}")
                progress.say(f"step {done} is skipped: its gradient is not finite; samples {', '.join(samples)}")
                if main:
                    run.add_metrics({"step": done, "skipped": samples})
        elif train.clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), train.clip)
        if taken or accelerator.scaler is not None:  # which leaves a bad step out itself, and learns from it
            prepared.step()
        prepared.zero_grad()

        if taken and (done % train.log_every == 0 or done == train.steps):
            loss, terms = _values(result)
            if not math.isfinite(loss):
                reason = explain(terms, student, inputs[0], _samples(train_data, recipe, step), guard.skipped)
                raise GSKDError(f"step {done}: the loss is {loss}; {reason}")
            pace = max(time.perf_counter() - started, 1e-9) / done
            record = {
                "step": done,
                "loss": loss,
                "terms": terms,
                "lr": rate,
                "seconds_per_step": pace,
                "images_per_s": train.batch / pace,
            }
            if main:
                run.add_metrics(record)
            accelerator.log(_flat(record), step=done)
            progress.step(record, train.steps)
        scoring = done % recipe.eval.every == 0 or done == train.steps
        # Several processes ask each other, which waits for all of them.
        if (accelerator.num_processes == 1 or done % _STEPS_BETWEEN_STOPS == 0 or scoring) and stop.agreed():
            stop_here(done, scored=not scoring)
        if scoring:
            try:
                score = score_now(done)
            except Stopped:
                stop_here(done, scored=False)
        if done % train.checkpoint_every == 0 or done == train.steps:
            save(done)
    seconds = time.perf_counter() - started
    # Nothing was left to train when a run is resumed that lacks its result only: the score is measured again.
    return score if score is not None else evaluate(student, val_data, inference, stop=stop), seconds


def _samples(data: SegmentationDataset, recipe: Recipe, step: int) -> list[str]:
    """Names of the samples of a step, of all processes."""
    positions = range(step * recipe.train.batch, (step + 1) * recipe.train.batch)
    return [data.name(sample_at(recipe.seed, position, len(data))[0]) for position in positions]


def _values(result: Distillation) -> tuple[float, dict[str, dict[str, float]]]:
    """Loss and terms as numbers. A process has those of its own images; their mean over processes is the batch's."""
    flat = torch.stack([result.loss.detach().float(), *(x.float() for value in result.terms.values() for x in value)])
    loss, *rest = (sum_over_processes(flat) / world_size()).tolist()
    pairs = zip(result.terms, rest[::2], rest[1::2], strict=True)
    return loss, {name: {"raw": raw, "weighted": weighted} for name, raw, weighted in pairs}


def _check_all_used(distiller: Distiller) -> None:
    unused = [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise GSKDError(
            f"model: {len(unused)} parameters got no gradient, first {unused[:3]}; several processes need all of them"
            " used (an auxiliary head?): build the model without, or train on one process"
        )


def _agree_on_buffers(student: nn.Module, accelerator: Any) -> None:
    """Gives every process the first one's batch-norm statistics, so that all score the model that is saved."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        with torch.no_grad():
            for buffer in student.buffers():
                buffer.copy_(broadcast(buffer.clone(), from_process=0))


def _next(batches: Iterator[Any]) -> Any:
    try:
        return next(batches)
    except GSKDError as error:
        # A worker process sends its whole traceback as the message, whose last part is what the dataset said.
        raise GSKDError(str(error).rsplit(f"{GSKDError.__name__}: ", 1)[-1].strip()) from None


def _loader(recipe: Recipe, data: SegmentationDataset, accelerator: Any, first_step: int) -> DataLoader[Any]:
    train, augment = recipe.train, recipe.augment
    augmentation = Augmentation(
        crop=(augment.crop[0], augment.crop[1]),
        scale=(augment.scale[0], augment.scale[1]),
        **{name: getattr(augment, name) for name in ("flip", "brightness", "contrast", "saturation", "hue")},
    )
    processes = accelerator.num_processes
    return DataLoader(
        TrainingViews(data, augmentation, recipe.seed),
        batch_size=train.batch // processes // train.accumulate,
        sampler=PositionSampler(train.batch, first_step, train.steps, accelerator.process_index, processes),
        num_workers=recipe.data.workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_stops,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the generator of the training step
    )


def _normalised(
    images: Tensor, student: ModelRecipe, teacher: ModelRecipe | None, channels_last: bool
) -> tuple[Tensor, Tensor | None]:
    """The batch as the student wants it, and as the teacher does where that differs."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student_images = normalise(images, student.mean, student.std).contiguous(memory_format=layout)
    if teacher is None or (teacher.mean, teacher.std) == (student.mean, student.std):
        return student_images, None
    return student_images, normalise(images, teacher.mean, teacher.std).contiguous(memory_format=layout)


def _forward(model: nn.Module, inputs: tuple[Tensor, Tensor | None], labels: Tensor) -> Any:
    try:
        return model(inputs[0], labels, inputs[1])
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise GSKDError(
            f"train.batch: {labels.shape[0]} image in a forward pass leaves batch normalisation one value per channel;"
            " expected 2 or more for each process and round"
        ) from None


def _flat(record: dict[str, Any]) -> dict[str, float]:
    flat = {key: value for key, value in record.items() if isinstance(value, float)}
    for name, values in record["terms"].items():
        flat[f"terms/{name}"], flat[f"weighted/{name}"] = values["raw"], values["weighted"]
    return flat
