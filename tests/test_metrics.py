import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gskd.metrics import ConfusionMatrix


def naive_iou(prediction: torch.Tensor, label: torch.Tensor, classes: int) -> list[float]:
    """IoU from the definition, class by class, on sets of pixels."""
    known = (label >= 0) & (label < classes)
    values = []
    for k in range(classes):
        hit = ((prediction == k) & (label == k) & known).sum().item()
        either = (((prediction == k) | (label == k)) & known).sum().item()
        values.append(hit / either if either else math.nan)
    return values


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 6), pixels=st.integers(1, 60), updates=st.integers(1, 3))
def test_equals_the_definition(seed: int, classes: int, pixels: int, updates: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    confusion = ConfusionMatrix(classes)
    shape = (updates, pixels)
    prediction = torch.randint(0, classes, shape, generator=generator)
    label = torch.randint(-1, classes + 1, shape, generator=generator)
    label[torch.rand(shape, generator=generator) < 0.2] = 255
    for p, y in zip(prediction, label, strict=True):
        confusion.update(p, y)
    score = confusion.score()
    expected = naive_iou(prediction, label, classes)
    assert score.iou == pytest.approx(expected, nan_ok=True, abs=1e-12)
    known = [x for x in expected if not math.isnan(x)]
    assert score.miou == pytest.approx(sum(known) / len(known) if known else math.nan, nan_ok=True)
    valid = (label >= 0) & (label < classes)
    assert score.pixels == valid.sum()
    if valid.any():
        assert score.pixel_accuracy == pytest.approx((prediction == label)[valid].double().mean().item())


def test_equals_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (2, 9, 7), generator=generator)
    label = torch.randint(0, 5, (2, 9, 7), generator=generator)
    label[0, :2] = 255
    confusion = ConfusionMatrix(5)
    confusion.update(prediction, label)
    assert torch.equal(confusion.counts, multiclass_confusion_matrix(prediction, label, 5, ignore_index=255))


def test_rows_are_true_classes() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]))
    assert confusion.counts.tolist() == [[1, 2], [0, 0]]


def test_score_is_of_the_dataset_not_the_mean_of_images() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0]), torch.tensor([0]))  # a small perfect image
    confusion.update(torch.tensor([0] * 9), torch.tensor([1] * 9))  # a large wrong one
    score = confusion.score()
    assert score.iou == (0.1, 0.0)
    assert score.miou == pytest.approx(0.05)
    assert score.pixel_accuracy == pytest.approx(0.1)


def test_class_only_predicted_counts_as_zero_and_absent_class_is_left_out() -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    score = confusion.score()
    assert score.iou[:2] == (pytest.approx(2 / 3), 0.0)
    assert math.isnan(score.iou[2])
    assert score.miou == pytest.approx(1 / 3)


def test_ignored_pixels_count_nowhere() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 255, -1, 2]))
    score = confusion.score()
    assert (score.iou[0], score.miou, score.pixels) == (1.0, 1.0, 1)
    assert math.isnan(score.iou[1])


@pytest.mark.parametrize("label", [torch.full((2, 3), 255), torch.full((0,), 0)])
def test_nothing_counted(label: torch.Tensor) -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.zeros_like(label), label)
    score = confusion.score()
    assert math.isnan(score.miou)
    assert math.isnan(score.pixel_accuracy)
    text = json.dumps(score.to_dict(("a", "b")), allow_nan=False)
    assert json.loads(text) == {
        "miou": None,
        "pixel_accuracy": None,
        "iou": {"a": None, "b": None},
        "pixels": 0,
    }


def test_small_integer_types_do_not_overflow() -> None:
    confusion = ConfusionMatrix(40)
    label = torch.tensor([39, 38], dtype=torch.uint8)
    confusion.update(label, label)
    assert confusion.counts[39, 39] == 1
    assert confusion.counts.sum() == 2


def test_to_dict_names_classes_and_wants_all_of_them() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    score = confusion.score()
    assert score.to_dict(("road", "sky"))["iou"] == {"road": 0.5, "sky": 0.0}
    with pytest.raises(ValueError, match="zip"):
        score.to_dict(("road",))
