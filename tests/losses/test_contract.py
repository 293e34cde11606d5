"""What every loss promises, whatever its maths."""

from contextlib import nullcontext

import pytest
import torch

from gskd import GSKDError
from gskd.losses import LOSSES, Pixels

CLASSES = 5
WIDTHS = {"student_channels": CLASSES, "teacher_channels": CLASSES}
BANKS = {"pixel_bank": 50, "region_bank": 20, "pixel_contrast": 30, "region_contrast": 20}
OPTIONS = {
    "gskd": {"samples_per_class": 4},
    "gskd_logits": {"samples_per_class": 4},
    "kd_top": {"top": 3},
    "adversarial": {"num_classes": CLASSES, "width": 4},
    "cirkd_memory": {**WIDTHS, **BANKS, "num_classes": CLASSES, "samples_per_class": 4},
    "mgd": WIDTHS,
    "afdcd": {**WIDTHS, "groups": 5, "pool": 1, "patch": 2},
}
LOGITS = {"gskd_logits", "kd", "kd_top", "cwd", "dist", "bpkd", "csd", "adversarial"}
LEVELS = {"psd"}
LEARNED = {"mgd", "afdcd", "cirkd_memory", "adversarial"}  # a layer of their own stands between student and teacher


def make(name):
    torch.manual_seed(7)
    return LOSSES[name](**OPTIONS.get(name, {}))


def call(term, student, teacher, pixels):
    if term.inputs == "levels":
        student, teacher = ([maps, maps[..., :3, :, :] ** 2] for maps in (student, teacher))
    return term(student, teacher, pixels)


def batch(ignored=0.3):
    student = torch.randn(2, CLASSES, 8, 10)
    teacher = torch.randn(2, CLASSES, 8, 10)
    labels = teacher.argmax(1)
    labels[torch.rand(labels.shape) < ignored] = 255
    return student, teacher, labels


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


def test_says_what_it_takes(name):
    expected = "logits" if name in LOGITS else "levels" if name in LEVELS else "features"
    assert LOSSES[name].inputs == expected


@pytest.mark.parametrize("ignore", [255, -1])
def test_ignored_pixels_never_count(name, ignore):
    """Trap 7."""
    student, teacher, labels = batch()
    labels[labels == 255] = ignore
    ignored = (labels == ignore).unsqueeze(1)
    torch.manual_seed(1)
    before = call(make(name), student, teacher, Pixels(labels, teacher))
    student = torch.where(ignored, 1e4 * torch.randn_like(student), student).requires_grad_()
    teacher = torch.where(ignored, -teacher, teacher)
    after = call(make(name), student, teacher, Pixels(labels, teacher))
    after.backward()
    torch.testing.assert_close(after, before)
    assert student.grad[ignored.expand_as(student)].abs().max() == 0
    assert student.grad.abs().max() > 0


def test_nothing_to_learn_from_is_a_zero_on_the_graph(name):
    student, teacher, labels = batch(ignored=1.1)
    student.requires_grad_()
    loss = call(make(name), student, teacher, Pixels(labels, teacher))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_student_learns_and_teacher_does_not(name):
    student, teacher, labels = batch()
    student.requires_grad_(), teacher.requires_grad_()
    call(make(name), student, teacher, Pixels(labels, teacher)).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", sorted(set(LOSSES) - LEARNED))
def test_zero_where_student_is_the_teacher(name):
    _, teacher, labels = batch()
    assert call(make(name), teacher.clone(), teacher, Pixels(labels, teacher)).item() == pytest.approx(0, abs=1e-6)


def test_scale_does_not_depend_on_crop_size(name):
    """Trap 4: a sum over pixels would grow sixteenfold."""
    student, teacher, _ = batch(ignored=0)
    # Few enough points that every crop has them.
    losses = [
        call(make(name), s, t, Pixels(t.argmax(1), t))
        for s, t in ((student, teacher), (student.repeat(4, 1, 4, 4), teacher.repeat(4, 1, 4, 4)))
    ]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.35)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_values_stay_finite(name, scale):
    student, teacher, labels = batch()
    student = (student * scale).requires_grad_()
    loss = call(make(name), student, teacher * scale, Pixels(labels, teacher))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_nothing_but_the_inputs(name, dtype):
    """Trap 6: under autocast the maths stays in float32."""
    student, teacher, labels = batch()
    student, teacher = student.to(dtype), teacher.to(dtype)
    if name in LEVELS:  # this test's own square must not be rounded
        student, teacher = student.float(), teacher.float()
    expected = call(make(name), student.float(), teacher.float(), Pixels(labels, teacher))
    term = make(name)
    with torch.autocast("cpu", dtype=dtype):
        got = call(term, student, teacher, Pixels(labels, teacher))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_keeps_double_precision(name):
    student, teacher, labels = batch()
    term = make(name).double()
    assert call(term, student.double(), teacher.double(), Pixels(labels, teacher)).dtype == torch.float64


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"adversarial"}))  # differentiates inside its forward pass
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    student, teacher, labels = batch()
    student.requires_grad_()
    term = torch.compile(make(name), fullgraph=True, backend="aot_eager")
    term.inputs = LOSSES[name].inputs
    loss = call(term, student, teacher, Pixels(labels, teacher))
    loss.backward()
    assert loss.item() > 0


def test_needs_no_device_but_that_of_its_inputs(name, monkeypatch):
    """Trap 5. On "meta", a tensor made on the CPU does not fit, and nothing can be read back to the host."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know "meta"
    student, teacher, labels = (t.to("meta") for t in batch())
    student.requires_grad_()
    loss = call(make(name).to("meta"), student, teacher, Pixels(labels, teacher))
    loss.backward()
    assert loss.device.type == student.grad.device.type == "meta"


def test_shapes_are_named(name):
    student, teacher, labels = batch()
    term = make(name)
    with pytest.raises(GSKDError, match=r"student: expected \(B, C, h, w\)"):
        call(term, student[0], teacher, Pixels(labels, teacher))
    with pytest.raises(GSKDError, match=r"teacher: expected \(2, C, h, w\)"):
        call(term, student, teacher[:1], Pixels(labels, teacher))
    with pytest.raises(GSKDError, match=r"labels: expected \(2, H, W\)"):
        call(term, student, teacher, Pixels(labels[:1], teacher[:1]))
