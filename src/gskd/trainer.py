"""The training loop on Accelerate (distiller -> trainer -> run folder). It knows no loss by name.

Every step is a function of (recipe, step): order, views and the randomness inside the step are derived from the seed
and the step's number, so a run that is killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gskd.cache import TeacherCache
from gskd.checkpoint import latest_checkpoint, restore, save_checkpoint
from gskd.data import SegmentationDataset
from gskd.data.loading import batches, moved
from gskd.data.views import PositionSampler, TrainingViews, sample_at
from gskd.distiller import Distillation, Distiller, TermValue
from gskd.distributed import sum_over_processes, world_size
from gskd.errors import GSKDError
from gskd.evaluation import evaluate
from gskd.metrics import Score
from gskd.models import normalise, save_weights
from gskd.optimization import build_optimizer, learning_rate_factor
from gskd.progress import Progress
from gskd.recipe import ModelRecipe, Precision, Recipe, TrainRecipe
from gskd.run import Run, augmentation_of, inference_of, layout_of
from gskd.step_guard import StepGuard, explain
from gskd.stops import Stopped, StopRequest

_STEPS_BETWEEN_STOPS = 5


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
    cache: TeacherCache | None = None,
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
        cache: the terms' targets for every fixed view, complete; without it the teacher runs at each step.

    Returns:
        The last score on the val split, and the seconds of training alone, scoring left out, over all resumed parts.

    Raises:
        GSKDError: too many steps without a finite gradient, or something does not fit.
        Stopped: ``stop`` was requested; a checkpoint of the last step is written.
    """
    loop = _Loop(distiller, recipe, run, accelerator, train_data, val_data, progress, teacher_model, stop, cache)
    return loop.run_from(loop.restore() if resume else 0)


class RoundValue(NamedTuple):
    """What one round of a step came to."""

    loss: Tensor
    """Scalar, detached."""
    terms: dict[str, TermValue]


class _Loop:
    """The state of one training, and what is done with it at each step."""

    def __init__(
        self,
        distiller: Distiller,
        recipe: Recipe,
        run: Run,
        accelerator: Any,
        train_data: SegmentationDataset,
        val_data: SegmentationDataset,
        progress: Progress,
        teacher_model: ModelRecipe | None,
        stop: StopRequest | None,
        cache: TeacherCache | None,
    ) -> None:
        self.distiller, self.recipe, self.folder, self.accelerator = distiller, recipe, run, accelerator
        self.train_data, self.val_data, self.progress = train_data, val_data, progress
        self.teacher_model, self.stop, self.cache = teacher_model, stop or StopRequest(), cache
        if recipe.train.channels_last:
            distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        distiller.to(accelerator.device)
        if accelerator.device.type == "cuda" and accelerator.num_processes > 1:
            distiller.student = nn.SyncBatchNorm.convert_sync_batchnorm(distiller.student)  # type: ignore[no-untyped-call]
        self.optimizer = build_optimizer(distiller, recipe.train)
        self.guard = StepGuard(distiller, recipe.train.max_skipped)
        self.best = -1.0
        self.score_is_due = False
        self.seconds = 0.0
        """Of training alone, up to the last time the clock was stopped."""

    def restore(self) -> int:
        """Loads the newest valid checkpoint, and gives the steps done."""
        checkpoint, damaged = latest_checkpoint(self.folder.checkpoints)
        for line in damaged:
            self.progress.say(line)
        step = 0
        if checkpoint is not None:
            restore(checkpoint, self.distiller, self.optimizer)
            step, state = checkpoint.step, checkpoint.state
            self.best, self.seconds = float(state["best"]), float(state["seconds"])
            self.score_is_due = not state.get("scored", True)
            self.guard.skipped = int(state.get("skipped", 0))
            if self.accelerator.scaler is not None and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:
            self.folder.drop_metrics_after(step, and_its_score=self.score_is_due)
        self.progress.say(f"resumed at step {step} of {self.recipe.train.steps}")
        return step

    def run_from(self, first_step: int) -> tuple[Score, float]:
        """All steps that are left; see `fit` for what it returns and raises."""
        train = self.recipe.train
        model, prepared = self.accelerator.prepare(self.distiller, self.optimizer)
        model.train()
        if train.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        with _batches(self.recipe, self.train_data, self.accelerator, first_step, self.cache) as views:
            score = self.take_steps(first_step, model, prepared, views)
        if score is None:  # a run is resumed that lacks its result only
            score = evaluate(self.distiller.student, self.val_data, inference_of(self.recipe), stop=self.stop)
        return score, self.seconds

    def take_steps(self, first_step: int, model: nn.Module, prepared: Any, views: Iterator[Any]) -> Score | None:
        """Steps, reports, scores and checkpoints; the last score, if there was one."""
        train, every = self.recipe.train, self.recipe.eval.every
        score: Score | None = None
        if self.score_is_due:  # it was stopped while it scored this step
            score = self.score(first_step)
        started = time.perf_counter() - self.seconds
        for step in range(first_step, train.steps):
            done = step + 1
            rounds = self.take_step(step, model, prepared, views)
            if step == first_step and self.accelerator.num_processes > 1:
                _check_all_used(self.distiller)
            prepared.zero_grad()
            self.seconds = time.perf_counter() - started
            if rounds and (done % train.log_every == 0 or done == train.steps):
                self.report(done, rounds)
            scoring = done % every == 0 or done == train.steps
            # Several processes ask each other, which waits for all of them.
            asking = self.accelerator.num_processes == 1 or done % _STEPS_BETWEEN_STOPS == 0 or scoring
            if asking and self.stop.agreed():
                self.stop_here(done, scored=not scoring)
            if scoring:
                try:
                    score = self.score(done)
                except Stopped:
                    self.stop_here(done, scored=False)
                except BaseException:  # an image that cannot be read, or too large: the steps done are not its price
                    self.save(done, scored=False)
                    raise
            if done % train.checkpoint_every == 0 or done == train.steps:
                self.save(done)
            if scoring:
                started = time.perf_counter() - self.seconds  # throughput is that of training alone
        return score

    def take_step(self, step: int, model: nn.Module, prepared: Any, views: Iterator[Any]) -> list[RoundValue]:
        """Forward, backward and update; nothing where the gradient is not finite and the step is skipped."""
        train, accelerator = self.recipe.train, self.accelerator
        seed_step(self.recipe.seed, step, accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * learning_rate_factor(step, train)
        self.guard.before_forward()
        rounds: list[RoundValue] = []
        for round_ in range(train.accumulate):
            images, labels, *targets = moved(next(views), accelerator.device)
            inputs = _normalised(images, self.recipe.model, self.teacher_model, layout_of(self.recipe))
            last_round = round_ == train.accumulate - 1
            with contextlib.nullcontext() if last_round else accelerator.no_sync(model):
                result: Distillation = _forward(model, inputs, labels, *targets)
                accelerator.backward(result.loss / train.accumulate)
            rounds.append(RoundValue(result.loss.detach(), result.terms))
        if not self.guard.gradient_is_finite():
            self.guard.undo_forward()
            self.skip(step, rounds, inputs[0])
            if accelerator.scaler is not None:
                prepared.step()  # leaves the step out itself, and learns its scale from it
            return []
        if train.clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), train.clip)
        prepared.step()
        return rounds

    def skip(self, step: int, rounds: Sequence[RoundValue], images: Tensor) -> None:
        """Counts and names a step without a finite gradient."""
        loss, terms = _numbers(rounds)
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(loss) and scaler.get_scale() >= 1:
            return  # a loss scaler finds its scale by steps that overflow
        samples = _samples(self.train_data, self.recipe, step)
        if self.guard.count():
            reason = explain(terms, self.distiller.student, images, samples, self.guard.skipped)
            raise GSKDError(f"step {step + 1}: {reason}")
        self.progress.say(f"step {step + 1} is skipped: its gradient is not finite; samples {', '.join(samples)}")
        if self.accelerator.is_main_process:
            self.folder.add_metrics({"step": step + 1, "skipped": samples})

    def report(self, done: int, rounds: Sequence[RoundValue]) -> None:
        """Loss, terms, rate and pace: to the metrics, the trackers and the progress line."""
        loss, terms = _numbers(rounds)
        if not math.isfinite(loss):  # with a finite gradient, or it had been skipped
            values = ", ".join(f"{name} {value['raw']:.4g}" for name, value in terms.items())
            raise GSKDError(f"step {done}: the loss is {loss} ({values}); a lower train.lr or train.clip may help")
        pace = max(self.seconds, 1e-9) / done
        record = {
            "step": done,
            "loss": loss,
            "terms": terms,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds_per_step": pace,
            "images_per_s": self.recipe.train.batch / pace,
        }
        if self.accelerator.is_main_process:
            self.folder.add_metrics(record)
        self.accelerator.log(_flat(record), step=done)
        self.progress.step(record, self.recipe.train.steps)

    def score(self, done: int) -> Score:
        """Scores the val split, and keeps the weights where they are the best so far."""
        split, student = self.recipe.data.val, self.distiller.student
        _agree_on_buffers(student, self.accelerator)
        counter = self.progress.counter(f"step {done}: scoring {split}")
        score = evaluate(student, self.val_data, inference_of(self.recipe), counter, self.stop)
        is_best = score.miou > self.best or math.isnan(score.miou)  # a split without labels still leaves weights
        if self.accelerator.is_main_process:
            self.folder.add_metrics({"step": done, "split": split, **score.to_dict(self.val_data.classes)})
            if is_best:
                save_weights(student, self.folder.student, {"step": str(done)})
        self.best = max(self.best, score.miou)
        self.accelerator.log({f"{split}/miou": score.miou}, step=done)
        self.progress.score(f"step {done} {split}", score, best=is_best)
        return score

    def save(self, done: int, scored: bool = True) -> None:
        """Writes a checkpoint."""
        if self.accelerator.is_main_process:
            state = {
                "best": self.best,
                "seconds": self.seconds,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "scored": scored,
                "skipped": self.guard.skipped,
            }
            keep = self.recipe.train.keep
            save_checkpoint(self.folder.checkpoints, done, self.distiller, self.optimizer, state, keep)

    def stop_here(self, done: int, scored: bool) -> NoReturn:
        """Saves and stops, together with all other processes."""
        self.save(done, scored)
        self.accelerator.wait_for_everyone()  # a launcher ends all when the first one ends
        raise Stopped(f"step {done} of {self.recipe.train.steps}") from None


def _samples(data: SegmentationDataset, recipe: Recipe, step: int) -> list[str]:
    """Names of the samples of a step, of all processes."""
    positions = range(step * recipe.train.batch, (step + 1) * recipe.train.batch)
    return [data.name(sample_at(recipe.seed, position, len(data))[0]) for position in positions]


def _numbers(rounds: Sequence[RoundValue]) -> tuple[float, dict[str, dict[str, float]]]:
    """Loss and terms as numbers: the mean over rounds, as of their gradients, and over processes, each of which has
    those of its own images."""
    parts = [torch.stack([one.loss, *(part for term in one.terms.values() for part in term)]).float() for one in rounds]
    flat = torch.stack(parts).mean(dim=0)
    loss, *rest = (sum_over_processes(flat) / world_size()).tolist()
    pairs = zip(rounds[0].terms, rest[::2], rest[1::2], strict=True)
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


def _batches(
    recipe: Recipe, data: SegmentationDataset, accelerator: Any, first_step: int, cache: TeacherCache | None
) -> contextlib.AbstractContextManager[Iterator[Any]]:
    train, processes = recipe.train, accelerator.num_processes
    return batches(
        TrainingViews(data, augmentation_of(recipe), recipe.seed, recipe.augment.views, cache),
        recipe.data.workers,
        batch_size=train.batch // processes // train.accumulate,
        sampler=PositionSampler(train.batch, first_step, train.steps, accelerator.process_index, processes),
        pin_memory=accelerator.device.type == "cuda",
    )


def _normalised(
    images: Tensor, student: ModelRecipe, teacher: ModelRecipe | None, layout: torch.memory_format
) -> tuple[Tensor, Tensor | None]:
    """The batch as the student wants it, and as the teacher does where that differs."""
    student_images = normalise(images, student.mean, student.std).contiguous(memory_format=layout)
    if teacher is None or (teacher.mean, teacher.std) == (student.mean, student.std):
        return student_images, None
    return student_images, normalise(images, teacher.mean, teacher.std).contiguous(memory_format=layout)


def _forward(model: nn.Module, inputs: tuple[Tensor, Tensor | None], labels: Tensor, *targets: Any) -> Any:
    try:
        return model(inputs[0], labels, inputs[1], *targets)
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
