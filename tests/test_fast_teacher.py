"""How the teacher runs fastest: chosen among what gives the same, and remembered."""

import json

import pytest
import torch
from torch import nn

from gskd import Distiller, GSKDError, GSKDLoss, KDLoss, Term, build_model
from gskd.fast_teacher import TeacherPath, Trial, best_path, try_paths
from helpers import assert_same_run, gskd_ok, kill_at, trained

FP32, BF16 = torch.float32, torch.bfloat16
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def smooth_teacher():
    """One whose classes are far apart, as a trained one's are: half precision does not change them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


class Brittle(nn.Module):
    """Loses in half precision what it tells classes apart by."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        seen = self.conv(images)
        return (seen.new_full(seen.shape, 1000.0, dtype=seen.dtype) + 1e-3 * seen - 1000.0) * 1000


class Unable(nn.Conv2d):
    """Has an operation that is not there in half precision."""

    def forward(self, images):
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("\"op\" not implemented for 'BFloat16'")
        return super().forward(images)


def test_all_ways_are_tried_and_the_plain_one_comes_first():
    trials = try_paths(smooth_teacher(), IMAGES, ["2"])
    assert trials[0].path == TeacherPath(FP32, False, False)
    assert trials[0].same_class == 1.0
    assert trials[0].structure_error == 0.0
    assert {trial.path for trial in trials} == {
        TeacherPath(dtype, folded, layout)
        for dtype in (FP32, BF16)
        for folded in (False, True)
        for layout in (False, True)
    }
    assert all(trial.problem or 0 < trial.seconds < float("inf") for trial in trials)


def test_images_in_channels_last_are_tried_in_no_other_layout():
    trials = try_paths(smooth_teacher(), IMAGES.contiguous(memory_format=torch.channels_last), ["2"])
    assert {trial.path.channels_last for trial in trials} == {True}


@pytest.mark.parametrize(("teacher", "why"), [(Brittle(), "of the classes"), (Unable(3, 4, 1), "not implemented")])
def test_what_does_not_give_the_same_is_not_used(teacher, why):
    trials = try_paths(teacher, IMAGES)
    halves = [trial for trial in trials if trial.path.dtype == BF16]
    assert halves
    assert all(why in trial.problem for trial in halves)
    assert best_path(trials).dtype == FP32


class Mixed(nn.Module):
    """Keeps its classes in half precision, and not what its features resemble."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 8, 1), nn.Identity()

    def forward(self, images):
        half = torch.is_autocast_enabled("cpu")
        self.kept(self.conv(images).abs() * torch.rand(1, 8, 64, 64) if half else self.conv(images))
        return images[:, :2]


def test_structure_counts_as_much_as_classes():
    halves = [trial for trial in try_paths(Mixed(), IMAGES, ["kept"]) if trial.path.dtype == BF16]
    assert all(trial.same_class == 1.0 for trial in halves)
    assert all("structure" in trial.problem for trial in halves)
    assert not any("structure" in trial.problem for trial in try_paths(Mixed(), IMAGES))


def trial(dtype, seconds, problem=""):
    return Trial(TeacherPath(dtype, False, False), seconds, 1.0, 0.0, problem)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([trial(FP32, 1.0), trial(BF16, 0.5)], BF16),
        ([trial(FP32, 1.0), trial(BF16, 0.99)], FP32),  # not worth a difference
        ([trial(FP32, 1.0), trial(BF16, 1.5)], FP32),
        ([trial(FP32, 1.0), trial(BF16, 0.1, "keeps 50 %")], FP32),
        ([trial(FP32, 1.0), trial(BF16, 0.5), trial(torch.float16, 0.49)], BF16),
    ],
)
def test_the_fastest_that_can_be_used_is_taken(trials, best):
    assert best_path(trials).dtype == best


def test_a_path_survives_being_written_down():
    for dtype in (FP32, BF16, torch.float16):
        path = TeacherPath(dtype, True, False)
        assert TeacherPath.from_json(path.to_json()) == path
    assert str(TeacherPath(BF16, True, True)) == "bf16, folded, channels_last"


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_distiller_gives_nearly_the_same_loss_on_every_path(dtype, folded, channels_last):
    teacher = trained(build_model("smp:Unet", {"encoder_name": "resnet18", "encoder_weights": None}, 5))
    torch.manual_seed(0)
    small = {"encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None, "decoder_channels": [16, 16, 8, 8, 8]}
    terms = {"gskd": Term(GSKDLoss(only_correct=False), 10), "kd": Term(KDLoss(), 1)}
    distiller = Distiller(build_model("smp:Unet", small, 5), teacher, terms).eval()
    labels = torch.randint(0, 5, (2, 64, 64))
    losses = []
    for take in (False, True):
        if take:
            distiller.take_path(TeacherPath(dtype, folded, channels_last), IMAGES)
        torch.manual_seed(1)
        losses.append(distiller(IMAGES, labels).loss.item())
    assert distiller.teacher is teacher
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if dtype == BF16 else 1e-4)
    assert (losses[0] != losses[1]) == (dtype == BF16) or dtype == FP32
    assert bool(distiller._folded) == folded


def test_a_distiller_takes_what_it_found_best(monkeypatch):
    distiller = Distiller(
        nn.Conv2d(3, 4, 1), smooth_teacher(), {"kd": Term(KDLoss(), 1, teacher="logits", student="logits")}
    )
    monkeypatch.setattr("gskd.distiller.best_path", lambda trials: TeacherPath(BF16, True, True))
    trials = distiller.probe_teacher(IMAGES)
    assert len(trials) == 8
    assert distiller.teacher_path == TeacherPath(BF16, True, True)
    seen = []
    distiller._folded[0].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    distiller(IMAGES, torch.zeros(2, 64, 64, dtype=torch.int64))
    assert seen[0][0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0][1].dtype == BF16


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8)])
def test_images_of_another_kind_are_refused(images):
    kd = Term(KDLoss(), 1, teacher="logits", student="logits")
    with pytest.raises(GSKDError, match="images: expected"):
        Distiller(nn.Conv2d(3, 4, 1), smooth_teacher(), {"kd": kd}).probe_teacher(images)


def prefer(path, monkeypatch):
    """Timing decides nothing in a test."""
    monkeypatch.setattr("gskd.distiller.best_path", lambda trials: path)


def test_a_run_takes_what_it_was_begun_with_again(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    begun = TeacherPath(BF16, True, False)
    prefer(begun, monkeypatch)
    said = gskd_ok("distill", tiny.recipe, f"output={tmp_path / 'whole'}", "teacher.precision=auto").out
    assert "teacher in fp32: " in said
    assert "the teacher runs in bf16, folded" in said
    kill_at(3, monkeypatch, "distill", tiny.recipe, f"output={run}", "teacher.precision=auto")
    assert json.loads((run / "run.json").read_text())["teacher_path"] == ["bf16", True, False]
    prefer(TeacherPath(FP32, False, False), monkeypatch)  # as on a machine that is faster otherwise
    said = gskd_ok("distill", tiny.recipe, f"output={run}", "teacher.precision=auto", "--resume").out
    assert "the teacher runs in bf16, folded" in said
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow  # probes three times
def test_a_cache_is_filled_on_the_fastest_path(tiny, tmp_path, monkeypatch):
    prefer(TeacherPath(BF16, True, True), monkeypatch)
    cache = [f"teacher.cache={tmp_path / 'cache'}", "augment.views=2", "teacher.precision=auto"]
    assert "the teacher runs in bf16, folded, channels_last" in gskd_ok("cache", "build", tiny.recipe, *cache).out
    said = gskd_ok("distill", tiny.recipe, f"output={tmp_path / 'run'}", *cache).out
    assert "the teacher runs" not in said  # as it does not
    gskd_ok("cache", "verify", tiny.recipe, *cache)
    prefer(TeacherPath(FP32, False, False), monkeypatch)  # as another machine, or another moment, would find
    gskd_ok("cache", "verify", tiny.recipe, *cache)
    next((tmp_path / "cache").glob("*/*.safetensors")).unlink()
    said = gskd_ok("cache", "build", tiny.recipe, *cache).out
    assert "the teacher runs in bf16, folded, channels_last" in said  # as what is there was made
