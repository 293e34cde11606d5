import oracles
import pytest
import torch
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import (
    CSDLoss,
    IFVDLoss,
    Pixels,
    PSDLoss,
    SKDLoss,
    csd_loss,
    ifvd_loss,
    pairwise_loss,
    psd_loss,
)
from gskd.losses._reduce import masked_max_pool, masked_mean_pool

EVERYWHERE = torch.zeros(2, 12, 20, dtype=torch.int64)


def examples(channels=5, classes=3):
    labels = torch.randint(0, classes, (2, 5, 6))
    labels[:, 1] = 255
    labels[0, 2:, 1:] = 255
    return torch.randn(2, channels, 5, 6), torch.randn(2, channels, 5, 6), labels


def test_skd_golden(golden):
    got = SKDLoss()(golden["feat_student"], golden["feat_teacher"], Pixels(EVERYWHERE, num_classes=7))
    torch.testing.assert_close(got, golden["expected/skd.pairwise_maxpool2"][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("channels", [2, 40])
def test_pairs_agree_with_loops_both_ways_of_summing(channels):
    """Two channels: the sum over pairs comes from 2 x 2 products. Forty: from the 30 x 30 pairs."""
    student, teacher, labels = examples(channels)
    student[:, :, 0, 0] = 0
    student, teacher, valid = student.flatten(2), teacher.flatten(2), (labels != 255).flatten(1)
    expected = oracles.pairwise(student, teacher, valid)
    assert pairwise_loss(student, teacher, valid).item() == pytest.approx(expected, rel=1e-4)


def test_pairs_never_make_a_map_of_pixel_pairs():
    """At 1024 x 2048 with stride 8 that map has 2**30 entries, 4 GiB."""
    student, teacher = torch.randn(1, 4, 128 * 256, requires_grad=True), torch.randn(1, 6, 128 * 256)
    pairwise_loss(student, teacher, torch.ones(1, 128 * 256, dtype=torch.bool)).backward()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("kernel", [2, 3])
def test_pools_agree_with_loops(kernel):
    maps, _, labels = examples()
    valid = labels != 255
    highest, there = masked_max_pool(maps, valid, kernel)
    mean, same = masked_mean_pool(maps, valid, kernel)
    assert torch.equal(there, same)
    for b in range(2):
        windows = oracles.max_pool(maps[b], valid[b], kernel)
        assert [w is not None for w in windows] == there[b].flatten().tolist()
        for i, window in enumerate(windows):
            expected = torch.zeros(2, 5) if window is None else torch.stack([window.amax(0), window.mean(0)])
            torch.testing.assert_close(torch.stack([highest[b].flatten(1)[:, i], mean[b].flatten(1)[:, i]]), expected)


def test_skd_pools_to_half_the_map():
    student, teacher, _ = examples()
    pixels = Pixels(torch.zeros(2, 5, 6, dtype=torch.int64), num_classes=3)
    nodes = [torch.nn.functional.max_pool2d(maps, (3, 3), ceil_mode=True).flatten(2) for maps in (student, teacher)]
    assert nodes[0].shape[2] == 4
    expected = oracles.pairwise(*nodes, torch.ones(2, 4, dtype=torch.bool))
    assert SKDLoss("half")(student, teacher, pixels).item() == pytest.approx(expected, rel=1e-4)


def test_ifvd_golden(golden):
    """The public value counts ignored pixels in its mean."""
    pixels = Pixels(golden["labels"], num_classes=7)
    got = IFVDLoss()(golden["feat_student"], golden["feat_teacher"], pixels)
    share = pixels.valid_at((12, 20)).float().mean()
    assert share < 1
    torch.testing.assert_close(got * share, golden["expected/ifvd"][0], rtol=1e-5, atol=1e-7)


def test_ifvd_agrees_with_loops():
    student, teacher, labels = examples()
    expected = oracles.ifvd(student, teacher, labels, labels != 255)
    assert IFVDLoss()(student, teacher, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-4)


def test_psd_golden(golden):
    """The public value is a mean over pixels."""
    maps = {side: [golden[f"feat_{side}_early"], golden[f"feat_{side}"]] for side in ("student", "teacher")}
    got = PSDLoss()(maps["student"], maps["teacher"], Pixels(EVERYWHERE, num_classes=7)) / (12 * 20)
    torch.testing.assert_close(got, golden["expected/dsd.psd"][0], rtol=1e-5, atol=1e-9)


def test_psd_agrees_with_loops():
    student, teacher, labels = examples()
    levels = [[maps, maps[:, :3] ** 3, maps[:, 2:].exp()] for maps in (student, teacher)]
    expected = oracles.psd(*levels, labels != 255)
    assert PSDLoss()(*levels, Pixels(labels, num_classes=3)).item() == pytest.approx(expected, rel=1e-4)


def test_psd_brings_levels_to_the_size_of_the_teachers_last():
    maps = [torch.randn(2, 3, 10, 12), torch.randn(2, 4, 5, 6)]
    labels = torch.zeros(2, 5, 6, dtype=torch.int64)
    resized = [torch.nn.functional.interpolate(maps[0], (5, 6), mode="bilinear"), maps[1]]
    other = [torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6)]
    pixels = Pixels(labels, num_classes=3)
    torch.testing.assert_close(PSDLoss()(maps, other, pixels), PSDLoss()(resized, other, pixels))


def test_psd_says_that_it_needs_levels():
    maps, pixels = torch.zeros(1, 3, 2, 2), Pixels(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(GSKDError, match="psd: student: expected the maps of two or more layers, got one"):
        PSDLoss()(maps, [maps, maps], pixels)
    with pytest.raises(GSKDError, match="got 2 of the student and 3 of the teacher"):
        PSDLoss()([maps] * 2, [maps] * 3, pixels)
    with pytest.raises(GSKDError, match="got 1 of the student"):
        PSDLoss()([maps], [maps], pixels)


def test_csd_golden(golden):
    """The public overlap is not multiplied by the number of places, 6 x 10 after pooling."""
    pixels = Pixels(EVERYWHERE, num_classes=7)
    got = CSDLoss()(golden["logits_student"], golden["logits_teacher"], pixels) / (6 * 10) ** 2
    torch.testing.assert_close(got, golden["expected/dsd.csd"][0], rtol=1e-5, atol=1e-9)


def test_csd_agrees_with_loops():
    student, teacher, labels = examples()
    student, teacher, valid = student.flatten(2), teacher.flatten(2), (labels != 255).flatten(1)
    expected = oracles.csd(student, teacher, valid, 2.0)
    assert csd_loss(student, teacher, valid, 2.0).item() == pytest.approx(expected, rel=1e-4)


FLAGS = torch.tensor([[[True, False], [True, True]], [[False, False], [False, False]]])


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: pairwise_loss(s.flatten(2), t.flatten(2), FLAGS.flatten(1)),
        lambda s, t: pairwise_loss(s[:, :2].flatten(2), t[:, :2].flatten(2), FLAGS.flatten(1)),
        lambda s, t: ifvd_loss(s, t, torch.tensor([[[0, 1], [0, 1]]] * 2), FLAGS, 2),
        lambda s, t: psd_loss([s, s[:, :2] ** 3], [t, t[:, :2] ** 3], FLAGS),
        lambda s, t: csd_loss(s.flatten(2), t.flatten(2), FLAGS.flatten(1), 2.0),
    ],
    ids=["pairs", "pairs-few-channels", "ifvd", "psd", "csd"],
)
def test_gradient(loss):
    student = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    assert gradcheck(lambda s: loss(s, teacher), (student,))


def test_arguments_are_checked():
    with pytest.raises(GSKDError, match="pool: expected an integer >= 1, got 0"):
        SKDLoss(0)
    with pytest.raises(GSKDError, match=r"pool: expected an integer >= 1, got 2\.5"):
        CSDLoss(pool=2.5)
    with pytest.raises(GSKDError, match="ifvd: unknown number of classes"):
        IFVDLoss()(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), Pixels(torch.zeros(1, 2, 2, dtype=torch.int64)))
