import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gskd.data import IGNORE, Sample
from gskd.data.views import (
    PAD_COLOUR,
    Augmentation,
    FixedViews,
    PositionSampler,
    TrainingViews,
    View,
    apply_view,
    draw_view,
    sample_at,
)
from gskd.errors import GSKDError

PLAIN = Augmentation(crop=(8, 8), scale=(1, 1), flip=0, brightness=0, contrast=0, saturation=0)
FULL = Augmentation(crop=(12, 16), hue=0.1)
SIDES = st.integers(1, 24)


def noise(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.choice(np.array([0, 1, 7, IGNORE], dtype=np.uint8), (height, width))


class Noise:
    classes = ("a", "b", "c", "d", "e", "f", "g", "h")
    palette = np.zeros((8, 3), np.uint8)

    def __len__(self) -> int:
        return 5

    def name(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        return Sample(*noise(10 + index, 20 - index, index), str(index))


# --- drawing ---


def test_view_is_the_same_in_another_process() -> None:
    code = (
        "from gskd.data.views import *\n"
        "a = Augmentation(crop=(12, 16), hue=0.1)\n"
        "print([draw_view(3, i, 4, (30, 40), a) for i in range(3)], [sample_at(3, p, 7) for p in range(20)])"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    views = [draw_view(3, i, 4, (30, 40), FULL) for i in reversed(range(3))][::-1]  # nor does the order of calls matter
    assert theirs == f"{views} {[sample_at(3, p, 7) for p in range(20)]}"


def test_seed_sample_and_view_all_matter_and_do_not_run_into_each_other() -> None:
    views = {draw_view(s, i, v, (300, 400), FULL) for s in (1, 11) for i in (1, 11, 12) for v in (1, 11, 2)}
    assert len(views) == 18


def test_drawing_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    apply_view(draw_view(0, 0, 0, (9, 9), FULL), *noise(9, 9))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, crop_height=SIDES, crop_width=SIDES, seed=st.integers(0, 10**9))
def test_parameters_stay_in_their_ranges(height: int, width: int, crop_height: int, crop_width: int, seed: int) -> None:
    reach = Augmentation((crop_height, crop_width), (0.5, 2.0), 0.5, 0.2, 0.3, 0.4, 0.1)
    view = draw_view(seed, 0, 0, (height, width), reach)
    for side, scaled in zip((height, width), view.size, strict=True):
        assert max(1, round(0.5 * side)) <= scaled <= 2 * side
    top, left, box_height, box_width = view.box
    assert (box_height, box_width) == (crop_height, crop_width)
    assert 0 <= top <= max(0, view.size[0] - crop_height)
    assert 0 <= left <= max(0, view.size[1] - crop_width)
    for name, most in {"brightness": 0.2, "contrast": 0.3, "saturation": 0.4}.items():
        assert abs(getattr(view, name) - 1) <= most + 1e-12
    assert abs(view.hue) <= 0.1


def test_draws_fill_their_ranges() -> None:
    views = [draw_view(0, i, 0, (40, 40), replace(PLAIN, scale=(0.5, 2.0), flip=0.25, hue=0.5)) for i in range(400)]
    sizes = [view.size[0] for view in views]
    assert (min(sizes), max(sizes)) == (20, 80)
    assert 0.17 < sum(view.flip for view in views) / 400 < 0.33
    assert min(view.hue for view in views) < -0.48
    assert max(view.hue for view in views) > 0.48
    fixed = [draw_view(0, i, 0, (10, 11), replace(PLAIN, flip=1)) for i in range(100)]
    assert {view.box[0] for view in fixed} == {0, 1, 2}  # every place that fits, the last included
    assert {view.box[1] for view in fixed} == {0, 1, 2, 3}
    assert all(view.flip for view in fixed)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"crop": (0, 8)}, "crop"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"scale": (float("nan"), 1.0)}, "scale"),
        ({"flip": 1.1}, "flip"),
        ({"brightness": -0.1}, "brightness"),
        ({"contrast": 1.5}, "contrast"),
        ({"saturation": float("nan")}, "saturation"),
        ({"hue": 0.51}, "hue"),
    ],
)
def test_bad_ranges_are_refused(change: dict, name: str) -> None:
    with pytest.raises(GSKDError, match=rf"augment\.{name}: expected"):
        replace(PLAIN, **change)


# --- applying ---


def test_nothing_asked_leaves_the_image_as_it_is() -> None:
    image, label = noise(8, 8)
    x, y = apply_view(draw_view(5, 1, 2, (8, 8), PLAIN), image, label)
    assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(x.permute(1, 2, 0).numpy(), image)
    assert np.array_equal(y.numpy(), label)


@settings(max_examples=40, deadline=None)
@given(height=SIDES, width=SIDES, crop_height=SIDES, crop_width=SIDES, seed=st.integers(0, 10**9))
def test_replays_invents_no_label_and_changes_no_input(
    height: int, width: int, crop_height: int, crop_width: int, seed: int
) -> None:
    image, label = noise(height, width)
    kept = image.copy(), label.copy()
    view = draw_view(seed, 0, 0, (height, width), replace(FULL, crop=(crop_height, crop_width)))
    x, y = apply_view(view, image, label)
    again = apply_view(view, image, label)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert x.shape == (3, crop_height, crop_width)
    assert y.shape == (crop_height, crop_width)
    assert set(y.unique().tolist()) <= {*np.unique(label).tolist(), IGNORE}
    assert np.array_equal(image, kept[0])
    assert np.array_equal(label, kept[1])


def test_crop_and_flip_move_image_and_label_together() -> None:
    rows, columns = np.mgrid[0:20, 0:20].astype(np.uint8)
    label = (rows * 12 + columns % 12).astype(np.uint8)
    image = np.stack([label, rows, columns], 2)
    for i in range(20):
        view = draw_view(0, i, 0, (20, 20), replace(PLAIN, flip=0.5))
        x, y = apply_view(view, image, label)
        assert torch.equal(x[0].long(), y)
        columns_seen = x[2, 0].tolist()
        start = view.box[1]
        expected = list(range(start, start + 8))
        assert columns_seen == (expected[::-1] if view.flip else expected)
        assert x[1, :, 0].tolist() == list(range(view.box[0], view.box[0] + 8))


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.3, 2.0])
def test_scaling_keeps_image_and_label_together(factor: float) -> None:
    # Four flat quadrants: away from the seams the interpolated image must show the colour of the label's class.
    label = np.zeros((48, 48), np.uint8)
    label[:24, 24:], label[24:, :24], label[24:, 24:] = 1, 2, 3
    image = np.repeat((label * 80)[..., None], 3, 2)
    for i in range(6):
        view = draw_view(0, i, 0, (48, 48), replace(PLAIN, crop=(30, 30), scale=(factor, factor), flip=0.5))
        x, y = apply_view(view, image, label)
        inside = y != IGNORE
        off = ((x[0].long() - y * 80).abs() > 8) & inside
        # One or two pixels on either side of a seam may blend.
        assert off.float().mean() < 0.25
        far = inside.clone()
        seams = torch.zeros_like(inside)
        seams[:, 1:] |= y[:, 1:] != y[:, :-1]
        seams[1:] |= y[1:] != y[:-1]
        near = torch.nn.functional.max_pool2d(seams[None, None].float(), 7, 1, 3)[0, 0] > 0
        far &= ~near
        far[:3], far[-3:], far[:, :3], far[:, -3:] = False, False, False, False  # a seam may lie just outside
        assert far.any()
        assert not (off & far).any()


def test_what_the_image_does_not_cover_is_padded_and_ignored() -> None:
    image, label = np.full((4, 5, 3), 9, np.uint8), np.full((4, 5), 1, np.uint8)
    # Colour changes must not reach the padding, nor may a flip carry it to the left.
    view = View((4, 5), (0, 0, 6, 8), True, 0.5, 0.5, 0.5, 0.1)
    x, y = apply_view(view, image, label)
    outside = torch.ones(6, 8, dtype=torch.bool)
    outside[:4, :5] = False
    assert (y[outside] == IGNORE).all()
    assert (y[~outside] == 1).all()
    assert (torch.tensor(PAD_COLOUR) == x[:, outside].T).all()
    assert (x[:, ~outside] < 9).all()


# --- order ---


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), length=st.integers(1, 50), epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(seed: int, length: int, epoch: int) -> None:
    places = [sample_at(seed, epoch * length + offset, length) for offset in range(length)]
    assert sorted(index for index, _ in places) == list(range(length))
    assert {e for _, e in places} == {epoch}


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(sample_at(seed, epoch * 30 + i, 30)[0] for i in range(30)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_ranks_together_read_each_batch_in_order() -> None:
    for processes in (1, 2, 4):
        ranks = [list(PositionSampler(8, 2, 5, rank, processes)) for rank in range(processes)]
        assert {len(rank) for rank in ranks} == {len(PositionSampler(8, 2, 5, 0, processes))}
        share = 8 // processes
        union = [p for step in range(3) for rank in ranks for p in rank[step * share : (step + 1) * share]]
        assert union == list(range(16, 40))


def test_resumed_sampler_continues_and_a_finished_one_is_empty() -> None:
    assert list(PositionSampler(4, 0, 3)) + list(PositionSampler(4, 3, 6)) == list(PositionSampler(4, 0, 6))
    assert (list(PositionSampler(4, 6, 6)), len(PositionSampler(4, 7, 6))) == ([], 0)


def test_a_sample_looks_different_in_every_epoch_and_the_same_when_asked_again() -> None:
    views = TrainingViews(Noise(), FULL, seed=1)
    position = {
        epoch: next(p for p in range(5 * epoch, 5 * epoch + 5) if sample_at(1, p, 5)[0] == 2) for epoch in (0, 1)
    }
    first, second = views[position[0]], views[position[1]]
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], TrainingViews(Noise(), FULL, seed=1)[position[0]][0])


def test_worker_count_changes_nothing() -> None:
    def load(workers: int) -> list[torch.Tensor]:
        loader = DataLoader(TrainingViews(Noise(), FULL, 3), 2, sampler=PositionSampler(2, 1, 4), num_workers=workers)
        return [tensor for batch in loader for tensor in batch]

    alone, shared = load(0), load(2)
    assert len(alone) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_fixed_views_are_those_that_targets_are_asked_for(seed: int) -> None:
    """Over several epochs: the pixels are those of the sample and view whose stored target comes with them."""
    fixed, order = FixedViews(Noise(), FULL, 3), TrainingViews(Noise(), FULL, seed, 3, lambda *which: which)
    asked = set()
    for position in range(5 * 4):
        image, label, (sample, view) = order[position]
        assert sample == sample_at(seed, position, 5)[0]
        assert torch.equal(image, fixed[sample * 3 + view][0])
        assert torch.equal(label, fixed[sample * 3 + view][1])
        asked.add((sample, view))
    assert asked == {(sample, view) for sample in range(5) for view in range(3)}
    assert len(fixed) == 15
    assert not torch.equal(fixed[0][0], fixed[1][0])
