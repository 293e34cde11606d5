"""Stored teacher targets: the loss from them is the loss with the teacher; what is stale or damaged is never used."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch import nn

from gskd import Distiller, GSKDLoss, KDLoss, MSELoss, Term
from gskd.architectures import build_model
from gskd.cache import CacheSource, _content_hash, code_stamp
from gskd.data.datasets import open_dataset
from gskd.data.layouts import folder_pairs
from gskd.data.legend import make_legend
from gskd.losses import Pixels, PSDLoss, TopKDLoss
from helpers import TERMS, assert_refused, assert_same_run, gskd, gskd_ok, recipe_tree, snapshot, spawn, steps
from test_distiller import Net

SAMPLES, VIEWS = 20, 13


@pytest.fixture
def recipe(tiny, tmp_path) -> Path:
    """Three shards, for all the usual terms."""
    return write(tmp_path, tiny.teacher)


def write(folder: Path, teacher: Path, **changes) -> Path:
    tree = recipe_tree(folder / "run", terms=TERMS, teacher={"run": str(teacher), "cache": str(folder / "cache")})
    tree["data"]["options"]["length"] = SAMPLES
    tree["augment"]["views"] = VIEWS
    for key, value in changes.items():
        tree[key] |= value
    path = folder / "cached.yaml"
    path.write_text(json.dumps(tree))
    return path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/*/*.safetensors"))


# The targets


@pytest.mark.parametrize(
    "arguments",
    [{}, {"group_size": 3}, {"only_correct": False, "policy": "mask"}, {"sampling": "uniform"}, {"max_classes": 2}],
    ids=str,
)
def test_gskd_from_a_packed_target_is_gskd_with_the_teacher(arguments):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, 8, 12), torch.randn(3, 9, 16, 24)
    logits = torch.randn(3, 5, 16, 24)
    labels = logits.argmax(1)
    labels[:, :4] = 255
    labels[2] = 255  # an image without a point
    pixels, loss = Pixels(labels, logits), GSKDLoss(samples_per_class=4, **arguments)
    torch.manual_seed(1)
    expected = loss(student, teacher, pixels)
    torch.manual_seed(1)
    packed = loss.pack(loss.target(teacher, pixels))
    assert all(len(value) == 3 for value in packed.values())
    assert packed["similarity"].dtype == torch.float16
    student.requires_grad_()
    found = loss.compare(student, loss.unpack(packed), Pixels(labels, num_classes=5))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)
    assert expected > 0
    assert student.grad[:2].abs().sum() > 0


def test_a_distiller_gives_the_same_from_stored_targets_without_its_teacher():
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 16, 24), torch.randint(0, 4, (2, 16, 24))
    terms = {
        "kd": Term(KDLoss(), 1, "logits", "logits"),
        "top": Term(TopKDLoss(2), 1, "logits", "logits"),
        "mse": Term(MSELoss(student_channels=5, teacher_channels=8), 2, "body", "body"),
        "psd": Term(PSDLoss(), 3, ("body.0", "body"), ("body.0", "body")),
        "gskd": Term(GSKDLoss(samples_per_class=3), 10, "body", "body"),
    }
    distiller = Distiller(Net(5).eval(), Net(8), terms)
    torch.manual_seed(1)
    live = distiller(images, labels)
    torch.manual_seed(1)
    targets = distiller.teacher_targets(images, labels)
    ran = []
    distiller.teacher.register_forward_hook(lambda *_: ran.append(1))
    stored = distiller(images, labels, targets=targets)
    assert not ran
    for name in terms:
        torch.testing.assert_close(stored.terms[name].raw, live.terms[name].raw, rtol=2e-3, atol=1e-6)
    stored.loss.backward()
    assert distiller.student.body[0].weight.grad.abs().sum() > 0


def test_points_do_not_depend_on_the_terms_that_stand_beside():
    images, labels = torch.randn(2, 3, 16, 24), torch.randint(0, 4, (2, 16, 24))

    def points(*counts: int) -> torch.Tensor:
        terms = {f"gskd{n}": Term(GSKDLoss(samples_per_class=n, only_correct=False), 1, "body", "body") for n in counts}
        torch.manual_seed(0)
        return Distiller(Net(5), Net(8), terms).teacher_targets(images, labels, seed=3)["gskd4"]["index"]

    assert torch.equal(points(4), points(9, 4))


def test_a_teacher_in_bf16_is_stored_as_it_is():
    images, labels = torch.randn(2, 3, 16, 24), torch.randint(0, 4, (2, 16, 24))
    terms = {"mse": Term(MSELoss(student_channels=5, teacher_channels=8), 2, "body", "body")}
    distiller = Distiller(Net(5).eval(), Net(8), terms, teacher_dtype=torch.bfloat16)
    assert distiller.teacher_targets(images, labels)["mse"]["0"].dtype == torch.bfloat16
    live = distiller(images, labels).loss
    assert torch.equal(distiller(images, labels, targets=distiller.teacher_targets(images, labels)).loss, live)


def test_a_map_too_large_for_fp16_is_an_error_and_no_infinity():
    teacher = Net(8)
    teacher.body[1].weight.data.fill_(1e6)
    terms = {"mse": Term(MSELoss(student_channels=5, teacher_channels=8), 2, "body", "body")}
    with pytest.raises(ValueError, match="'body' is not finite, or too large to store as fp16"):
        Distiller(Net(5), teacher, terms).teacher_targets(torch.randn(2, 3, 16, 24), torch.zeros(2, 16, 24).long())


# Runs


def test_a_run_from_the_cache_is_that_with_the_teacher(recipe, tmp_path, monkeypatch):
    live = gskd_ok("distill", recipe, "teacher.cache=null", f"output={tmp_path / 'live'}")
    assert "views to make" not in live.out
    said = gskd_ok("distill", recipe).out
    assert f"{SAMPLES * VIEWS} views to make" in said
    first = [steps(tmp_path / folder)[0]["terms"] for folder in ("live", "run")]
    assert first[0]["task"] == first[1]["task"]
    for term in ("kd", "mse"):  # gskd drew other points, and what is drawn after it is another draw
        assert first[1][term]["raw"] == pytest.approx(first[0][term]["raw"], rel=2e-3)
    # Again, from what is there, loaded by workers.
    monkeypatch.setattr(CacheSource, "targets", None)
    again = gskd_ok("distill", recipe, f"output={tmp_path / 'again'}", "data.workers=1")
    assert "to make" not in again.out
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_a_killed_run_goes_on_from_the_cache_to_the_same_end(recipe, tmp_path):
    gskd_ok("distill", recipe)
    folder = tmp_path / "half"
    gskd_ok("distill", recipe, f"output={folder}")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    (folder / "result.json").unlink()
    gskd_ok("distill", recipe, f"output={folder}", "--resume")
    assert_same_run(tmp_path / "run", folder)


def test_build_and_verify(recipe, tmp_path):
    built = gskd_ok("cache", "build", recipe)
    assert built.out.count(f"{SAMPLES * VIEWS} views to make") == 3  # gskd, and the maps of kd and of mse and memory
    kinds = {path.parent.name.split("-")[0] for path in shards(tmp_path)}
    assert kinds == {"gskd", "maps"}
    before = snapshot(tmp_path / "cache")
    assert "to make" not in gskd_ok("cache", "build", recipe).out
    verified = gskd_ok("cache", "verify", recipe)
    assert "gskd.similarity of shard 00000: 0\n" in verified.out
    assert snapshot(tmp_path / "cache") == before


def test_verify_finds_values_of_another_teacher(recipe, tmp_path):
    gskd_ok("cache", "build", recipe)
    victim = next(path for path in shards(tmp_path) if "gskd" in path.parent.name)
    tensors = load_file(victim)
    data = save({**tensors, "similarity": -tensors["similarity"]}, {"place": f"{victim.parent.name}/00000"})
    victim.unlink()
    victim.with_name(f"00000-{_content_hash(data)}.safetensors").write_bytes(data)
    assert_refused(gskd("cache", "verify", recipe), "gskd.similarity of shard 00000 is off by")


def test_verify_makes_nothing(recipe, tmp_path):
    assert_refused(gskd("cache", "verify", recipe), "shards are missing")
    gskd_ok("cache", "build", recipe)
    flip(shards(tmp_path)[0])
    assert_refused(gskd("cache", "verify", recipe), "1 shards are missing, first 00000")


def test_a_shard_in_the_place_of_another_is_refused(recipe, tmp_path):
    gskd_ok("cache", "build", recipe)
    first, second, *_ = (path for path in shards(tmp_path) if "gskd" in path.parent.name)
    first.rename(first.with_name(f"00001{first.name[5:]}"))
    second.rename(second.with_name(f"00000{second.name[5:]}"))
    assert_refused(gskd("distill", recipe), "was made for another place")
    # Before anything is made or trained: a comparison would find out once for each of its runs.
    assert_refused(gskd("cache", "build", recipe), "was made for another place")


def test_of_two_files_for_a_shard_the_whole_one_is_used(recipe, tmp_path):
    gskd_ok("cache", "build", recipe)
    before = snapshot(tmp_path / "cache")
    victim = shards(tmp_path)[0]
    for name in ("0" * 16, "f" * 16):
        victim.with_name(f"00000-{name}.safetensors").write_bytes(b"damaged")
    assert gskd_ok("cache", "build", recipe).out.count("is damaged and removed") == 2
    assert snapshot(tmp_path / "cache") == before


def test_what_a_kill_left_behind_goes(recipe, tmp_path):
    gskd_ok("cache", "build", recipe)
    before = snapshot(tmp_path / "cache")
    left = [shards(tmp_path)[0].with_name(f"00000.{name}.partial") for name in ("old", "new")]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[0], (0, 0))
    gskd_ok("cache", "build", recipe)
    assert not left[0].exists()
    assert left[1].exists()  # perhaps another process is at it
    left[1].unlink()
    assert snapshot(tmp_path / "cache") == before


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_folder_that_cannot_be(recipe, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / ("" if place == "a file" else "cache")
    assert_refused(gskd("distill", recipe, f"teacher.cache={folder}"), f"cache {folder}", "Not a directory")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "run").exists()


# Stale, damaged, interrupted, too large


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b""), Path.unlink],
    ids=["a bit", "cut", "empty", "gone"],
)
def test_a_damaged_shard_is_named_and_made_again(recipe, tmp_path, damage):
    gskd_ok("cache", "build", recipe)
    before = snapshot(tmp_path / "cache")
    victim = shards(tmp_path)[1]
    damage(victim)
    said = gskd_ok("distill", recipe).out
    assert (f"{victim.name}: is damaged and removed" in said) == (damage is not Path.unlink)
    assert snapshot(tmp_path / "cache") == before


def test_anything_else_is_another_cache(recipe, tiny, tmp_path):
    gskd_ok("cache", "build", recipe)
    before = snapshot(tmp_path / "cache")
    other = tmp_path / "other"
    shutil.copytree(tiny.teacher, other)
    weights = load_file(other / "student.safetensors")
    key = next(key for key in weights if key.endswith("weight"))
    weights[key].view(-1)[0] += 1e-3
    save_file(weights, other / "student.safetensors", metadata={"step": "4"})
    for change in (
        f"teacher.run={other}",
        "augment.flip=0.25",
        "augment.views=3",
        "teacher.precision=bf16",
        "data.options.seed=1",
        "terms.gskd.args.samples_per_class=5",
    ):
        assert "to make" in gskd_ok("cache", "build", recipe, change).out, change
    # None of this matters to the teacher.
    for same in ("seed=3", "terms.gskd.args.temperature=0.5", "terms.kd.weight=7", "train.steps=5", "terms.mse=null"):
        assert "to make" not in gskd_ok("cache", "build", recipe, same).out, same
    after = snapshot(tmp_path / "cache")
    assert {name: after.get(name) for name in before} == before


def test_another_code_of_the_teacher_is_another_cache(tmp_path, monkeypatch):
    """Weights and name are the same; libraries count by their version, code of one's own by its file."""
    monkeypatch.syspath_prepend(tmp_path)
    source = "import torch.nn as nn\nclass Mine(nn.Module):\n    def forward(self, x):\n        return {}x\n"
    stamps = []
    for sign in ("", "-", ""):
        (tmp_path / "my_teacher.py").write_text(source.format(sign))
        sys.modules.pop("my_teacher", None)
        importlib.invalidate_caches()
        stamps.append(code_stamp(nn.Sequential(importlib.import_module("my_teacher").Mine(), nn.ReLU())))
    sys.modules.pop("my_teacher")
    assert stamps[0] == stamps[2] != stamps[1]
    assert stamps[0]["torch"] == torch.__version__
    built = code_stamp(build_model("smp:Unet", {"encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None}))
    assert set(built) == {"segmentation_models_pytorch", "timm", "torch"}


def test_the_stamp_of_files_is_of_their_bytes(tmp_path, tiny):
    """Not of their times: copied to another disk they are the same data, edited in place they are not."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for name in "ab":
            Image.new("RGB" if kind == "images" else "L", (8, 8)).save(tmp_path / kind / f"{name}.png")

    def stamp(**options) -> str:
        return folder_pairs(tmp_path / "images", tmp_path / "masks", make_legend(("x", "y"), **options)).stamp()

    first = stamp()
    assert stamp() == first
    assert stamp(ignore_values=(1,)) != first
    for path in tmp_path.glob("*/*.png"):
        os.utime(path, (1, 1))
    assert stamp() == first
    mask = tmp_path / "masks" / "b.png"
    content = mask.read_bytes()
    mask.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(mask, (1, 1))
    assert stamp() != first
    scenes = [open_dataset("scenes", None, "train", {"seed": seed}).stamp() for seed in (0, 0, 1)]
    assert scenes[0] == scenes[1] != scenes[2]


def test_what_is_too_large_is_refused_before_anything_is_written(recipe, tmp_path):
    refused = gskd("distill", recipe, "teacher.cache_gib=1e-4")
    assert_refused(refused, "cache", "MiB beside the 0.0 MiB", "expected at most teacher.cache_gib, 0.1 MiB")
    assert not shards(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_what_was_whole(recipe, tmp_path, monkeypatch):
    replace, room = os.replace, [4]

    def full(source, target):
        if "cache" in str(target):
            room[0] -= 1
            if room[0] < 0:
                raise OSError(28, os.strerror(28))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert_refused(gskd("cache", "build", recipe), "cannot be written: No space left on device")
    assert 0 < len(shards(tmp_path)) < 4
    assert not list((tmp_path / "cache").rglob("*.partial"))
    gskd_ok("cache", "build", recipe)


def test_fixed_views_must_be_asked_for(recipe):
    assert_refused(gskd("distill", recipe, "augment.views=null"), "augment.views: missing; teacher.cache holds fixed")
    assert_refused(gskd("distill", recipe, "augment.views=0"), "augment.views: expected at least 1")
    assert_refused(
        gskd("cache", "build", recipe, "teacher.cache=null"), "expected a recipe with terms and teacher.cache"
    )


def test_two_builders_and_a_kill(recipe, tiny, tmp_path):
    """One is killed midway, two go on side by side: what they make is what one alone makes."""
    alone = tmp_path / "alone"
    alone.mkdir()
    more = ["data.options.length=100"]
    gskd_ok("cache", "build", write(alone, tiny.teacher), *more)
    victim = spawn("cache", "build", recipe, *more)
    deadline = time.monotonic() + 90
    while len(shards(tmp_path)) < 2 and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert 2 <= len(shards(tmp_path)) < len(shards(alone))
    builders = [spawn("cache", "build", recipe, *more) for _ in range(2)]
    for builder in builders:
        try:
            _, err = builder.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            builder.kill()
            raise
        assert builder.returncode == 0, err
    gskd_ok("cache", "build", recipe, *more)

    def made(folder: Path) -> dict[str, bytes]:
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in shards(folder)}

    assert made(tmp_path) == made(alone)


@pytest.mark.slow  # a grid of three runs
def test_a_comparison_makes_one_cache_for_all(tiny, tmp_path):
    base = write(tmp_path, tiny.teacher, train={"steps": 2})
    tree = {
        "output": str(tmp_path / "compared"),
        "base": str(base),
        "baseline": "plain",
        "equal_seconds": "off",
        "variants": {
            "plain": {"terms": {}},
            "kd": {"terms": {"kd": TERMS["kd"]}},
            "both": {"terms": {"kd": TERMS["kd"], "gskd": TERMS["gskd"]}},
        },
    }
    file = tmp_path / "compare.yaml"
    file.write_text(json.dumps(tree))
    said = gskd_ok("compare", file).out
    assert said.count("views to make") == 2  # of kd and of gskd, each once
    logs = list((tmp_path / "compared" / "runs").glob("*/*.log"))
    assert len(logs) == 3
    assert not [log for log in logs if "views to make" in log.read_text()]
    assert {path.parent.name.split("-")[0] for path in shards(tmp_path)} == {"gskd", "maps"}
