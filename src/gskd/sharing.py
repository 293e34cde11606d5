"""A student as others take it: a folder, or a repository of the Hugging Face hub (run folder -> from_pretrained)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from torch import Tensor, nn

from gskd.architectures import build_model, require_trusted, without_pretraining
from gskd.checkpoint import require_new_folder
from gskd.errors import GSKDError
from gskd.evaluation import Inference, predict
from gskd.export import Deployed
from gskd.recipe import ModelRecipe, Recipe, dump_recipe
from gskd.run import Run, inference_of

_LOADING = """```python
from gskd.sharing import PretrainedStudent

student = PretrainedStudent.from_pretrained("{place}")
labels = student.label_map(image)      # (H, W, 3) uint8 RGB -> (H, W) class indices
```"""


class PretrainedStudent(
    nn.Module,
    PyTorchModelHubMixin,  # the one place where we inherit: it is how the hub's methods are had
    library_name="gskd",
    pipeline_tag="image-segmentation",
    tags=["semantic-segmentation", "knowledge-distillation"],
):
    """A trained student with all that is needed to use it: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    The folder holds ``model.safetensors``, ``config.json`` (the arguments below) and a model card. Called with
    (B, 3, H, W) uint8 RGB it gives (B, K, H, W) logits, as `gskd.export.Deployed`.

    Args:
        name: of the architecture, as in a recipe. Code of one's own (``package.module:callable``) is run only where
            that is allowed, see ``SECURITY.md``.
        args: of the architecture.
        classes: their names.
        palette: their colours, [red, green, blue] each.
        mean, std: of the channels in 0..1.
        scales, flip, mode, window, overlap: how it was scored, and how `label_map` runs it; see
            `gskd.evaluation.Inference`.
        facts: scores, recipe and teacher, for the model card.

    Raises:
        GSKDError: the architecture cannot be built.
    """

    def __init__(
        self,
        name: str,
        args: Mapping[str, Any],
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        mean: Sequence[float],
        std: Sequence[float],
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        mode: Literal["whole", "slide"] = "whole",
        window: Sequence[int] = (512, 512),
        overlap: float = 0.33,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_trusted(name, "config.json: name")
        model = build_model(name, without_pretraining(name, dict(args)), len(classes))
        self.network = Deployed(model, mean, std)
        self.classes, self.palette = tuple(classes), np.asarray(palette, np.uint8)
        self.inference = Inference(
            mode, (window[0], window[1]), overlap, tuple(scales), flip, mean=tuple(mean), std=tuple(std)
        )
        self.facts = dict(facts or {})
        self.eval()

    @classmethod
    def from_run(cls, run: Run, licence: str | None = None) -> PretrainedStudent:
        """The best student of a run.

        Args:
            run: with scored weights.
            licence: its name on the hub, for example "apache-2.0"; what data and teacher allow is yours to know.

        Raises:
            GSKDError: there are no weights yet.
        """
        recipe = run.load_recipe()
        inference, info = inference_of(recipe), run.info()
        model = run.load_model(recipe)
        name, args = _architecture(recipe.model, model)
        student = cls(
            name=name,
            args=args,
            classes=list(info["classes"]),
            palette=[list(colour) for colour in info["palette"]],
            mean=list(inference.mean),
            std=list(inference.std),
            scales=list(inference.scales),
            flip=inference.flip,
            mode=inference.mode,
            window=list(inference.window),
            overlap=inference.overlap,
            facts=_facts(run, recipe, licence),
        )
        student.network.model = model
        return student

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> (B, K, H, W) float32 logits."""
        logits: Tensor = self.network(image)
        return logits

    @torch.no_grad()
    def label_map(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H, W) uint8 class indices, run as it was scored."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise GSKDError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        scores = predict(self.network.model, pixels.to(next(self.parameters()).device), self.inference)
        labels: np.ndarray = scores.argmax(0).to(torch.uint8).cpu().numpy()
        return labels

    def generate_model_card(self, *args: Any, place: str = "ORGANISATION/NAME", **kwargs: Any) -> ModelCard:
        """The card: classes, scores, how to load it, and what it was made with."""
        facts = self.facts
        data = ModelCardData(
            license=facts.get("licence"),
            library_name="gskd",
            pipeline_tag="image-segmentation",
            tags=["semantic-segmentation", "knowledge-distillation", "model_hub_mixin"],
        )
        parameters = sum(p.numel() for p in self.parameters())
        scores = "\n".join(
            f"| {split} | {100 * score['miou']:.1f} | {100 * score['pixel_accuracy']:.1f} |"
            for split, score in facts.get("scores", {}).items()
            if score.get("miou") is not None
        )
        made = facts.get("made", "trained")
        text = [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {facts.get('title', 'Segmentation student')}",
            f"A semantic-segmentation network of {parameters / 1e6:.2f} M parameters, {made} with gskd.",
            _LOADING.format(place=place),
            f"Classes: {', '.join(self.classes)}.",
        ]
        if scores:
            text.append(f"| split | mIoU | pixel accuracy |\n|---|---|---|\n{scores}")
            scored = self.inference
            scales = ", ".join(f"{scale:g}" for scale in scored.scales)
            how = "Whole images" if scored.mode == "whole" else "Windows of {} x {}".format(*scored.window)
            text.append(f"{how} at scale {scales}{', with flips' if scored.flip else ''}.")
        if facts.get("teacher"):
            text.append(f"Teacher: {facts['teacher']}.")
        if facts.get("recipe"):
            text.append(f"## Recipe\n\n```yaml\n{facts['recipe'].strip()}\n```")
        return ModelCard("\n\n".join(text) + "\n")

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **given: Any) -> PretrainedStudent:
        # The mixin's default lets weights be missing without a word.
        try:
            student: PretrainedStudent = super()._from_pretrained(strict=True, **given)
        except RuntimeError as error:  # of load_state_dict, a line for each kind of key
            reason = " ".join(str(error).split())
            raise GSKDError(f"{given['model_id']}: the weights do not fit: {reason[:200]}") from None
        return student.eval()


def share_run(run: Run, output: Path, licence: str | None = None, push: str | None = None) -> None:
    """Writes a run's best student as a folder for ``from_pretrained``, and uploads it where that is asked for.

    Args:
        run: with scored weights.
        output: a new or empty folder.
        licence: see `PretrainedStudent.from_run`.
        push: ``organisation/name`` of a repository of the hub, made where it is missing.

    Raises:
        GSKDError: the folder holds anything, the run has no weights, or the hub refuses.
    """
    require_new_folder(output)
    student = PretrainedStudent.from_run(run, licence)
    try:
        student.save_pretrained(output, model_card_kwargs={"place": push or str(output)})
    except OSError as error:
        raise GSKDError(f"output {output}: cannot be written: {error.strerror or error}") from None
    if push is not None:
        try:
            student.push_to_hub(push, model_card_kwargs={"place": push})
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise GSKDError(f"hub {push}: {reason}; the folder {output} is complete") from None


def _architecture(spec: ModelRecipe, model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name and arguments that build the network where nothing but the shared folder is.

    The configuration of ``hf:`` stands in a folder of this machine, or on a hub where it may change.
    """
    if not spec.name.startswith("hf:"):
        return spec.name, without_pretraining(spec.name, spec.args)
    config: dict[str, Any] = model.config.to_diff_dict()  # type: ignore[operator, union-attr]
    kind = config.pop("model_type")
    for key in ("transformers_version", "architectures", "dtype", "id2label", "label2id", "_name_or_path"):
        config.pop(key, None)
    return f"transformers:{kind}", config


def _public(model: ModelRecipe) -> ModelRecipe:
    return replace(
        model,
        name=_public_name(model.name),
        weights=model.weights and Path(model.weights).name,
        args=_anywhere(model.args),
    )


def _public_name(name: str) -> str:
    source, colon, place = name.partition(":")
    return source + colon + _anywhere(place) if source == "hf" else name


def _anywhere(value: Any) -> Any:
    """A value of a recipe with the names of files and folders in it, and not their places."""
    if isinstance(value, dict):
        return {key: _anywhere(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_anywhere(one) for one in value]
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def _facts(run: Run, recipe: Recipe, licence: str | None) -> dict[str, Any]:
    result = run.read_result() if run.result.is_file() else {}
    distilled = run.info()["kind"] == "distill"
    teacher = None
    if distilled and recipe.teacher is not None:
        spec = recipe.teacher.model
        teacher = _public_name(spec.name) if spec is not None else Path(recipe.teacher.run or "").name
    # Where things stood on the machine that trained it is nobody else's business.
    data = replace(recipe.data, root=None, options=_anywhere(recipe.data.options))
    public = replace(recipe, output=run.path.resolve().name, data=data, model=_public(recipe.model))
    if public.teacher is not None:
        named = public.teacher.run and Path(public.teacher.run).name
        model = public.teacher.model and _public(public.teacher.model)
        public = replace(public, teacher=replace(public.teacher, cache=None, run=named, model=model))
    return {
        "title": run.path.resolve().name,
        "made": "distilled" if distilled else "trained",
        "scores": {
            split: {"miou": score["miou"], "pixel_accuracy": score["pixel_accuracy"]}
            for split, score in result.get("best", {}).items()
        },
        "teacher": teacher,
        "recipe": dump_recipe(public),
        "licence": licence,
    }
