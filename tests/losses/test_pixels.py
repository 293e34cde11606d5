import pytest
import torch
import torch.nn.functional as F

from gskd import GSKDError
from gskd.losses import Pixels
from gskd.losses._pixels import match_size


@pytest.mark.parametrize("size", [(12, 20), (5, 7), (96, 160), (130, 200), (1, 1)])
def test_labels_are_those_of_nearest_interpolation(golden, size):
    expected = F.interpolate(golden["labels"][:, None].double(), size=size, mode="nearest")[:, 0].long()
    assert torch.equal(Pixels(golden["labels"]).labels_at(size), expected)


def test_no_value_outside_the_classes_is_valid():
    labels = torch.tensor([[[0, 2, 3, 255, -1, -100]]])
    assert Pixels(labels, num_classes=3).valid_at((1, 6)).tolist() == [[[True, True, False, False, False, False]]]
    assert Pixels(labels, num_classes=3, ignore_index=2).valid_at((1, 6)).sum() == 1


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (9, 9)])
def test_teacher_is_right_where_its_prediction_is_the_label(size):
    logits = torch.randn(2, 4, 4, 6)
    labels = torch.randint(-1, 6, (2, 8, 12))
    labels[:, :2] = 255
    pixels = Pixels(labels, logits)
    prediction = F.interpolate(logits.argmax(1)[:, None].double(), size=size, mode="nearest")[:, 0].long()
    assert torch.equal(pixels.teacher_prediction_at(size), prediction)
    expected = (prediction == pixels.labels_at(size)) & pixels.valid_at(size)
    assert torch.equal(pixels.teacher_correct_at(size), expected)
    assert expected.any()


def test_match_size_keeps_what_fits_and_promotes_half():
    maps = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    assert match_size(maps, (4, 4)) is maps
    assert match_size(maps, (2, 2)).dtype == torch.float32


def test_shapes_are_named():
    with pytest.raises(GSKDError, match="labels: expected"):
        Pixels(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(GSKDError, match="teacher_logits: expected"):
        Pixels(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(2, 3, 2, 2))
    with pytest.raises(GSKDError, match="no teacher logits"):
        Pixels(torch.zeros(1, 2, 2, dtype=torch.int64)).teacher_correct_at((2, 2))
