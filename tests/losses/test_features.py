import oracles
import pytest
import torch
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import MSELoss, Pixels, mse_loss


@pytest.mark.parametrize("normalise", [False, True])
def test_agrees_with_loops(normalise):
    student, teacher = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)
    labels = torch.randint(0, 3, (2, 4, 6))
    labels[:, 1] = 255
    expected = oracles.mse(student, teacher, labels, normalise)
    got = MSELoss(normalise=normalise)(student, teacher, Pixels(labels, num_classes=3))
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_projector_commutes_with_resize():
    term = MSELoss(student_channels=3, teacher_channels=5)
    student, teacher = torch.randn(2, 3, 3, 4), torch.randn(2, 5, 6, 8)
    labels = torch.randint(0, 3, (2, 6, 8))
    resized = torch.nn.functional.interpolate(student, (6, 8), mode="bilinear", align_corners=False)
    expected = oracles.mse(term.projector(resized).detach(), teacher, labels)
    assert term(student, teacher, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-5)


def test_zero_features_get_zero_gradient_when_normalised():
    student = torch.randn(1, 3, 2, 2)
    student[..., 0, 0] = 0
    student.requires_grad_()
    mse_loss(student, torch.randn(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), normalise=True).backward()
    assert student.grad[..., 0, 0].abs().max() == 0
    assert student.grad.isfinite().all()


def test_gradient():
    student = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    valid = torch.tensor([[[True, False], [True, True]]])
    assert gradcheck(lambda s: mse_loss(s, teacher, valid, normalise=True), (student,))


def test_different_widths_without_declaration_say_what_to_pass():
    with pytest.raises(GSKDError, match="student_channels=3, teacher_channels=5"):
        MSELoss()(torch.zeros(1, 3, 2, 2), torch.zeros(1, 5, 2, 2), Pixels(torch.zeros(1, 2, 2, dtype=torch.int64)))
    with pytest.raises(GSKDError, match="both"):
        MSELoss(student_channels=3)
