from functools import partial

import oracles
import pytest
import torch
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import BPKDLoss, CSDLoss, DISTLoss, KDLoss, Pixels, bpkd_loss, dist_loss, kd_loss
from gskd.losses.logits import boundary_pixels

EVERYWHERE = torch.zeros(2, 12, 20, dtype=torch.int64)


def examples(classes=4):
    labels = torch.randint(0, classes, (2, 4, 6))
    labels[:, 1] = 255
    labels[0, 2:, 1:] = 255
    return torch.randn(2, classes, 4, 6), torch.randn(2, classes, 4, 6), labels


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_golden(golden, temperature):
    student, teacher = golden["logits_student"], golden["logits_teacher"]
    got = KDLoss(temperature)(student, teacher, Pixels(EVERYWHERE, num_classes=7))
    torch.testing.assert_close(got, golden[f"expected/kd.pixel_T{temperature}"][0], rtol=1e-5, atol=1e-6)


def test_dist_golden(golden):
    got = DISTLoss()(golden["logits_student"], golden["logits_teacher"], Pixels(EVERYWHERE, num_classes=7))
    torch.testing.assert_close(got, golden["expected/dist.beta1_gamma1"][0], rtol=1e-5, atol=1e-6)


def test_kd_agrees_with_loops_at_other_resolutions():
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 6, 8)
    labels = torch.randint(0, 5, (2, 12, 16))
    labels[torch.rand(labels.shape) < 0.3] = 255
    resized = torch.nn.functional.interpolate(student, (6, 8), mode="bilinear", align_corners=False)
    expected = oracles.kd(resized, teacher, labels[:, ::2, ::2], 2.0)
    assert KDLoss(2.0)(student, teacher, Pixels(labels, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_standardised_kd_agrees_with_loops_and_sees_no_shift_or_scale():
    student, teacher, labels = examples()
    term, pixels = KDLoss(2.0, standardise=True), Pixels(labels, num_classes=4)
    expected = oracles.kd_standardised(student, teacher, labels, 2.0)
    assert term(student, teacher, pixels).item() == pytest.approx(expected, rel=1e-4)
    assert term(7 * student + 3, teacher, pixels).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_dist_agrees_with_loops(batch):
    """Trap: correlated over images instead of pixels, the intra-class part is undefined at batch 1."""
    student, teacher, labels = (maps[:batch] for maps in examples())
    expected = oracles.dist(student, teacher, labels != 255, 0.5, 2.0, 1.5)
    got = DISTLoss(0.5, 2.0, 1.5)(student, teacher, Pixels(labels, num_classes=4))
    assert got.item() == pytest.approx(expected, rel=1e-4)


def test_dist_leaves_out_what_the_teacher_holds_constant():
    student, teacher, labels = examples()
    teacher[:, 1:] = teacher[:, :1]  # all classes alike: nothing to correlate with
    student.requires_grad_()
    loss = DISTLoss()(student, teacher, Pixels(labels, num_classes=4))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("gap", [20, 30, 33, 40, 60, 90])
def test_dist_of_a_class_that_the_student_never_predicts(gap):
    """Its probability is tiny and varies by less: the gradient was not a number between 33 and 50."""
    student, teacher = torch.randn(2, 2, 19, 24, 24).unbind()
    student[:, 18] -= gap
    student.requires_grad_()
    dist_loss(student, teacher, torch.ones(2, 24, 24, dtype=torch.bool)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.norm() < 1
    if gap < 33:  # told to vary with the teacher, as in double precision
        double = student.detach().double().requires_grad_()
        dist_loss(double, teacher.double(), torch.ones(2, 24, 24, dtype=torch.bool)).backward()
        torch.testing.assert_close(student.grad[:, 18].double(), double.grad[:, 18], rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("classes", [5, 11, 19, 21, 150])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_what_does_not_vary_but_by_rounding_has_no_gradient(classes, value):
    """As of a head that begins at zero: divided by what rounding leaves, the gradient was 1e7 times too large."""
    constant = torch.full((2, classes, 32, 32), value)
    varied = torch.randn(2, classes, 32, 32)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    for loss in (dist_loss, partial(kd_loss, standardise=True)):
        student = constant.clone().requires_grad_()
        loss(student, varied, valid).backward()
        assert student.grad.norm() < 1, loss
    student = varied.clone().requires_grad_()
    found = dist_loss(student, constant, valid)
    found.backward()
    assert found.item() == 0  # nothing to be like
    assert student.grad.norm() == 0


@pytest.mark.parametrize("radius", [1, 2])
def test_boundaries_agree_with_loops(radius):
    labels = torch.randint(0, 2, (3, 6, 8)).repeat_interleave(2, 1).repeat_interleave(3, 2)
    valid = torch.rand(labels.shape) < 0.8
    expected = oracles.boundary(labels, valid, radius)
    assert torch.equal(boundary_pixels(labels, valid, radius), expected)
    assert 0 < expected.sum() < valid.sum()


def test_bpkd_is_pixel_kd_on_boundaries_and_channel_kd_in_bodies():
    student, teacher = torch.randn(2, 4, 8, 9), torch.randn(2, 4, 8, 9)
    labels = torch.randint(0, 4, (2, 2, 3)).repeat_interleave(4, 1).repeat_interleave(3, 2)
    labels[:, :2] = 255
    edge = oracles.boundary(labels, labels != 255, 1)
    inside = (labels != 255) & ~edge
    expected = 50 * oracles.kd(student, teacher, torch.where(edge, 0, 255), 2.0)
    expected += 20 * oracles.cwd(student, teacher, inside, 2.0)
    got = BPKDLoss(temperature=2.0)(student, teacher, Pixels(labels, num_classes=4))
    assert edge.any()
    assert inside.any()
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, valid: kd_loss(s, t, valid, 3.0),
        lambda s, t, valid: kd_loss(s, t, valid, 3.0, standardise=True),
        lambda s, t, valid: dist_loss(s, t, valid, 0.5, 2.0, 1.5),
        lambda s, t, valid: bpkd_loss(s, t, valid & (s[:, 0] > 0), valid & (s[:, 0] <= 0)),
    ],
    ids=["kd", "kd-standardised", "dist", "bpkd"],
)
def test_gradient(loss):
    student = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    valid = torch.tensor([[[True, False, True], [True, True, False]]])
    assert gradcheck(lambda s: loss(s, teacher, valid), (student,))


def test_extreme_half_precision_logits_stay_finite():
    student = (1e4 * torch.randn(1, 4, 3, 3)).half().requires_grad_()
    loss = KDLoss()(student, (1e4 * torch.randn(1, 4, 3, 3)).half(), Pixels(torch.zeros(1, 3, 3, dtype=torch.int64)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [KDLoss, DISTLoss, BPKDLoss, CSDLoss])
def test_class_counts_must_match(loss):
    with pytest.raises(GSKDError, match=r"4 classes.*5"):
        loss()(torch.zeros(1, 4, 2, 2), torch.zeros(1, 5, 2, 2), Pixels(torch.zeros(1, 2, 2, dtype=torch.int64)))
    with pytest.raises(GSKDError, match="temperature: expected a number > 0, got 0"):
        loss(temperature=0)


def test_weights_of_parts_must_be_numbers():
    with pytest.raises(GSKDError, match="beta: expected a number >= 0, got None"):
        DISTLoss(beta=None)
    with pytest.raises(GSKDError, match="body_weight: expected a number >= 0, got -1"):
        BPKDLoss(body_weight=-1)
