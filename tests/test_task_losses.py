"""What the student learns from the labels, against sums over pixels written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from gskd import Distiller, GSKDError
from gskd.data import IGNORE
from gskd.task_losses import class_balanced_cross_entropy, cross_entropy
from helpers import gskd_ok, steps


def test_cross_entropy_is_the_mean_over_labelled_pixels():
    logits, labels = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 5))
    labels[0] = IGNORE
    expected = -logits[1].log_softmax(0).gather(0, labels[1][None]).mean()
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def labelled(*counts):
    """(1, 4, 6) labels with so many pixels of each class, the others ignored, in random order."""
    classes = [label for label, count in enumerate(counts) for _ in range(count)]
    values = torch.tensor(classes + [IGNORE] * (24 - len(classes)))
    return values[torch.randperm(24)].view(1, 4, 6)


def mean_over_classes(logits, labels):
    """By class and pixel, in plain Python: every class of an image counts the same, however few its pixels."""
    parts = []
    for image, truth in zip(logits.tolist(), labels.tolist(), strict=True):
        by_class = {}
        for y, row in enumerate(truth):
            for x, label in enumerate(row):
                if 0 <= label < len(image):
                    exponents = [math.exp(channel[y][x]) for channel in image]
                    by_class.setdefault(label, []).append(-math.log(exponents[label] / sum(exponents)))
        parts += [sum(values) / len(values) for values in by_class.values()]
    return sum(parts) / len(parts)


def test_every_class_of_an_image_counts_the_same():
    """As many points as make every pixel of a class as frequent as the others: nothing is random."""
    torch.manual_seed(0)
    labels = torch.cat([labelled(8, 2, 0, 4, 1), labelled(0, 8, 8, 0, 0)])
    logits = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    found = class_balanced_cross_entropy(logits, labels, weight=0.7, samples_per_class=8)
    expected = cross_entropy(logits, labels).item() + 0.7 * mean_over_classes(logits, labels)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: class_balanced_cross_entropy(x, labels, samples_per_class=8), logits, nondet_tol=1e-12
    )
    found.backward()
    assert logits.grad[(labels == IGNORE).unsqueeze(1).expand_as(logits)].abs().max() == 0


def test_half_the_pixels_of_a_class_are_drawn_anew_each_time():
    torch.manual_seed(0)
    labels, logits = labelled(16, 4), torch.randn(1, 2, 4, 6)
    found = torch.tensor([class_balanced_cross_entropy(logits, labels, samples_per_class=2) for _ in range(400)])
    expected = cross_entropy(logits, labels).item() + mean_over_classes(logits, labels)
    assert found.std() > 0.05
    assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / 20)


def test_smaller_logits_are_those_that_the_whole_map_would_have():
    torch.manual_seed(0)
    labels, logits = labelled(8, 8, 4), torch.randn(1, 3, 2, 3)
    whole = F.interpolate(logits, (4, 6), mode="bilinear", align_corners=False)
    expected = class_balanced_cross_entropy(whole, labels)
    torch.testing.assert_close(class_balanced_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("empty", [IGNORE, -1, 99])
def test_nothing_to_learn_from_is_a_zero_on_the_graph(empty):
    logits = torch.randn(2, 3, 4, 6, requires_grad=True)
    loss = class_balanced_cross_entropy(logits, torch.full((2, 4, 6), empty))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("name", "value"), [("samples_per_class", v) for v in (0, -1, 1.5, "a")] + [("weight", v) for v in (-1, math.nan)]
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(GSKDError, match=f"{name}: expected"):
        class_balanced_cross_entropy(torch.zeros(1, 3, 4, 6), labelled(8), **{name: value})


def test_half_precision_changes_nothing_but_the_inputs():
    labels, logits = labelled(8, 8, 8), torch.randn(1, 3, 4, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = class_balanced_cross_entropy(logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, class_balanced_cross_entropy(logits.float(), labels))


def test_a_rare_class_moves_more():
    """What it is for: the gradient at one pixel of a rare class, against that of the common one."""
    labels = labelled(23, 1)
    logits = torch.zeros(1, 2, 4, 6, requires_grad=True)
    shares = []
    for loss in (cross_entropy, class_balanced_cross_entropy):
        gradient = torch.autograd.grad(loss(logits, labels), logits)[0][0, 1].abs()
        shares.append((gradient[labels[0] == 1].sum() / gradient.sum()).item())
    assert shares == pytest.approx([1 / 24, (1 / 24 + 1 / 2) / 2], abs=1e-5)


def test_in_a_recipe(tiny, tmp_path):
    """With a teacher and without; the first step has the same plain part."""
    begun = {}
    for verb, folder in (("train", tiny.plain), ("distill", tiny.distilled)):
        run = tmp_path / verb
        gskd_ok(verb, tiny.recipe, f"output={run}", "train.steps=2", "train.class_balance=0.5", "eval.every=2")
        begun[verb] = [steps(path)[0]["terms"]["task"]["raw"] for path in (folder, run)]
    for plain, balanced in begun.values():
        assert 1.2 < balanced / plain < 2


def test_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    student = torch.nn.Conv2d(3, 4, 1)
    distiller = Distiller(student, task_loss=class_balanced_cross_entropy)
    result = distiller(torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8)))
    result.loss.backward()
    assert result.terms["task"].raw == result.loss.detach()
    assert student.weight.grad.abs().max() > 0
