"""GSKD on class probabilities, beside plain loops over all pairs of pixels."""

import pytest
import torch
from torch.nn import functional as F

from gskd import GSKDError, GSKDLoss
from gskd.losses import LogitGSKDLoss, Pixels

CLASSES = 3
# All eligible pixels are points, and all entries one descriptor: nothing is random.
EVERYTHING = {"samples_per_class": 40, "policy": "mask", "group_size": "all", "only_correct": False}


def loop_over_pairs(student, teacher, labels, temperature):
    total, images = 0.0, 0
    for image in range(len(labels)):
        maps = []
        for logits in (student[image], teacher[image]):
            points = []
            for row in range(labels.shape[1]):
                for column in range(labels.shape[2]):
                    if labels[image, row, column] < CLASSES:
                        exponents = [logits[k, row, column].exp() for k in range(CLASSES)]
                        points.append([exponent / sum(exponents) for exponent in exponents])
            lengths = [sum(p * p for p in point) ** 0.5 for point in points]
            entries = [
                sum(a * b for a, b in zip(points[i], points[j], strict=True)) / (lengths[i] * lengths[j]) / temperature
                for i in range(len(points))
                for j in range(len(points))
            ]
            normaliser = sum(entry.exp() for entry in entries).log() if entries else None
            maps.append([entry - normaliser for entry in entries])
        if maps[0]:
            images += 1
            total += temperature**2 * sum(t.exp() * (t - s) for s, t in zip(*maps, strict=True))
    return total / images


def batch(student_size=(4, 6)):
    torch.manual_seed(3)
    student = torch.randn(3, CLASSES, *student_size, dtype=torch.float64)
    teacher = 2 * torch.randn(3, CLASSES, 4, 6, dtype=torch.float64)
    labels = torch.randint(0, CLASSES + 1, (3, 4, 6))
    labels[labels == CLASSES] = 255
    labels[2] = 255
    return student, teacher, labels


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_is_what_loops_give(temperature):
    student, teacher, labels = batch()
    found = LogitGSKDLoss(**EVERYTHING, temperature=temperature)(student, teacher, Pixels(labels, teacher))
    torch.testing.assert_close(found, loop_over_pairs(student, teacher, labels, temperature))
    assert found > 1e-3


def test_the_student_is_read_before_its_softmax_where_sizes_differ():
    student, teacher, labels = batch((2, 3))
    found = LogitGSKDLoss(**EVERYTHING)(student, teacher, Pixels(labels, teacher))
    enlarged = F.interpolate(student, (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, loop_over_pairs(enlarged, teacher, labels, 1.0))


def test_gradcheck():
    student, teacher, labels = batch((2, 3))
    term = LogitGSKDLoss(**EVERYTHING)
    assert torch.autograd.gradcheck(lambda s: term(s, teacher, Pixels(labels, teacher)), student.requires_grad_())


def test_a_constant_added_to_all_logits_of_a_pixel_changes_nothing():
    student, teacher, labels = batch()
    shift = torch.randn(3, 1, 4, 6, dtype=torch.float64)
    pixels = Pixels(labels, teacher)
    losses = [LogitGSKDLoss(**EVERYTHING)(s, teacher, pixels) for s in (student, student + shift)]
    torch.testing.assert_close(*losses)
    plain = [GSKDLoss(**EVERYTHING)(s, teacher, pixels) for s in (student, student + shift)]
    assert (plain[0] - plain[1]).abs() > 1e-3


def test_networks_of_other_classes_are_refused():
    student, teacher, labels = batch()
    with pytest.raises(GSKDError, match="gskd_logits: student logits have 2 classes, teacher logits 3"):
        LogitGSKDLoss()(student[:, :2], teacher, Pixels(labels, teacher))


def test_maps_that_are_no_logits_are_refused():
    student, teacher, labels = batch()
    with pytest.raises(GSKDError, match="gskd_logits: reads maps of 2 channels where there are 3 classes"):
        LogitGSKDLoss()(student[:, :2], teacher[:, :2], Pixels(labels, teacher))
    target = LogitGSKDLoss().target(teacher, Pixels(labels, teacher))  # as from a cache
    with pytest.raises(GSKDError, match="gskd_logits: student logits"):
        LogitGSKDLoss().compare(student[:, :2], target, Pixels(labels, num_classes=CLASSES))


@pytest.mark.parametrize("loss", [GSKDLoss, LogitGSKDLoss])
def test_a_teacher_that_is_not_a_number_shows(loss):
    student, teacher, labels = batch()
    teacher[:, 0] = torch.nan
    assert loss()(student, teacher, Pixels(labels, teacher)).isnan()


def test_its_targets_are_no_others():
    assert LogitGSKDLoss().target_settings() != GSKDLoss().target_settings()
    assert LogitGSKDLoss(4).target_settings() != LogitGSKDLoss().target_settings()
