"""Every mistake a person can make ends in exit code 2 and one line that names it, and costs no file."""

import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from helpers import assert_refused, gskd, gskd_ok, snapshot, write_recipe

FOLDER = "data.dataset=folder data.options={classes:[a,b]} train.steps=3 data.root=@/"
"""Six pictures and six masks of two classes; each copy of them has another fault. Three steps of 4 read them all."""


@dataclass(frozen=True)
class World:
    """A folder with a good recipe, a good teacher, and much that is broken."""

    folder: Path
    before: dict[str, str]

    def arguments(self, text: str) -> list[str]:
        """Words of a line; ``@`` stands for the folder and ``~`` for a space."""
        return [word.replace("@", str(self.folder)).replace("~", " ") for word in text.split()]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny.teacher, folder / "teacher")
    write_recipe(folder / "r.yaml", folder / "never", teacher={"run": str(folder / "teacher")}, terms={"kd": {}})
    (folder / "bad.yaml").write_text("train: [unclosed")
    (folder / "list.yaml").write_text("- output")
    (folder / "file").write_text("a file")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("the only copy")
    (folder / "score.json").write_text("{}")
    (folder / "photo.png").write_bytes(b"no png")
    (folder / "empty").mkdir()
    _copies_of_the_teacher(folder)
    _datasets(folder)
    return World(folder, snapshot(folder))


def _copies_of_the_teacher(folder: Path) -> None:
    weights = (folder / "teacher" / "student.safetensors").read_bytes()
    for name in ("truncated", "text", "weightless", "classes"):
        shutil.copytree(folder / "teacher", folder / name)
    (folder / "truncated" / "student.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "text" / "student.safetensors").write_text("PK not safetensors")
    (folder / "weightless" / "student.safetensors").unlink()
    info = json.loads((folder / "classes" / "run.json").read_text())
    info |= {"classes": ["road", "sky"], "palette": info["palette"][:2]}
    (folder / "classes" / "run.json").write_text(json.dumps(info))
    (folder / "pickle.pt").write_bytes(b"\x80\x04.")


def _datasets(folder: Path) -> None:
    def pairs(name: str) -> tuple[Path, Path]:
        random = np.random.default_rng(0)
        for split in ("train", "val"):
            images, masks = (folder / name / kind / split for kind in ("images", "masks"))
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(images / f"{i}.png")
                Image.fromarray(random.integers(0, 2, (32, 32), np.uint8)).save(masks / f"{i}.png")
        return folder / name / "images" / "train" / "3.png", folder / name / "masks" / "train" / "3.png"

    pairs("good")
    pairs("maskless")[1].unlink()
    Image.new("L", (32, 31)).save(pairs("sizes")[1])
    Image.new("L", (32, 32), 7).save(pairs("labels")[1])
    Image.new("RGB", (32, 32)).save(pairs("colours")[1])
    image = pairs("cut")[0]
    image.write_bytes(image.read_bytes()[:900])
    pairs("words")[0].write_text("a text file in a picture's clothes")
    mask = pairs("cutmask")[1]
    mask.write_bytes(mask.read_bytes()[:60])


BEFORE_TRAINING = {
    # the recipe and its overrides
    "unknown key": ("train @/r.yaml train.stepz=5", "unknown key train.stepz; did you mean 'steps'"),
    "wrong type": ("train @/r.yaml train.steps=many", "train.steps: expected a whole number, found 'many'"),
    "several": ("train @/r.yaml train.steps=0 sead=1", "train.steps: expected more than 0"),
    "no key=value": ("train @/r.yaml steps", "override 'steps': expected key=value"),
    "no recipe": ("train @/nothing.yaml", "nothing.yaml: no such file"),
    "near name": ("train scene", "did you mean 'scenes'"),
    "not yaml": ("train @/bad.yaml", "bad.yaml: not valid YAML"),
    "a list": ("train @/list.yaml", "found a list"),
    "a folder": ("train @", "no such file"),
    "accumulate": ("train @/r.yaml train.accumulate=3", "train.batch: 4 images do not divide into train.accumulate 3"),
    "fp16 on cpu": (
        "train @/r.yaml train.precision=fp16 train.device=cpu",
        "fp16 needs a CUDA device",
    ),
    # the command itself
    "no command of this name": ("trian @/r.yaml", "No such command 'trian'. Did you mean 'train'?; see gskd --help"),
    "no recipe at all": ("train", "Missing argument 'RECIPE'; see gskd train --help"),
    "no such option": (
        "train @/r.yaml --resum",
        "No such option: --resum (Possible options: --resume); see gskd train",
    ),
    "option without value": ("eval @/teacher --split", "Option '--split' requires an argument"),
    "a name too long": (f"train {'n' * 300}", "n: File name too long"),
    "a run too long": (f"eval @/{'n' * 300}", "n/recipe.yaml: File name too long"),
    "an output too long": (f"predict @/teacher @/photo.png -o @/{'n' * 300}", "n: File name too long"),
    "no such picture": ("predict @/teacher @/r.yaml -o @/p --write blue", "'blue' is not one of 'index', 'colour'"),
    # models, layers, losses
    "model": ("train @/r.yaml model.name=smp:Unett", "unknown architecture; did you mean 'Unet'"),
    "source": ("train @/r.yaml model.name=Unet", "expected smp:Architecture or package.module:callable"),
    "untrusted": ("train @/r.yaml model.name=nowhere.models:f", "nowhere.models:f is Python code that would be run"),
    "module": ("train @/r.yaml model.name=nowhere.models:f --allow-imports", "cannot import nowhere.models"),
    "encoder": ("train @/r.yaml model.args.encoder_name=resnet19", "unknown encoder 'resnet19'; did you mean"),
    "model arg": ("train @/r.yaml model.args.depth=3", "depth"),
    "weights": ("train @/r.yaml model.weights=@/none.safetensors", "none.safetensors: no such file"),
    "other weights": ("train @/r.yaml model.weights=@/teacher", "do not fit Unet"),
    "layer": ("distill @/r.yaml terms.kd.student=decodr", "decodr"),
    "teacher layer": ("distill @/r.yaml terms.kd.teacher=nose", "nose"),
    "loss": ("distill @/r.yaml terms.gksd.weight=1", "unknown loss 'gksd'; did you mean 'gskd'"),
    "loss arg": ("distill @/r.yaml terms.kd.args.temprature=2", "no argument 'temprature'; did you mean 'temperature'"),
    "loss value": ("distill @/r.yaml terms.kd.args.temperature=-1", "temperature: expected a number > 0, got -1"),
    "loss type": (
        "distill @/r.yaml terms.kd.args.temperature=hot",
        "terms.kd.args: temperature: expected a number > 0",
    ),
    # the teacher
    "no teacher": ("distill @/r.yaml teacher=null", "distill: the recipe names no teacher"),
    "no terms": ("distill @/r.yaml terms.kd=null", "distill: the recipe names no terms"),
    "teacher missing": ("distill @/r.yaml teacher.run=@/nope", "nope: holds no recipe.yaml"),
    "teacher truncated": (
        "distill @/r.yaml teacher.run=@/truncated",
        "not a whole safetensors file",
    ),
    "teacher text": ("distill @/r.yaml teacher.run=@/text", "not a whole safetensors file"),
    "teacher without weights": ("distill @/r.yaml teacher.run=@/weightless", "weightless: has no scored weights yet"),
    "random teacher": (
        "distill @/r.yaml teacher={model:~{name:~'smp:Unet',~args:~{encoder_weights:~null}}}",
        "teacher.model.weights: missing",
    ),
    "teacher's classes": ("distill @/r.yaml teacher.run=@/classes", "was trained on 2 classes ['road', 'sky']"),
    "pickle": (
        "distill @/r.yaml teacher={model:~{name:~'smp:Unet',~args:~{encoder_weights:~null},~weights:~@/pickle.pt}}",
        "pickle.pt: not a whole safetensors file",
    ),
    "teacher's architecture": (
        "distill @/r.yaml teacher={model:~{name:~'smp:FPN',~args:~{encoder_name:~tu-mobilenetv3_small_050,"
        "~encoder_weights:~null},~weights:~@/teacher/student.safetensors}}",
        "do not fit FPN",
    ),
    "teacher's head": (
        "distill @/r.yaml teacher={model:~{name:~'smp:Unet',~args:~{encoder_weights:~null,~classes:~5},"
        "~weights:~@/teacher}}",
        "args.classes is 5, the data has 11",
    ),
    # the output
    "another run": ("train @/r.yaml output=@/teacher", "teacher: holds another run"),
    "foreign files": ("train @/r.yaml output=@/foreign", "foreign: expected a new or empty folder"),
    "resume foreign": ("train @/r.yaml output=@/foreign --resume", "foreign: expected a new or empty folder"),
    "a file": ("train @/r.yaml output=@/file", "file: expected a new or empty folder"),
    "below a file": ("train @/r.yaml output=@/file/run", "file/run: cannot be made: Not a directory"),
    # the data
    "dataset": ("train @/r.yaml data.dataset=camvit", "dataset 'camvit' is unknown; did you mean 'camvid'"),
    "option": ("train @/r.yaml data.options.sise=5", "has no option 'sise'; did you mean 'size'"),
    "split": ("train @/r.yaml data.val=vall", "unknown split 'vall'; did you mean 'val'"),
    "no root": ("train @/r.yaml data.dataset=camvid data.options={}", "needs a root"),
    "root missing": (f"train @/r.yaml {FOLDER}nowhere", "nowhere does not exist"),
    "root empty": (f"train @/r.yaml {FOLDER}empty", "empty/images does not exist"),
    "camvid elsewhere": ("train @/r.yaml data.dataset=camvid data.options={} data.root=@/good", "good/train"),
    "no mask": (f"train @/r.yaml {FOLDER}maskless", "1 of 6 images without a mask"),
    # eval and predict
    "no run": ("eval @/foreign", "foreign: holds no recipe.yaml"),
    "eval split": ("eval @/teacher --split train2", "unknown split 'train2'"),
    "eval key": ("eval @/teacher eval.flips=true", "unknown key eval.flips; did you mean 'flip'"),
    "eval weights": ("eval @/truncated", "not a whole safetensors file"),
    "eval classes": (f"eval @/teacher {FOLDER}good", "was trained on 11 classes"),
    "json there": ("eval @/teacher --json @/score.json", "score.json: exists already"),
    "json nowhere": ("eval @/teacher --json @/no/score.json", "no is no folder"),
    "image missing": ("predict @/teacher @/no.png -o @/out", "no.png: no such file or folder"),
    "folder empty": ("predict @/teacher @/empty -o @/out", "empty: no image in this folder"),
    "same name": ("predict @/teacher @/good/images/train @/good/images/val -o @/out", "would both be written as 0"),
    "predict full": ("predict @/teacher @/good/images/val -o @/foreign", "foreign: expected a new or empty folder"),
    "predict below a file": ("predict @/teacher @/good/images/val -o @/file/out", "file/out: cannot be written"),
    "predict no run": ("predict @/empty @/good/images/val -o @/out", "empty: holds no recipe.yaml"),
    # demo
    "demo key": ("demo -o @/out train.stepz=5", "unknown key train.stepz"),
    "demo elsewhere": ("demo -o @/foreign", "foreign: holds thesis.tex; expected a new folder"),
    "demo over a run": ("demo -o @/teacher", "teacher: holds checkpoints, metrics.jsonl"),
    # comparisons
    "no comparison": ("compare compare_scene", "no comparison of this name is shipped; did you mean 'compare_scenes'"),
    "compare elsewhere": ("compare compare_scenes output=@/foreign", "foreign: holds no comparison but thesis.tex"),
    "compare over a run": ("compare compare_scenes output=@/teacher", "teacher: holds no comparison but checkpoints"),
    "demo below a file": ("demo -o @/file", "file/teacher: cannot be made: Not a directory"),
}


@pytest.mark.parametrize("case", BEFORE_TRAINING)
def test_refused_before_anything_is_written(world, case, record_property):
    line, part = BEFORE_TRAINING[case]
    refused = gskd(*world.arguments(line))
    record_property("fault", (case, refused.code, refused.err.strip().replace(str(world.folder), "")))
    assert_refused(refused, part)
    assert snapshot(world.folder) == world.before


def test_a_crop_that_only_the_teacher_cannot_take(tmp_path):
    """It used to be found while the layers were looked at, by a traceback."""
    args = {
        "encoder_name": "resnet18",
        "encoder_weights": None,
        "decoder_channels": 8,
        "decoder_atrous_rates": [1, 1, 1],
    }
    teacher = tmp_path / "teacher"
    recipe = write_recipe(tmp_path / "t.yaml", teacher, model={"name": "smp:DeepLabV3Plus", "args": args})
    gskd_ok("train", recipe, "train.steps=1")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", teacher={"run": str(teacher)}, terms={"kd": {}})
    refused = gskd("distill", recipe, "augment.crop=[47,61]")
    assert_refused(refused, "teacher", "cannot run on an image of (1, 3, 47, 61)")
    assert not (tmp_path / "run").exists()


def test_all_mistakes_in_one_line(world):
    assert_refused(gskd(*world.arguments(BEFORE_TRAINING["several"][0])), "train.steps", "sead")


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "sizes": ("masks/train/3.png", "the mask is 32 x 31", "is 32 x 32"),
        "labels": ("masks/train/3.png", "label values outside the 2 classes", "7 in 1024 pixels"),
        "colours": ("masks/train/3.png", "the mask is RGB, expected one channel"),
        "cut": ("images/train/3.png", "not a readable image"),
        "words": ("images/train/3.png", "not a readable image"),
        "cutmask": ("masks/train/3.png", "not a readable mask"),
    }.items(),
)
def test_bad_files_stop_training_with_their_name_and_data_check_finds_them(world, tmp_path, name, parts):
    arguments = world.arguments(f"@/r.yaml {FOLDER}{name}")
    assert_refused(gskd("train", *arguments, f"output={tmp_path / 'run'}"), *parts)
    checked = gskd("data", "check", *arguments)
    assert_refused(checked, "1 problem in 12 samples")
    assert all(part in checked.out for part in parts)
    assert snapshot(world.folder) == world.before


def test_a_loader_process_reports_in_one_line_too(world, tmp_path):
    arguments = world.arguments(f"@/r.yaml {FOLDER}labels data.workers=1")
    refused = gskd("train", *arguments, f"output={tmp_path / 'run'}")
    assert_refused(refused, "labels/masks/train/3.png: label values outside")
    assert refused.err.startswith(f"gskd: {world.folder}")
    # They ignore SIGTERM: at exit Python would ask them to end and wait for ever.
    assert multiprocessing.active_children() == []


def test_good_pairs_are_no_mistake(world, tmp_path):
    """Else the table above might be refused for what its cases have in common."""
    gskd_ok("train", *world.arguments(f"@/r.yaml {FOLDER}good"), f"output={tmp_path / 'run'}")
    gskd_ok("data", "check", *world.arguments(f"@/r.yaml {FOLDER}good"))


def test_an_unreadable_image_among_those_to_predict(world, tmp_path):
    refused = gskd(*world.arguments("predict @/teacher @/photo.png"), "-o", tmp_path / "out")
    assert_refused(refused, "photo.png: not a readable image")


def test_a_split_without_labels_still_trains(world, tmp_path):
    root = tmp_path / "void"
    shutil.copytree(world.folder / "good", root)
    for mask in (root / "masks" / "val").iterdir():
        Image.new("L", (32, 32), 255).save(mask)
    arguments = world.arguments(f"@/r.yaml {FOLDER}good")
    gskd_ok("train", *arguments, f"data.root={root}", f"output={tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best"]["val"]["miou"] is None
    gskd_ok("eval", tmp_path / "run")
    assert_refused(gskd("data", "check", *arguments, f"data.root={root}"), "1 problem in 12 samples")


def test_data_without_any_label_stop_the_training(world, tmp_path):
    root = tmp_path / "void"
    shutil.copytree(world.folder / "good", root)
    for mask in root.rglob("masks/*/*.png"):
        Image.new("L", (32, 32), 255).save(mask)
    arguments = world.arguments(f"@/r.yaml {FOLDER}good")
    refused = gskd("train", *arguments, f"data.root={root}", "train.steps=30", f"output={tmp_path / 'run'}")
    assert_refused(refused, "is a pixel labelled?")


@pytest.mark.parametrize("victim", ["step-00000004", "student.safetensors", "metrics.jsonl", "result.json", "run.json"])
def test_a_full_disk(world, tmp_path, monkeypatch, victim):
    """What was written before stays valid, and once there is room the run goes on to the same end."""
    import builtins

    from gskd import models

    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save, open_ = models.save_file, builtins.open

    def save_file(tensors, path, metadata=None):
        if victim in str(path):
            Path(path).write_bytes(b"half")
            raise full()
        save(tensors, path, metadata)

    def open_file(path, mode="r", *rest, **named):
        if victim in str(path) and mode[0] in "wa":
            raise full()
        return open_(path, mode, *rest, **named)

    run = tmp_path / "run"
    arguments = [*world.arguments("@/r.yaml"), f"output={run}"]
    with monkeypatch.context() as patched:
        patched.setattr(models, "save_file", save_file)
        patched.setattr(builtins, "open", open_file)
        assert_refused(gskd("distill", *arguments), victim, "cannot be written: No space left on device")
    assert not list(run.rglob("*.partial"))
    for weights in run.rglob("*.safetensors"):
        load_file(weights)
    if victim == "run.json":
        assert list(run.iterdir()) == []  # nothing in the way of another try
    else:
        gskd_ok("distill", *arguments, "--resume")
        assert (run / "result.json").is_file()
