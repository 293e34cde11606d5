"""Batch normalisation inside convolutions: the same network, or the network itself."""

import pytest
import torch
from torch import nn

from gskd import Distiller, GSKDLoss, KDLoss, Term, build_model, logits_of
from gskd.folding import fold_batch_norm
from helpers import trained

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "args", "least"),
    [
        ("smp:DeepLabV3Plus", {"encoder_name": "resnet18", "encoder_weights": None}, 25),
        ("torchvision:lraspp_mobilenet_v3_large", {"weights": None, "weights_backbone": None}, 40),
    ],
)
def test_a_folded_network_gives_the_same(name, args, least):
    model = trained(build_model(name, args, 5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded, count = fold_batch_norm(model, IMAGES)
    assert count >= least
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) < 5
    other = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(folded(other)), logits_of(model(other)), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Odd(nn.Module):
    """What must not be folded, one thing at a time."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=kind != "no statistics"),
        )
        self.twin = self.norm if kind == "shared" else nn.BatchNorm2d(4)

    def forward(self, images):
        first = self.conv(images)
        if self.kind == "used elsewhere":
            return self.norm(first) + first
        if self.kind == "runs twice":
            return self.norm(self.conv(images.flip(-1))) + self.norm(first)
        if self.kind == "two norms":
            return self.norm(first) + self.twin(first)
        if self.kind == "not directly":
            return self.norm(first.relu())
        return self.twin(self.norm(first).relu()) if self.kind == "shared" else self.norm(first)


@pytest.mark.parametrize(
    "kind", ["used elsewhere", "runs twice", "two norms", "not directly", "shared", "no statistics"]
)
def test_what_cannot_be_folded_is_left_alone(kind):
    model = trained(Odd(kind))
    assert fold_batch_norm(model, IMAGES) == (model, 0)


def test_a_convolution_that_is_read_stays():
    model = trained(Odd("plain"))
    assert fold_batch_norm(model, IMAGES, ["conv"]) == (model, 0)
    assert fold_batch_norm(model, IMAGES, ["norm"])[1] == 1


def test_a_distiller_with_a_folded_teacher_gives_the_same_loss():
    small = {"encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None, "decoder_channels": [16, 16, 8, 8, 8]}
    teacher = trained(build_model("smp:Unet", {"encoder_name": "resnet18", "encoder_weights": None}, 5))
    labels = torch.randint(0, 5, (2, 64, 64))
    losses, asked = [], []
    teacher.register_forward_pre_hook(lambda module, _: asked.append(module is teacher))  # the copy has it too
    for fold in (False, True):
        torch.manual_seed(0)
        student = build_model("smp:Unet", small, 5)
        terms = {"gskd": Term(GSKDLoss(), 10), "kd": Term(KDLoss(), 1)}
        distiller = Distiller(student, teacher, terms)
        keys = set(distiller.state_dict())
        if fold:
            assert distiller.fold_teacher(IMAGES) > 20
        assert set(distiller.state_dict()) == keys  # the copy is as hidden as the teacher
        assert distiller.teacher is teacher
        torch.manual_seed(1)
        asked.clear()
        losses.append(distiller.double()(IMAGES.double(), labels).loss)
        assert asked == [not fold]  # the copy is what was run
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
