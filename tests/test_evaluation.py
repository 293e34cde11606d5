import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gskd.data import IGNORE, Sample
from gskd.data.scenes import Scenes
from gskd.errors import GSKDError
from gskd.evaluation import Inference, _starts, evaluate, predict
from gskd.models import normalise

CLASSES = 3


def pointwise() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, CLASSES, 1).eval()


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def exact(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(normalise(image[None], Inference.mean, Inference.std))[0]


class Strided(nn.Module):
    """Colours averaged over cells: logits at a fraction of the input's size."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape[-2:]))
        return F.avg_pool2d(x, self.stride)


@dataclass
class Listed:
    samples: list[tuple[Tensor, Tensor]]
    classes: tuple[str, ...] = ("a", "b", "c")
    palette = np.zeros((3, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.samples[index]
        return Sample(image.permute(1, 2, 0).contiguous().numpy(), label.to(torch.uint8).numpy(), str(index))


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 32), (37, 5)])
@pytest.mark.parametrize(
    "inference",
    [
        Inference(),
        Inference(mode="slide", window=(16, 16), overlap=0.33),
        Inference(mode="slide", window=(7, 20), overlap=0.0),
        Inference(mode="slide", window=(100, 10), overlap=0.9),
    ],
)
def test_padding_and_windows_do_not_change_a_pointwise_model(size: tuple[int, int], inference: Inference) -> None:
    model, image = pointwise(), picture(*size)
    logits = predict(model, image, inference)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact(model, image))


def test_a_network_that_cannot_run_on_the_image_is_named_with_its_size() -> None:
    class Fixed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.shape[-2:] != (32, 32):
                raise ValueError("expected 32 x 32")
            return images

    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    with pytest.raises(GSKDError, match=r"Fixed: cannot run on 64 x 64 pixels.* expected 32 x 32; eval\.mode: slide"):
        predict(Fixed(), image, Inference())
    assert predict(Fixed(), image, Inference(mode="slide", window=(32, 32))).shape == (3, 40, 60)


def test_flip_averages_the_probabilities_of_both_sides() -> None:
    model, image = pointwise(), picture(21, 35)
    torch.testing.assert_close(predict(model, image, Inference(flip=True)), exact(model, image).softmax(0))


def test_flip_is_undone_for_a_model_that_looks_sideways() -> None:
    shift = nn.Conv2d(3, CLASSES, (1, 3), padding=(0, 1), bias=False).eval()
    with torch.no_grad():
        shift.weight.zero_()
        for k in range(3):
            shift.weight[k, k, 0, 0] = 1.0  # each pixel says what its left neighbour is
    image = picture(32, 64)
    x = normalise(image[None], Inference.mean, Inference.std)[0]
    left = F.pad(x, (1, 0))[..., :-1].softmax(0)
    right = F.pad(x, (0, 1))[..., 1:].softmax(0)  # seen in the mirror
    torch.testing.assert_close(predict(shift, image, Inference(flip=True)), (left + right) / 2)


def test_scales_average_probabilities_at_the_images_size() -> None:
    model = pointwise()
    image = picture(1, 1).expand(3, 40, 56).contiguous()  # one colour: every scale must say the same
    scores = predict(model, image, Inference(scales=(0.5, 1.0, 1.75), flip=True))
    torch.testing.assert_close(scores, exact(model, image).softmax(0))


def test_each_scale_is_what_the_model_sees() -> None:
    model = Strided(1)
    predict(model.eval(), picture(40, 60), Inference(scales=(0.5, 1.0, 2.0)))
    assert model.sizes == [(32, 32), (64, 64), (96, 128)]
    predict(model, picture(1, 1), Inference(scales=(0.25,)))  # a scaled side never vanishes


def test_one_small_scale_gives_logits_at_full_size() -> None:
    image = picture(1, 1).expand(3, 40, 56).contiguous()
    torch.testing.assert_close(predict(pointwise(), image, Inference(scales=(0.5,))), exact(pointwise(), image))


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("size", [(64, 96), (50, 75)])
def test_coarse_logits_lie_over_their_pixels(stride: int, size: tuple[int, int]) -> None:
    # A ramp is its own average over cells, so upsampled logits must equal it but near the borders.
    ramp = torch.arange(size[1], dtype=torch.float32).expand(3, *size).to(torch.uint8)
    logits = predict(Strided(stride).eval(), ramp, Inference(mean=(0, 0, 0), std=(1 / 255,) * 3))
    assert logits.shape == (3, *size)
    inner = slice(stride, 64 - 2 * stride if size[1] == 96 else 75 - 2 * stride)
    rows = slice(0, 32)
    torch.testing.assert_close(logits[:, rows, inner], ramp.float()[:, rows, inner], atol=1e-3, rtol=0)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 300), window=st.integers(1, 300), overlap=st.floats(0, 0.99))
def test_windows_cover_everything_and_overlap_enough(length: int, window: int, overlap: float) -> None:
    window = min(length, window)
    starts = _starts(length, window, overlap)
    assert (starts[0], starts[-1]) == (0, length - window)
    for a, b in itertools.pairwise(starts):
        assert a < b
        shared = a + window - b
        assert shared >= 0
        assert shared >= overlap * window - 1e-3 or b - a == 1


def test_windows_are_no_more_than_needed() -> None:
    assert _starts(100, 100, 0.5) == [0]
    assert _starts(100, 50, 0.0) == [0, 50]
    assert _starts(100, 50, 0.5) == [0, 25, 50]
    assert _starts(110, 10, 0.9) == list(range(101))


def test_a_model_is_never_given_a_side_that_is_no_multiple_of_32() -> None:
    model = Strided(1)
    predict(model.eval(), picture(45, 70), Inference(mode="slide", window=(33, 20), scales=(0.7, 1.0), flip=True))
    assert {side % 32 for size in model.sizes for side in size} == {0}


def test_autocast_is_used_and_scores_are_float32() -> None:
    seen = []
    model = pointwise()
    model.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    assert predict(model, picture(8, 8), Inference(dtype=torch.bfloat16)).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_score_of_a_dataset_by_hand() -> None:
    model = pointwise()
    samples = []
    hits = pixels = 0
    for i, size in enumerate([(5, 9), (33, 40)]):
        image = picture(*size, seed=i)
        label = torch.randint(0, CLASSES, size, generator=torch.Generator().manual_seed(i))
        label[0, :3] = IGNORE
        hits += ((exact(model, image).argmax(0) == label) & (label != IGNORE)).sum().item()
        pixels += (label != IGNORE).sum().item()
        samples.append((image, label))
    ticks: list[tuple[int, int]] = []
    score = evaluate(model, Listed(samples), on_progress=lambda done, total: ticks.append((done, total)))
    assert score.pixels == pixels
    assert score.pixel_accuracy == pytest.approx(hits / pixels)
    assert ticks == [(1, 2), (2, 2)]


def test_ignored_everywhere_gives_no_score() -> None:
    score = evaluate(pointwise(), Listed([(picture(4, 4), torch.full((4, 4), IGNORE))]))
    assert score.pixels == 0
    assert math.isnan(score.miou)


def test_ignore_is_no_class_even_with_256_classes() -> None:
    data = Listed([(picture(4, 4), torch.full((4, 4), IGNORE))], classes=tuple(map(str, range(256))))
    assert evaluate(nn.Conv2d(3, 256, 1), data).pixels == 0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.train()
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not any(m.training for m in self.modules())
        if x.shape[-1] > 64:
            raise RuntimeError("too wide")
        return self.head(self.frozen(self.norm(x)))


@pytest.mark.parametrize("width", [10, 70])
def test_modes_and_statistics_are_left_as_found(width: int) -> None:
    model = Mixed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = Listed([(picture(8, width), torch.zeros(8, width))])
    if width > 64:
        with pytest.raises(GSKDError, match="too wide"):
            evaluate(model, data)
    else:
        evaluate(model, data)
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_with_more_classes_than_the_data_is_refused() -> None:
    """A prediction beyond the last class would be counted as some other pair of classes."""
    data = Scenes("val", length=1, size=(16, 16))
    with pytest.raises(GSKDError, match="gives 21 classes; expected the data's 11"):
        evaluate(nn.Conv2d(3, 21, 1), data)
