import oracles
import pytest
import torch
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import KDLoss, Pixels, kd_loss


@pytest.mark.parametrize("temperature", [1, 4])
def test_golden(golden, temperature):
    student, teacher = golden["logits_student"], golden["logits_teacher"]
    got = KDLoss(temperature)(student, teacher, Pixels(torch.zeros(2, 12, 20, dtype=torch.int64), num_classes=7))
    torch.testing.assert_close(got, golden[f"expected/kd.pixel_T{temperature}"][0], rtol=1e-5, atol=1e-6)


def test_agrees_with_loops_at_other_resolutions():
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 6, 8)
    labels = torch.randint(0, 5, (2, 12, 16))
    labels[torch.rand(labels.shape) < 0.3] = 255
    resized = torch.nn.functional.interpolate(student, (6, 8), mode="bilinear", align_corners=False)
    expected = oracles.kd(resized, teacher, labels[:, ::2, ::2], 2.0)
    assert KDLoss(2.0)(student, teacher, Pixels(labels, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_gradient():
    student = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    valid = torch.tensor([[[True, False, True], [True, True, False]]])
    assert gradcheck(lambda s: kd_loss(s, teacher, valid, 3.0), (student,))


def test_extreme_half_precision_logits_stay_finite():
    student = (1e4 * torch.randn(1, 4, 3, 3)).half().requires_grad_()
    loss = KDLoss()(student, (1e4 * torch.randn(1, 4, 3, 3)).half(), Pixels(torch.zeros(1, 3, 3, dtype=torch.int64)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_class_counts_must_match():
    with pytest.raises(GSKDError, match=r"4 classes.*5"):
        KDLoss()(torch.zeros(1, 4, 2, 2), torch.zeros(1, 5, 2, 2), Pixels(torch.zeros(1, 2, 2, dtype=torch.int64)))
