"""A student as a file for other programs, compared with the student itself."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from gskd import GSKDError, build_model, export
from gskd.architectures import without_pretraining
from gskd.evaluation import predict
from gskd.export import Check, Deployed, deployed, export_model, open_onnx
from gskd.recipe import load_recipe
from gskd.run import Run, inference_of
from helpers import assert_refused, gskd, gskd_ok, snapshot

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "student.onnx"
    return path, gskd_ok("export", tiny.distilled, "-o", path).out


@pytest.mark.slow  # the exporters take their time for a real network
def test_the_exported_student_gives_what_the_run_predicts(tiny, exported):
    path, _ = exported
    run = Run(tiny.distilled)
    model, network, inference = run.load_model(), open_onnx(path), inference_of(run.load_recipe())
    for batch, height, width in ((1, 32, 32), (2, 71, 45), (5, 33, 64)):
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        found = network(images)
        for image, logits in zip(images, found, strict=True):
            torch.testing.assert_close(logits, predict(model, image, inference), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_it_says_how_far_it_is_from_the_original_and_what_it_holds(tiny, exported):
    import onnx

    path, said = exported
    assert said.count("100.000 % of pixels agree") == 3
    assert "any batch, any height and width" in said
    held = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(held["gskd.classes"]) == Run(tiny.distilled).info()["classes"]
    assert json.loads(held["gskd.miou"])["val"] == Run(tiny.distilled).read_result()["best"]["val"]["miou"]
    names = {value.name for graph in [onnx.load(path).graph] for value in (*graph.input, *graph.output)}
    assert names == {"image", "logits"}
    assert [file.name for file in path.parent.iterdir()] == ["student.onnx"]


@pytest.mark.slow
def test_a_program_of_torch_export(tiny, tmp_path):
    path = tmp_path / "student.pt2"
    assert "any height and width" in gskd_ok("export", tiny.distilled, "-o", path).out
    images = torch.randint(0, 256, (3, 3, 50, 41), dtype=torch.uint8)
    found = torch.export.load(path).module()(images)
    torch.testing.assert_close(found, deployed(Run(tiny.distilled))(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_small_network_at_sizes_that_were_not_traced(tmp_path, ending):
    torch.manual_seed(0)
    model = Deployed(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)), MEAN, STD
    ).eval()
    made = export_model(model, tmp_path / f"small.{ending}", (64, 64), facts={"classes": "[]"})
    assert (made.fixed, made.note, len(made.checks)) == (None, "", 3)
    assert [file.name for file in tmp_path.iterdir()] == [f"small.{ending}"]
    network = open_onnx(made.path) if ending == "onnx" else torch.export.load(made.path).module()
    for shape in ((1, 3, 64, 64), (3, 3, 71, 133)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        torch.testing.assert_close(network(images), model(images), atol=1e-5, rtol=1e-5)


def test_the_free_sizes_of_an_onnx_file_have_names(tmp_path):
    model = Deployed(nn.Conv2d(3, 2, 1), MEAN, STD).eval()
    for fixed, sizes in ((False, ["height", "width"]), (True, [64, 96])):
        path = export_model(model, tmp_path / f"{fixed}.onnx", (64, 96), fixed).path
        (image,) = onnxruntime.InferenceSession(path).get_inputs()
        assert (image.name, image.shape) == ("image", ["batch", 3, *sizes])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["@run", "-o", "@/there.onnx"], "there.onnx: exists already"),
        (["@run", "-o", "@/model.pth"], "expected a file that ends in .onnx or .pt2"),
        (["@run", "-o", "@/no/model.onnx"], "no is no folder"),
        (["@/nothing", "-o", "@/model.onnx"], "holds no recipe.yaml"),
    ],
)
def test_refused(tiny, tmp_path, arguments, part):
    (tmp_path / "there.onnx").write_text("mine")
    before = snapshot(tmp_path)
    words = [word.replace("@run", str(tiny.distilled)).replace("@", str(tmp_path)) for word in arguments]
    assert_refused(gskd("export", *words), part)
    assert snapshot(tmp_path) == before


class Pooled(nn.Module):
    """Adaptive pooling to a grid: ONNX has no such thing for sizes that are not known."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(6), nn.Conv2d(3, 4, 1))

    def forward(self, images):
        return self.layers(images)


def test_a_network_that_takes_one_size_only(tmp_path):
    made = export_model(Deployed(Pooled(), MEAN, STD).eval(), tmp_path / "a.onnx", (96, 64))
    assert made.fixed == (96, 64)
    assert "agrees with the original on" in made.note  # onnxruntime runs other sizes without a word, and wrongly
    assert open_onnx(made.path)(torch.zeros(3, 3, 96, 64, dtype=torch.uint8)).shape == (3, 4, 96, 64)
    with pytest.raises(GSKDError, match=r"cannot be run on \(1, 3, 64, 64\)"):
        open_onnx(made.path)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("broken", ["wrong", "other shape"])
def test_what_does_not_agree_is_refused_and_leaves_no_file(tmp_path, monkeypatch, broken):
    def wrong(path: Path, threads: int | None = None):
        return lambda images: images.float().flip(1) if broken == "wrong" else images.float()[..., 1:]

    monkeypatch.setattr(export, "open_onnx", wrong)
    with pytest.raises(GSKDError, match="agrees with the original on" if broken == "wrong" else "expected"):
        export_model(Deployed(nn.Identity(), MEAN, STD).eval(), tmp_path / "a.onnx", (32, 32))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced(tmp_path):
    class Asks(nn.Module):
        def forward(self, images):
            return images if float(images.sum()) > 0 else -images

    for ending in ("onnx", "pt2"):
        with pytest.raises(GSKDError, match="cannot be exported"):
            export_model(Deployed(Asks(), MEAN, STD).eval(), tmp_path / f"a.{ending}", (32, 32))
    assert list(tmp_path.iterdir()) == []


def test_the_network_around_the_student_is_that_of_evaluation():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 50), np.uint8)
    images = torch.from_numpy(pixels)
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(Deployed(nn.Identity(), MEAN, STD)(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes", "scenes_long", "camvid_gskd", "cityscapes_r101_r18"])
def test_every_shipped_student(tmp_path, name):
    recipe = load_recipe(name)
    torch.manual_seed(0)
    model = build_model(recipe.model.name, without_pretraining(recipe.model.name, recipe.model.args), 19)
    for module in model.modules():  # as trained ones have them, else every pixel is a tie of nearly nothing
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    made = export_model(Deployed(model, MEAN, STD).eval(), tmp_path / "student.onnx", (64, 96))
    assert made.fixed is None
    assert len(made.checks) == 3
    assert all(isinstance(check, Check) and check.agreement >= 0.999 and check.error < 1e-3 for check in made.checks)
