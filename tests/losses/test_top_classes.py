from itertools import pairwise

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import Pixels, TopKDLoss, kd_loss, top_kd_loss
from gskd.losses.top_classes import top_classes


def examples(classes=6):
    labels = torch.randint(0, classes, (2, 4, 5))
    labels[torch.rand(labels.shape) < 0.3] = 255
    return 2 * torch.randn(2, classes, 4, 5), 2 * torch.randn(2, classes, 4, 5), labels


@pytest.mark.parametrize("top", [1, 3, 5, 9])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_agrees_with_loops(top, temperature):
    student, teacher, labels = examples()
    expected = oracles.kd_top(student, teacher, labels, top, temperature)
    got = TopKDLoss(top, temperature)(student, teacher, Pixels(labels, teacher))
    assert got.item() == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), scale=st.floats(0.01, 50))
@settings(max_examples=40, deadline=None)
def test_never_more_than_kd_more_with_more_classes_and_equal_with_all_but_one(seed, classes, scale):
    torch.manual_seed(seed)
    student, teacher = (scale * torch.randn(1, classes, 3, 3, dtype=torch.float64) for _ in range(2))
    valid = torch.rand(1, 3, 3) < 0.8
    whole = kd_loss(student, teacher, valid).item()
    parts = [top_kd_loss(student, top_classes(teacher, top), valid).item() for top in range(1, classes + 2)]
    assert all(one <= other + 1e-9 * (1 + whole) for one, other in pairwise(parts))
    assert parts[classes - 2 :] == pytest.approx([whole] * 3, rel=1e-9, abs=1e-12)


def test_gradient():
    student, teacher, labels = examples()
    target, valid = top_classes(teacher.double(), 2), labels != 255
    assert gradcheck(lambda s: top_kd_loss(s, target, valid), student.double().requires_grad_())


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(classes):
    student, teacher, _ = examples(classes)
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)
    expected = kd_loss(student, teacher, labels == 0).item()
    assert TopKDLoss()(student, teacher, Pixels(labels, teacher)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("classes", "size"), [(150, 26), (300, 34)])
def test_what_is_stored_is_small_and_gives_the_loss(classes, size):
    student, teacher, labels = examples(classes)
    term, pixels = TopKDLoss(), Pixels(labels, teacher)
    packed = term.pack(term.target(teacher, pixels))
    assert sum(value.nbytes for value in packed.values()) == size * labels.numel()
    stored = term.compare(student, term.unpack(packed), Pixels(labels, num_classes=classes))
    torch.testing.assert_close(stored, term(student, teacher, pixels), rtol=2e-3, atol=1e-5)


def test_a_teacher_that_is_very_sure_can_be_stored():
    _, teacher, labels = examples()
    term = TopKDLoss()
    packed = term.pack(term.target(1e6 * teacher, Pixels(labels, teacher)))
    assert packed["log_probability"].isfinite().all()


def test_bad_arguments_are_refused():
    for arguments in ({"top": 0}, {"top": 2.5}, {"temperature": 0}):
        with pytest.raises(GSKDError, match=next(iter(arguments))):
            TopKDLoss(**arguments)
    student, teacher, labels = examples()
    with pytest.raises(GSKDError, match="classes"):
        TopKDLoss()(student[:, :4], teacher, Pixels(labels, teacher))
