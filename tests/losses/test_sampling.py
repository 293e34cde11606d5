import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gskd import GSKDError
from gskd.losses._sampling import class_balanced_sample, read_points, uniform_sample


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    classes=st.integers(1, 6),
    samples=st.integers(1, 9),
    policy=st.sampled_from(["repeat", "fill", "mask"]),
    most=st.sampled_from([None, 1, 2, 4, 9]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_class_gets_its_points(seed, batch, size, classes, samples, policy, most, share):
    torch.manual_seed(seed)
    labels = torch.randint(-1, classes + 1, (batch, *size))
    eligible = torch.rand(labels.shape) < share
    points = class_balanced_sample(labels, classes, samples, eligible=eligible, policy=policy, max_classes=most)
    slots = min(classes, most or classes)
    assert points.index.shape == points.valid.shape == (batch, slots * samples)
    for b in range(batch):
        pools = {
            c: set(((labels[b] == c) & eligible[b]).flatten().nonzero().flatten().tolist()) for c in range(classes)
        }
        pools = {c: pool for c, pool in pools.items() if pool}
        everything = set().union(*pools.values())
        assert points.class_count[b] == min(len(pools), slots)
        index, valid, label = (t[b].view(slots, samples).tolist() for t in (points.index, points.valid, points.label))
        flat = labels[b].flatten().tolist()
        own = set()
        for p in range(slots):
            drawn = [i for i, v in zip(index[p], valid[p], strict=True) if v]
            assert all(c == (flat[i] if v else -1) for i, v, c in zip(index[p], valid[p], label[p], strict=True))
            if p >= len(pools):
                assert not drawn
                continue
            assert set(drawn) <= everything
            c, n = label[p][0], len(pools[label[p][0]])
            assert c not in own
            own.add(c)
            taken = [i for i in drawn if flat[i] == c]
            if policy == "mask":
                assert len(drawn) == min(n, samples)
            else:
                assert len(drawn) == samples
            if policy == "repeat":
                assert len(taken) == samples
                assert {taken.count(i) for i in pools[c]} <= {samples // n, -(-samples // n)}
            if n >= samples:
                assert len(set(taken)) == len(taken) == samples
        if policy == "fill":
            distinct = {i for row, oks in zip(index, valid, strict=True) for i, ok in zip(row, oks, strict=True) if ok}
            assert len(distinct) == min(len(everything), samples * min(len(pools), slots))


def test_every_pixel_of_a_class_is_equally_likely():
    labels = torch.zeros(400, 4, 5, dtype=torch.int64)
    labels[:, 2:] = 1
    points = class_balanced_sample(labels, 2, 3)
    seen = torch.bincount(points.index.flatten(), minlength=20).double()
    expected = 400 * 3 / 10
    # A pixel's count has variance n p (1 - p): chi-square with 9 degrees of freedom per class, 99.99 % below 34.
    for pixels in (seen[:10], seen[10:]):
        assert ((pixels - expected) ** 2 / (expected * (1 - 3 / 10))).sum() * 9 / 10 < 34


def test_classes_beyond_the_most_are_left_out_at_random():
    labels = torch.arange(4).view(1, 2, 2).expand(300, 2, 2).contiguous()
    points = class_balanced_sample(labels, 4, 1, max_classes=2)
    counts = torch.bincount(points.label.flatten(), minlength=4)
    assert counts.sum() == 600
    assert (counts - 150).abs().max() < 50  # six standard deviations


def test_images_and_calls_draw_differently_but_a_generator_repeats():
    labels = torch.zeros(2, 20, 20, dtype=torch.int64)
    first = class_balanced_sample(labels, 1, 8, generator=torch.Generator().manual_seed(1)).index
    assert torch.equal(first, class_balanced_sample(labels, 1, 8, generator=torch.Generator().manual_seed(1)).index)
    assert not torch.equal(first, class_balanced_sample(labels, 1, 8).index)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(5, 7), (10, 14), (3, 4), (1, 1), (8, 3)])
def test_points_are_whole_pixels(memory_format, size):
    """Trap 2: a reshape instead of a permute would mix channels."""
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    index = torch.randint(0, size[0] * size[1], (2, 6))
    got = read_points(features, index, size)
    weights = torch.randn_like(got)
    (gradient,) = torch.autograd.grad((got * weights).sum(), features)
    expected = torch.stack(
        [
            torch.stack([oracles.bilinear(features[b], int(i) // size[1], int(i) % size[1], size) for i in index[b]])
            for b in range(2)
        ]
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), features)[0])


def test_bilinear_reads_are_those_of_interpolation():
    features = torch.randn(1, 4, 6, 9)
    resized = torch.nn.functional.interpolate(features, (13, 5), mode="bilinear", align_corners=False)
    index = torch.arange(13 * 5).unsqueeze(0)
    torch.testing.assert_close(read_points(features, index, (13, 5)), resized.flatten(2).mT)


def test_errors_name_what_is_wrong():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(GSKDError, match="did you mean 'repeat'"):
        class_balanced_sample(labels, 2, policy="repaet")
    with pytest.raises(GSKDError, match="eligible: expected"):
        class_balanced_sample(labels, 2, eligible=torch.ones(1, 2, 3, dtype=torch.bool))


def test_uniform_draws_every_eligible_pixel_equally_often():
    labels = torch.tensor([[[0, 0, 0, 0, 1, 255]]]).repeat(2000, 1, 1)
    sample = uniform_sample(labels, 3, 1)
    assert sample.class_count.unique().tolist() == [2]
    assert sample.valid.sum(1).unique().tolist() == [2]
    assert sample.label[~sample.valid].unique().tolist() == [-1]
    drawn = sample.index[sample.valid].bincount(minlength=6) / 2000
    assert drawn == pytest.approx(torch.tensor([0.4, 0.4, 0.4, 0.4, 0.4, 0]), abs=0.05)
    assert torch.equal(sample.label[sample.valid], labels.flatten(1).gather(1, sample.index)[sample.valid])


def test_uniform_repeats_where_there_are_fewer_pixels_than_points():
    sample = uniform_sample(torch.tensor([[[0, 1, 255]], [[255, 255, 255]]]), 2, 3)
    assert sample.index[0].bincount().tolist() == [3, 3]
    assert not sample.valid[1].any()
