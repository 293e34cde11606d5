import oracles
import pytest
import torch
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import CIRKDLoss, CIRKDMemoryLoss, Pixels, cross_image_loss, memory_loss
from gskd.losses.cross_image import MemoryBank


def vectors(images=3, pixels=5):
    valid = torch.rand(images, pixels) < 0.7
    valid[1] = False
    return torch.randn(images, 4, pixels), torch.randn(images, 6, pixels), valid


def test_minibatch_golden(golden):
    pixels = Pixels(torch.zeros(2, 12, 20, dtype=torch.int64), num_classes=7)
    got = CIRKDLoss(pool=1)(golden["feat_student"], golden["feat_teacher"], pixels)
    torch.testing.assert_close(got, golden["expected/cirkd.minibatch_T0.1"][0], rtol=1e-5, atol=1e-6)


def test_minibatch_agrees_with_loops():
    student, teacher, valid = vectors()
    expected = oracles.cross_image(student, teacher, valid, 0.3)
    assert cross_image_loss(student, teacher, valid, 0.3).item() == pytest.approx(expected, rel=1e-4)


def test_chunks_change_neither_value_nor_gradient():
    student, teacher, valid = vectors()
    student.requires_grad_()
    results = []
    for chunk in (1 << 20, 45, 1):
        loss = cross_image_loss(student, teacher, valid, 0.3, chunk)
        (gradient,) = torch.autograd.grad(loss, student)
        results.append((loss.detach(), gradient))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_chunks_compile_into_one_graph():
    student, teacher, valid = vectors()
    student.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(cross_image_loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(cross_image_loss(student, teacher, valid, 0.3), student)
    torch.testing.assert_close(torch.autograd.grad(compiled(student, teacher, valid, 0.3, 45), student), expected)


def test_chunks_hold_no_map_of_pixel_pairs():
    """What the backward pass keeps of 2 x 600 pixels: a map of pairs would be 1.44 million numbers, twice."""
    student, teacher = torch.randn(2, 3, 600, requires_grad=True), torch.randn(2, 3, 600)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = cross_image_loss(student, teacher, torch.ones(2, 600, dtype=torch.bool), chunk=1200 * 100)
    loss.backward()
    assert sum(kept) < 200_000


@pytest.mark.parametrize("size", [3, 100])
def test_banks_hold_the_newest_vectors_of_their_own_class(size):
    """Trap: public code indexes the image's first pixels instead of the class's, so that classes mix."""
    bank, expected = MemoryBank(3, size, 2), {k: [] for k in range(3)}
    for _ in range(5):
        added, labels = torch.randn(8, 2), torch.randint(-1, 2, (8,))
        bank.add(added, labels)
        for vector, label in zip(added, labels.tolist(), strict=True):
            if label >= 0:
                expected[label].append(vector / vector.norm())
    assert len(expected[0]) > 5
    for k, all_vectors in expected.items():
        newest = all_vectors[-size:]
        held = bank.vectors[k][bank.filled()[k]]
        assert len(held) == len(newest)
        distance = torch.cdist(held, torch.stack(newest)) if newest else torch.zeros(0, 0)
        assert (distance < 1e-6).sum() == len(newest)


def memory_term(**options):
    sizes = {"pixel_bank": 40, "region_bank": 6, "samples_per_class": 60, "pixel_contrast": 120, "region_contrast": 18}
    return CIRKDMemoryLoss(4, 5, 3, **(sizes | options))


def test_memory_agrees_with_loops():
    """Banks larger than what was seen: everything of the two batches is in them, and nothing else."""
    term = memory_term()
    term.projector.eval()
    held = {"pixels": [], "regions": []}
    for _ in range(2):
        student, teacher = torch.randn(2, 4, 3, 4), torch.randn(2, 5, 3, 4)
        labels = torch.randint(0, 3, (2, 3, 4))
        labels[:, 1] = 255
        got = term(student, teacher, Pixels(labels, num_classes=3))
        anchors = []
        for b in range(2):
            for k in range(3):
                own = [(y, x) for y in range(3) for x in range(4) if labels[b, y, x] == k]
                pixels = [teacher[b, :, y, x] / teacher[b, :, y, x].norm() for y, x in own]
                held["pixels"] += pixels
                if own:
                    held["regions"].append(torch.stack(pixels).mean(0))
                anchors += [(student[b, :, y, x], teacher[b, :, y, x]) for y, x in own]
    s, t = (torch.stack(side) for side in zip(*anchors, strict=True))
    s = term.projector(s[None], torch.ones(1, len(s), dtype=torch.bool))[0].detach()
    expected = sum(oracles.memory(s, t, bank, 0.1) for bank in held.values())
    assert got.item() == pytest.approx(expected, rel=1e-3)


def test_memory_is_bounded_and_saved():
    term = memory_term()
    assert term.bank_bytes == 3 * (40 + 6) * 5 * 4
    for _ in range(4):
        term(torch.randn(2, 4, 3, 4), torch.randn(2, 5, 3, 4), Pixels(torch.randint(0, 3, (2, 3, 4)), num_classes=3))
    assert term.pixels.vectors.shape == (3, 40, 5)
    other = memory_term()
    other.load_state_dict(term.state_dict())
    assert torch.equal(other.pixels.vectors, term.pixels.vectors)
    assert torch.equal(other.regions.filled(), term.regions.filled())


def test_a_validation_loss_leaves_the_memory_as_it_was():
    loss = CIRKDMemoryLoss(5, 6, 3, pixel_bank=8, region_bank=4)
    maps = torch.randn(2, 5, 4, 4), torch.randn(2, 6, 4, 4), Pixels(torch.randint(0, 3, (2, 4, 4)), num_classes=3)
    loss(*maps)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    loss.eval()
    assert loss(*maps).isfinite()
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())
    loss.train()
    loss(*maps)
    assert not torch.equal(loss.pixels.written, before["pixels.written"])


def test_contrast_is_drawn_from_what_is_there():
    term = memory_term(pixel_contrast=13)
    assert term.pixel_contrast == 5  # of each of the three classes
    term.pixels.add(torch.randn(4, 5), torch.tensor([0, 0, 0, 1]))
    drawn, filled = term._draw(term.pixels, 5)
    assert drawn.shape == (15, 5)
    assert filled.view(3, 5).sum(1).tolist() == [3, 1, 0]
    assert drawn[filled].norm(dim=1) == pytest.approx(torch.ones(4))


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, valid: cross_image_loss(s, t, valid, 0.5),
        lambda s, t, valid: cross_image_loss(s, t, valid, 0.5, chunk=20),
        lambda s, t, valid: memory_loss(
            s.mT.flatten(0, 1), t.mT.flatten(0, 1), valid.flatten(), t[0].mT, torch.tensor([True, True, False]), 0.5
        ),
    ],
    ids=["minibatch", "minibatch-chunks", "memory"],
)
def test_gradient(loss):
    student = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 3, dtype=torch.float64)
    valid = torch.tensor([[True, False, True], [True, True, False]])
    assert gradcheck(lambda s: loss(s, teacher, valid), (student,))


def test_arguments_are_checked():
    with pytest.raises(GSKDError, match="pixel_bank: expected an integer >= 1, got 0"):
        memory_term(pixel_bank=0)
    with pytest.raises(GSKDError, match="temperature: expected a number > 0"):
        CIRKDLoss(temperature=-1)
    maps = torch.zeros(1, 4, 2, 2), torch.zeros(1, 5, 2, 2)
    with pytest.raises(GSKDError, match="num_classes is 3, the labels have 4"):
        memory_term()(*maps, Pixels(torch.zeros(1, 2, 2, dtype=torch.int64), num_classes=4))
