import numpy as np
import pytest
import torch

from gskd.comparison.statistics import class_iou, image_counts, mean_iou, paired_difference
from gskd.data.scenes import Scenes
from gskd.evaluation import Inference, evaluate


def test_counts_of_images_give_the_score_of_the_dataset():
    torch.manual_seed(0)
    data = Scenes("val", size=(32, 48), length=3)
    model = torch.nn.Conv2d(3, len(data.classes), 3, padding=1)
    counts = image_counts(model, data, Inference())
    expected = evaluate(model, data)
    assert counts.shape == (3, 3, len(data.classes))
    assert mean_iou(counts.sum(0)) == pytest.approx(expected.miou)
    np.testing.assert_allclose(class_iou(counts.sum(0)), expected.iou)


def example(seeds=3, images=40, classes=4, share=0.7, random=None):
    """Counts of a model that is right on about ``share`` of the pixels, images of unequal difficulty."""
    random = random or np.random.default_rng(1)
    labelled = random.integers(50, 150, (1, images, classes)).repeat(seeds, 0)
    ease = random.normal(share, 0.08, (1, images, 1)) + random.normal(0, 0.02, (seeds, images, classes))
    right = (labelled * ease.clip(0, 1)).astype(np.int64)
    predicted = right + random.permuted(labelled - right, axis=2)
    return np.stack([right, labelled, predicted], axis=2)


def worse(counts, lost):
    changed = counts.copy()
    changed[:, :, 0] -= np.minimum(changed[:, :, 0], lost)
    return changed


def test_nothing_is_different_from_itself():
    counts = example()
    difference = paired_difference(counts, counts)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert not difference.clear


def test_pairing_finds_a_difference_far_smaller_than_the_spread_between_images():
    counts = example()
    difference = paired_difference(counts, worse(counts, 1))
    assert difference.mean == pytest.approx(mean_iou(counts.sum(1)).mean() - mean_iou(worse(counts, 1).sum(1)).mean())
    assert 0 < difference.low < difference.mean < difference.high < 0.03
    assert difference.clear
    assert paired_difference(worse(counts, 1), counts).high < 0


def test_one_seed_may_be_compared_but_many_are_needed_for_their_noise():
    counts = example()
    other = counts.copy()
    other[0] = worse(counts[:1], 30)[0]  # one seed came out badly
    assert paired_difference(counts[:1], other[:1]).clear
    assert not paired_difference(counts, other).clear


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Two models of one quality, drawn many times: an interval of 95 % may miss zero in about one case of twenty."""
    random = np.random.default_rng(3)
    missed = 0
    for _ in range(60):
        counts = example(seeds=1, images=60, random=random)
        noise = random.integers(-6, 7, counts[:, :, 0].shape)
        other = counts.copy()
        other[:, :, 0] = (other[:, :, 0] + noise).clip(0, counts[:, :, 1])
        missed += paired_difference(counts, other, resamples=300).clear
    assert 1 <= missed <= 9  # an interval that never misses would be too wide


def test_classes_can_be_chosen_and_absent_ones_do_not_count():
    counts = example()
    counts[:, :, :, 3] = 0
    assert np.isnan(class_iou(counts.sum(1))[:, 3]).all()
    assert not np.isnan(mean_iou(counts.sum(1))).any()
    chosen = np.array([True, False, False, True])
    assert mean_iou(counts.sum(1), chosen) == pytest.approx(class_iou(counts.sum(1))[:, 0])
    assert np.isnan(mean_iou(counts.sum(1), np.array([False, False, False, True]))).all()
