import oracles
import pytest
import torch
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import (
    AFDCDLoss,
    ATLoss,
    AttnFDLoss,
    CWDLoss,
    MGDLoss,
    MSELoss,
    Pixels,
    at_loss,
    attnfd_loss,
    cwd_loss,
    mse_loss,
)
from gskd.losses.features import refine_by_attention

EVERYWHERE = torch.zeros(2, 12, 20, dtype=torch.int64)


def examples(channels=5, classes=3):
    """Maps (2, C, 4, 6), labels with an ignored row and valid pixels."""
    labels = torch.randint(0, classes, (2, 4, 6))
    labels[:, 1] = 255
    labels[0, 2:] = 255
    return torch.randn(2, channels, 4, 6), torch.randn(2, channels, 4, 6), labels


@pytest.mark.parametrize("normalise", [False, True])
def test_mse_agrees_with_loops(normalise):
    student, teacher, labels = examples()
    expected = oracles.mse(student, teacher, labels, normalise)
    got = MSELoss(normalise=normalise)(student, teacher, Pixels(labels, num_classes=3))
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [MSELoss, CWDLoss, AttnFDLoss])
def test_projector_commutes_with_resize(loss):
    term = loss(student_channels=3, teacher_channels=5)
    student, teacher = torch.randn(2, 3, 3, 4), torch.randn(2, 5, 6, 8)
    pixels = Pixels(torch.randint(0, 3, (2, 6, 8)), num_classes=3)
    resized = torch.nn.functional.interpolate(student, (6, 8), mode="bilinear", align_corners=False)
    expected = loss()(term.projector(resized), teacher, pixels)
    torch.testing.assert_close(term(student, teacher, pixels), expected, rtol=1e-5, atol=1e-7)


def test_zero_features_get_zero_gradient_when_normalised():
    student = torch.randn(1, 3, 2, 2)
    student[..., 0, 0] = 0
    student.requires_grad_()
    mse_loss(student, torch.randn(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), normalise=True).backward()
    assert student.grad[..., 0, 0].abs().max() == 0
    assert student.grad.isfinite().all()


def test_at_golden(golden):
    """The public value is a mean over pixels; ours is their sum, so that it does not depend on the size of the map."""
    got = ATLoss()(golden["feat_student"], golden["feat_teacher"], Pixels(EVERYWHERE, num_classes=7)) / (12 * 20)
    torch.testing.assert_close(got, golden["expected/at"][0], rtol=1e-5, atol=1e-9)


def test_at_agrees_with_loops():
    student, teacher, labels = examples()
    expected = oracles.at(student, teacher, labels != 255)
    assert ATLoss()(student, teacher, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("maps", "temperature"), [("logits", 4), ("feat", 4), ("feat", 1)])
def test_cwd_golden(golden, maps, temperature):
    student, teacher = golden[f"{maps}_student"], golden[f"{maps}_teacher"]
    got = CWDLoss(temperature)(student, teacher, Pixels(EVERYWHERE, num_classes=7))
    key = {"logits": "logits", "feat": "features"}[maps]
    torch.testing.assert_close(got, golden[f"expected/cwd.{key}_T{temperature}"][0], rtol=1e-5, atol=1e-6)


def test_cwd_agrees_with_loops():
    student, teacher, labels = examples()
    expected = oracles.cwd(student, teacher, labels != 255, 2.0)
    assert CWDLoss(2.0)(student, teacher, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-5)


def test_attnfd_agrees_with_loops():
    student, teacher, labels = examples()
    expected = oracles.attnfd(student, teacher, labels != 255)
    assert AttnFDLoss()(student, teacher, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-5)


def test_refinement_scales_between_zero_and_one_and_leaves_out_ignored_pixels():
    features, _, labels = examples()
    refined = refine_by_attention(features, labels != 255)
    valid = (labels != 255).unsqueeze(1).expand_as(features)
    share = (refined / features)[valid]
    assert share.min() > 0
    assert share.max() < 1
    assert share.std() > 0.01
    assert refined[~valid].abs().max() == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, valid: mse_loss(s, t, valid, normalise=True),
        at_loss,
        lambda s, t, valid: cwd_loss(s, t, valid, 2.0),
        attnfd_loss,
        lambda s, t, valid: attnfd_loss(refine_by_attention(s, valid), t, valid),
    ],
    ids=["mse", "at", "cwd", "attnfd", "attnfd-refined"],
)
def test_gradient(loss):
    student = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    valid = torch.tensor([[[True, False], [True, True]], [[False, False], [False, False]]])
    assert gradcheck(lambda s: loss(s, teacher, valid), (student,))


@pytest.mark.parametrize("kind", [MSELoss, CWDLoss, AttnFDLoss, MGDLoss, AFDCDLoss])
@pytest.mark.parametrize("declared", [(8, 32), (32, 32)])
def test_another_width_than_was_declared_is_named(kind, declared):
    """As it is, and not as the projector made it."""
    maps = torch.randn(1, declared[0], 4, 4), torch.randn(1, 16, 4, 4), Pixels(torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(GSKDError, match=r"teacher(: expected \(B, 32, h, w\).*\(1, 16| 16; expected the same)"):
        kind(student_channels=declared[0], teacher_channels=declared[1])(*maps)


@pytest.mark.parametrize(("name", "loss"), [("mse", MSELoss), ("cwd", CWDLoss), ("attnfd", AttnFDLoss)])
def test_different_widths_without_declaration_say_what_to_pass(name, loss):
    pixels = Pixels(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(GSKDError, match=f"{name}: .*student_channels=3, teacher_channels=5"):
        loss()(torch.zeros(1, 3, 2, 2), torch.zeros(1, 5, 2, 2), pixels)
    with pytest.raises(GSKDError, match="both"):
        loss(student_channels=3)
    with pytest.raises(GSKDError, match=r"expected \(B, 3, h, w\)"):
        loss(student_channels=3, teacher_channels=5)(torch.zeros(1, 4, 2, 2), torch.zeros(1, 5, 2, 2), pixels)
