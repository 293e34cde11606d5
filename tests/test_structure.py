"""Points and similarities of one image, against what they are by definition."""

import pytest
import torch
from torch import nn

from gskd import GSKDError
from gskd.evaluation import Inference
from gskd.speed import latency, multiply_adds
from gskd.structure import (
    StructureReader,
    label_tensor,
    sample_points,
    similarity_everywhere,
    similarity_map,
    structure_error,
)

PLAIN = Inference(mean=(0, 0, 0), std=(1, 1, 1))


def stripes(height=40, width=56):
    """An image whose red is its column and whose green is its row, and labels that ignore a corner."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = torch.arange(width, dtype=torch.uint8)
    image[1] = torch.arange(height, dtype=torch.uint8)[:, None]
    label = (torch.arange(width) // 20).expand(height, width).clone()
    label[:10, :10] = 255
    return image, label


class Same(nn.Module):
    """A layer that gives its input, at a stride."""

    def __init__(self, stride):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.pool, self.head = nn.AvgPool2d(stride), nn.Conv2d(3, 2, 1)

    def forward(self, images):
        return self.head(self.pool(images))


def test_points_are_even_sorted_and_never_ignored():
    _, label = stripes()
    label[:, 40:] = 255
    label[3, 50] = 2  # a class of one pixel
    points = sample_points(label, 4, 5)
    assert points.label.tolist() == [0] * 5 + [1] * 5 + [2]
    assert torch.equal(label.flatten()[points.index], points.label)
    assert torch.equal(points.index, sample_points(label, 4, 5).index)
    assert points.places()[-1].tolist() == pytest.approx([50.5 / 56, 3.5 / 40])


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_features_are_read_where_the_points_are(stride, scale):
    """Padded to 64 x 64 (or 32 x 32): read as if the map were of the image alone, a point would be off by a third."""
    image, label = stripes()
    points = sample_points(label, 3, 12)
    read, maps = StructureReader(
        Same(stride), "pool", Inference(mean=(0, 0, 0), std=(1, 1, 1), scales=(scale,))
    ).features(image, points)
    columns, rows = (points.index % 56).float(), (points.index // 56).float()
    inside = (columns > 8) & (columns < 46) & (rows > 8) & (rows < 30)  # padding bleeds into the edge
    assert inside.sum() > 5
    torch.testing.assert_close(255 * read[inside, 0], columns[inside], atol=0.6, rtol=0)
    torch.testing.assert_close(255 * read[inside, 1], rows[inside], atol=0.6, rtol=0)
    assert tuple(maps.shape) == (3, 40 * scale // stride, 56 * scale // stride)


def test_similarity_everywhere_is_the_map_at_the_points():
    read = torch.randn(6, 4)
    maps = read.T.reshape(4, 2, 3).clone()
    everywhere = similarity_everywhere(read, maps)
    torch.testing.assert_close(everywhere.flatten(1), similarity_map(read))


def test_structure_error_agrees_with_loops():
    one, other, label = torch.rand(5, 5), torch.rand(5, 5), torch.tensor([0, 0, 1, 1, 1])
    within, across = [], []
    for i in range(5):
        for j in range(5):
            if i != j:
                (within if label[i] == label[j] else across).append(abs(one[i, j] - other[i, j]).item())
    found = structure_error(one, other, label)
    assert found == pytest.approx((sum(within) / len(within), sum(across) / len(across)))


def test_structure_error_of_one_class():
    within, across = structure_error(torch.rand(3, 3), torch.rand(3, 3), torch.zeros(3))
    assert within > 0
    assert across != across


def test_a_layer_without_a_map_is_named():
    class Flat(Same):
        def forward(self, images):
            return self.head(images)

    model = Flat(1)
    model.pool = nn.Identity()
    image, label = stripes()
    with pytest.raises(GSKDError, match="pool"):
        StructureReader(model, "pool", PLAIN).features(image, sample_points(label, 3))


def test_what_is_no_class_is_ignored():
    assert label_tensor(torch.tensor([[0, 2, 3, 255]], dtype=torch.uint8), 3).tolist() == [[0, 2, 255, 255]]


def test_multiplications_of_a_convolution_are_counted():
    assert multiply_adds(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 12)) == 10 * 12 * 3 * 8 * 9


def test_latency_is_of_inference():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5)).train()
    found = latency(model, torch.zeros(1, 3, 8, 8), repeats=5)
    assert 0 < found.median <= found.p95
    assert model.training
