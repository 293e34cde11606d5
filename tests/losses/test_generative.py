import oracles
import pytest
import torch
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import AFDCDLoss, MGDLoss, Pixels, omni_contrast
from gskd.losses.generative import l1_distances


def examples(channels=6):
    labels = torch.randint(0, 3, (2, 5, 9))
    labels[0, 1] = 255
    return torch.randn(2, channels, 5, 9), torch.randn(2, channels, 5, 9), labels


@pytest.mark.parametrize("patch", [2, 4])
def test_contrast_agrees_with_loops(patch):
    student, teacher, labels = examples()
    expected = oracles.omni_contrast(student, teacher, labels != 255, 3, patch, 0.5)
    assert omni_contrast(student, teacher, labels != 255, 3, patch, 0.5).item() == pytest.approx(expected, rel=1e-4)


def test_a_patch_is_at_most_the_map():
    student, teacher, labels = examples()
    got = omni_contrast(student, teacher, labels != 255, 3, 50, 0.5)
    torch.testing.assert_close(got, omni_contrast(student, teacher, labels != 255, 3, 5, 0.5))


def test_contrast_gradient():
    student = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    valid = torch.tensor([[[True, False], [True, True]]])
    assert gradcheck(lambda s: omni_contrast(s, teacher, valid, 2, 2, 0.5), (student,))


def test_l1_distances_and_their_gradient_are_those_of_torch():
    points, others = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 4, 3)
    weight = torch.randn(2, 5, 4)
    expected = torch.autograd.grad((torch.cdist(points, others, p=1.0) * weight).sum(), points)
    got = l1_distances(points, others)
    torch.testing.assert_close(got, torch.cdist(points, others, p=1.0))
    torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), points), expected)


def test_completion_agrees_with_loops():
    """Without masking the completed map is that of two convolutions over a map whose ignored pixels are zero."""
    student, teacher, labels = examples()
    term = MGDLoss(6, 6, mask_ratio=0.0)
    shown = torch.where((labels != 255).unsqueeze(1), student, 0.0)
    completed = term.completion.leave(term.completion.enter(shown).relu()).detach()
    expected = oracles.mse(completed, teacher, labels)
    assert term(student, teacher, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-4)


def test_the_masked_share_is_hidden():
    term, seen = MGDLoss(6, 6, mask_ratio=0.75), []
    term.completion.enter.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    student = torch.ones(4, 6, 50, 50)
    term(student, student, Pixels(torch.zeros(4, 50, 50, dtype=torch.int64), num_classes=3))
    shown = seen[0].mean(dim=1)
    assert set(shown.unique().tolist()) == {0, 1}
    assert shown.mean().item() == pytest.approx(0.25, abs=0.02)


def test_afdcd_is_both_parts():
    student, teacher, labels = examples()
    options = {"mask_ratio": 0.0, "groups": 3, "pool": 1, "patch": 2, "temperature": 0.5}
    term = AFDCDLoss(6, 6, **options, mimic_weight=2.0, contrast_weight=3.0)
    completed = term.completion(student, labels != 255)
    expected = 2 * oracles.mse(completed.detach(), teacher, labels)
    expected += 3 * oracles.omni_contrast(completed.detach(), teacher, labels != 255, 3, 2, 0.5)
    assert term(student, teacher, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-4)


def test_afdcd_pools_before_the_contrast():
    student, teacher, _ = examples()
    labels = torch.zeros(2, 5, 9, dtype=torch.int64)
    term = AFDCDLoss(6, 6, mask_ratio=0.0, groups=3, pool=2, patch=2, temperature=0.5, mimic_weight=0.0)
    pooled = [
        torch.nn.functional.max_pool2d(maps, 2, ceil_mode=True)
        for maps in (term.completion(student, labels == 0), teacher)
    ]
    expected = 0.08 * omni_contrast(*pooled, torch.ones(2, 3, 5, dtype=torch.bool), 3, 2, 0.5)
    torch.testing.assert_close(term(student, teacher, Pixels(labels, num_classes=3)), expected)


@pytest.mark.parametrize("loss", [MGDLoss, AFDCDLoss])
def test_arguments_are_checked(loss):
    with pytest.raises(GSKDError, match=r"mask_ratio: expected a number with 0 <= ratio < 1, got 1"):
        loss(16, 16, mask_ratio=1)
    with pytest.raises(GSKDError, match="needs student_channels and teacher_channels"):
        loss()


def test_groups_must_divide_the_width():
    with pytest.raises(GSKDError, match="groups: expected a divisor of the teacher's 6 channels, got 4"):
        AFDCDLoss(6, 6, groups=4)
