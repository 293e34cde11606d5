import copy

import pytest
import torch

from gskd import GSKDError
from gskd.losses import AdversarialLoss, Pixels


def example():
    labels = torch.randint(0, 3, (2, 9, 12))
    return torch.randn(2, 3, 9, 12, requires_grad=True), torch.randn(2, 3, 9, 12), Pixels(labels, num_classes=3)


def test_the_student_climbs_the_critic_and_the_critic_tells_them_apart():
    """Trained on one pair, the critic prefers the teacher's map; then the student's, trained against it, gains."""
    student, teacher, pixels = example()
    term = AdversarialLoss(3, width=8)
    optimizer = torch.optim.AdamW(term.parameters(), lr=1e-2)

    def gap():
        with torch.no_grad():
            return (term.critic(teacher.softmax(1)) - term.critic(student.softmax(1))).mean().item()

    for _ in range(30):
        optimizer.zero_grad()
        term(student.detach(), teacher, pixels).backward()
        optimizer.step()
    before = gap()
    assert before > 0.1
    for _ in range(10):
        (gradient,) = torch.autograd.grad(term(student, teacher, pixels), student)
        student.data -= 50 * gradient
    assert gap() < before - 0.01


def test_each_side_gets_its_own_gradient_only():
    student, teacher, pixels = example()
    term = AdversarialLoss(3, width=8, penalty=0.0)
    term(student, teacher, pixels).backward()
    scores = term.critic(student.softmax(1))
    (expected,) = torch.autograd.grad(-scores.mean(), student)
    torch.testing.assert_close(student.grad, expected)
    critic = {name: parameter.grad for name, parameter in term.critic.named_parameters() if parameter.grad is not None}
    term.zero_grad()
    (term.critic(student.detach().softmax(1)) - term.critic(teacher.softmax(1))).mean().backward()
    for name, parameter in term.critic.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(critic[name], parameter.grad)


def test_the_penalty_holds_the_slope_at_one():
    """A critic that is linear in the map: its slope over root mean squares is known."""
    term = AdversarialLoss(3, width=8)
    weight = torch.randn(3)
    term.critic.forward = lambda maps: (maps * weight.view(1, 3, 1, 1)).sum(1).mean((1, 2))
    maps = torch.rand(2, 3, 9, 12)
    torch.testing.assert_close(term._steepness(maps, 1 - maps, {}), ((weight.norm() - 1) ** 2).expand(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_critic_may_be_of_another_precision(dtype):
    student, teacher, pixels = example()
    term = AdversarialLoss(3, width=8)
    half = copy.deepcopy(term).to(dtype)
    expected = term(student, teacher, pixels)
    found = half(student, teacher, pixels)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1)
    assert all(p.grad.dtype == dtype for p in half.critic.parameters() if p.grad is not None)
    assert student.grad.ne(0).any()
    assert term(student.double(), teacher.double(), pixels).isfinite()


def test_it_can_be_read_without_training():
    student, teacher, pixels = example()
    term = AdversarialLoss(3, width=8)
    values = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            values.append(term(student * 1, teacher * 1, pixels).item())
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_the_number_of_classes_must_match():
    student, teacher, pixels = example()
    with pytest.raises(GSKDError, match=r"adversarial: student logits: expected \(B, 7, h, w\)"):
        AdversarialLoss(7, width=8)(student, teacher, pixels)


def test_the_critic_attends_to_a_bounded_map():
    """Full-size logits of 512 x 1024 have 8385 places here; a map of all their pairs would be 281 MB an image."""
    critic, largest = AdversarialLoss(3, width=4).critic, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t):
        critic(torch.rand(1, 3, 512, 1024))
    assert max(largest) < 8385 * 32 * 32
