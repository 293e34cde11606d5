"""The fields of a recipe, their types, defaults and meaning. What is not here is an unknown key."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Precision(StrEnum):
    """Arithmetic of the forward pass; weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class TeacherPrecision(StrEnum):
    """Arithmetic of the teacher's forward pass."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    auto = "auto"


class OptimizerName(StrEnum):
    """Optimisers of torch.optim."""

    adamw = "adamw"
    sgd = "sgd"


class ScheduleName(StrEnum):
    """How the learning rate moves: see `gskd.optimization.learning_rate_factor`."""

    poly = "poly"
    onecycle = "onecycle"
    constant = "constant"


class Unreadable(StrEnum):
    """What a training sample that cannot be read does."""

    stop = "stop"
    skip = "skip"


class EvalMode(StrEnum):
    """Whole image at once, or overlapping windows."""

    whole = "whole"
    slide = "slide"


@dataclass
class DataRecipe:
    """Where samples come from."""

    dataset: str = "scenes"
    """camvid, cityscapes, voc, ade20k, coco_stuff, folder, hub or scenes: `gskd.data.datasets.open_dataset`."""
    root: str | None = None
    """The dataset's folder; scenes needs none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the dataset, for example `size` of scenes or `classes` of folder."""
    train: str = "train"
    val: str = "val"
    test: str | None = None
    """Names of the splits. `val` picks the best checkpoint; `test`, where named, is scored once at the end."""
    workers: int = 0
    """Processes that load data; 0 loads in the training process."""
    cache_gib: float = 2.0
    """Memory for decoded samples, in GiB for each loading process; 0 decodes every time."""
    unreadable: Unreadable = Unreadable.stop
    """Of training samples whose image or mask is damaged or does not fit: `stop` ends the run at the first one, `skip`
    reads all of them before the first step and leaves those out, by name. A split that is scored must be whole."""


@dataclass
class AugmentRecipe:
    """Ranges of the random views, see `gskd.data.views.Augmentation`."""

    views: int | None = None
    """Fixed views of each sample, used in turn, the same in every run; by default each epoch draws a new one. What
    `teacher.cache` needs."""
    crop: list[int] = field(default_factory=lambda: [96, 128])
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    flip: float = 0.5
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.25
    hue: float = 0.0


@dataclass
class ModelRecipe:
    """A network: `smp:Architecture` or `package.module:callable`, with arguments and weights."""

    name: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    """A .safetensors file, or a run folder (then its best student)."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Of the RGB channels in 0..1; images are normalised with each model's own."""


@dataclass
class TeacherRecipe:
    """The network to learn from: a finished run, or a model with weights."""

    run: str | None = None
    """A run folder of this library; names the model and the weights at once."""
    model: ModelRecipe | None = None
    """Instead of `run`: any model. Weights should be named, else the teacher is random."""
    precision: TeacherPrecision | None = None
    """Arithmetic of the teacher's forward pass; by default that of training. `auto` tries before the first step which
    precision and layout is fastest here and still gives the plain teacher's classes and similarities."""
    cache: str | None = None
    """A folder. What the terms need of the teacher is written there once for every fixed view (`augment.views`), and
    read by this and every later run instead of running the teacher. See `gskd.cache`."""
    cache_gib: float = 20.0
    """The most that is written there."""


@dataclass
class TermRecipe:
    """One distillation term."""

    weight: float = 1.0
    loss: str | None = None
    """Name of the loss; by default the term's own name, so that the same loss can stand twice under two names."""
    student: Any = "auto"
    teacher: Any = "auto"
    """Layers to read, by dotted name; `logits` is the output; `auto` chooses for known families of models. A list of
    names for a loss that compares layers (psd)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the loss."""


@dataclass
class TrainRecipe:
    """The optimisation."""

    steps: int = 1000
    batch: int = 8
    """Images per optimiser step, over all processes and accumulation rounds."""
    accumulate: int = 1
    """Rounds of forward and backward per optimiser step."""
    optimizer: OptimizerName = OptimizerName.adamw
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Not applied to biases and normalisation."""
    momentum: float = 0.9
    """Of SGD."""
    schedule: ScheduleName = ScheduleName.onecycle
    warmup: float = 0.1
    """Share of the steps over which the rate rises."""
    class_balance: float = 0.0
    """Weight of a second cross-entropy, on 8 points of every class in an image, beside that on all pixels: for rare
    classes, at the cost of common ones. See `gskd.task_losses.class_balanced_cross_entropy`."""
    clip: float | None = None
    """Largest norm of the gradient; by default it is left as it is."""
    max_skipped: int = 10
    """Steps whose gradient is not finite are skipped and named, at most this many; one more, or three in a row, ends
    the run. 0 ends it at the first."""
    precision: Precision = Precision.fp32
    channels_last: bool = False
    device: str = "auto"
    """auto or cpu."""
    threads: int | None = None
    """CPU threads of one process; by default PyTorch's own choice."""
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2
    """Checkpoints kept, the newest."""
    tensorboard: bool = True


@dataclass
class EvalRecipe:
    """How a model is scored, always at the labels' own resolution."""

    every: int = 500
    """Steps between scores on the val split; the last step is always scored."""
    mode: EvalMode = EvalMode.whole
    window: list[int] = field(default_factory=lambda: [512, 512])
    """Of slide: (height, width), at least 32 each."""
    overlap: float = 0.33
    """Of slide: least share of a window that its neighbour covers again, at most 0.95."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """The image is scored at each of these scales and the probabilities are averaged."""
    flip: bool = False
    """Averages with the mirrored image."""
    precision: Precision | None = None
    """By default that of training."""


@dataclass
class Recipe:
    """Everything one run needs. `gskd train` trains `model` alone; `gskd distill` adds `teacher` and `terms`."""

    output: str = ""
    """The run folder."""
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    teacher: TeacherRecipe | None = None
    terms: dict[str, TermRecipe] = field(default_factory=dict)
    """By a name of your choice; a term that is null is left out, so that `terms.kd=null` removes one."""
    train: TrainRecipe = field(default_factory=TrainRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
