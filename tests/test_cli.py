"""The command line, end to end, on runs of a few steps."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from gskd import __version__
from gskd.architectures import build_model
from gskd.data.legend import shipped_legend
from gskd.losses import LOSSES
from gskd.recipe import load_recipe
from helpers import (
    STEPS,
    TINY_UNET,
    assert_refused,
    assert_same_run,
    assert_same_tensors,
    gskd,
    gskd_ok,
    records,
    scores,
    snapshot,
    spawn,
    steps,
    write_recipe,
)

CAMVID = shipped_legend("camvid")
SHIPPED = [
    "scenes",
    "scenes_teacher",
    "scenes_long",
    "scenes_long_teacher",
    "camvid_teacher",
    "camvid_student",
    "camvid_gskd",
    "cityscapes_r101_r18",
]


# --- train and distill ---


def test_a_run_folder_holds_everything(tiny):
    files = {path.name for path in tiny.distilled.iterdir()}
    assert files == {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "student.safetensors", "result.json"}
    recipe = load_recipe(tiny.distilled / "recipe.yaml")
    assert (recipe.output, recipe.train.steps, recipe.train.momentum) == (str(tiny.distilled), STEPS, 0.9)
    assert recipe.data.test == "test"  # the override is part of it
    info = json.loads((tiny.distilled / "run.json").read_text())
    assert (info["kind"], info["classes"]) == ("distill", list(CAMVID.classes))
    assert json.loads((tiny.plain / "run.json").read_text())["kind"] == "train"
    assert info["palette"] == CAMVID.palette.tolist()
    assert set(info["environment"]["versions"]) >= {"gskd", "torch", "timm"}
    assert [path.name for path in sorted((tiny.distilled / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000004",
    ]


def test_metrics_have_every_step_with_raw_and_weighted_terms(tiny):
    done = steps(tiny.distilled)
    assert [record["step"] for record in done] == [1, 2, 3, 4]
    for record in done:
        assert set(record) == {"step", "loss", "terms", "lr", "seconds_per_step", "images_per_s"}
        assert list(record["terms"]) == ["task", "gskd", "kd", "mse", "memory"]
        for name, weight in {"task": 1, "gskd": 5, "kd": 0.5, "mse": 2, "memory": 0.1}.items():
            value = record["terms"][name]
            assert value["weighted"] == pytest.approx(weight * value["raw"], rel=1e-5)
        weighted = [value["weighted"] for value in record["terms"].values()]
        assert record["loss"] == pytest.approx(sum(weighted), rel=1e-5)
        assert min(weighted) > 0
    assert all(list(record["terms"]) == ["task"] for record in steps(tiny.plain))
    assert [(record["step"], record["split"]) for record in scores(tiny.distilled)] == [(2, "val"), (4, "val")]
    assert set(scores(tiny.distilled)[0]["iou"]) == set(CAMVID.classes)


def test_the_student_file_holds_the_student_alone(tiny):
    student = load_file(tiny.distilled / "student.safetensors")
    assert student.keys() == build_model(TINY_UNET["name"], TINY_UNET["args"], 11).state_dict().keys()
    checkpoint = load_file(tiny.distilled / "checkpoints" / "step-00000004" / "model.safetensors")
    others = {key.removeprefix("losses.") for key in checkpoint if not key.startswith("student.")}  # no teacher
    memory = {f"memory.{bank}.{part}" for bank in ("pixels", "regions") for part in ("rows", "written")}
    projector = {key for key in others if key.startswith("memory.projector.")}
    assert len(projector) == 7
    assert others - projector == {"mse.projector.weight", "mse.projector.bias", *memory}


def test_result_has_best_last_and_teacher(tiny):
    result = json.loads((tiny.distilled / "result.json").read_text())
    assert set(result["best"]) == set(result["last"]) == {"val", "test"}
    by_step = {record["step"]: record["miou"] for record in scores(tiny.distilled)}
    assert result["last"]["val"]["miou"] == by_step[STEPS]
    assert result["best"]["val"]["miou"] == max(by_step.values())
    teacher = json.loads((tiny.teacher / "result.json").read_text())
    assert result["teacher"]["val"] == teacher["best"]["val"]  # the weights it teaches with, scored as its own run did
    assert teacher["teacher"] is None
    assert result["parameters"] == sum(p.numel() for p in build_model(**_named(TINY_UNET)).parameters())


def _named(model):
    return {"name": model["name"], "args": model["args"], "num_classes": 11}


def test_what_is_said(tiny):
    lines = tiny.said["distilled"].out.splitlines()
    teacher = json.loads((tiny.distilled / "result.json").read_text())["teacher"]["val"]
    expected = f"teacher on val: mIoU {100 * teacher['miou']:.2f}  pixel accuracy {100 * teacher['pixel_accuracy']:.2f}"
    assert lines.index(expected) < next(i for i, line in enumerate(lines) if line.startswith("step 1/4"))
    assert any(re.match(r"step 4/4  loss \S+  \[task .* gskd \S+ -> \S+  kd .*\]  lr .* images/s", x) for x in lines)
    for part in ("last weights on val", "best weights on val", "last weights on test", "best weights on test"):
        assert sum(line.startswith(part) for line in lines) == 1
    assert tiny.said["distilled"].err == ""
    assert "teacher on val" not in tiny.said["plain"].out


def test_tensorboard_events(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tiny.plain.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert {"loss", "lr", "terms/task", "val/miou"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert not list(tiny.distilled.rglob("events.out.tfevents*"))  # tensorboard: false


def test_train_leaves_teacher_and_terms_out(tiny, tmp_path):
    """And the same recipe in another folder, and with another way to load, gives the same bits."""
    gskd_ok("train", tiny.recipe, f"output={tmp_path / 'run'}", "teacher=null", "terms={}", "data.cache_gib=0")
    assert_same_run(tmp_path / "run", tiny.plain)


def test_distilling_twice_gives_the_same_bits(tiny, tmp_path):
    gskd_ok("distill", tiny.recipe, f"output={tmp_path / 'run'}")
    assert_same_run(tmp_path / "run", tiny.distilled)


def test_another_seed_and_no_terms_give_other_weights(tiny, tmp_path):
    gskd_ok("train", tiny.recipe, f"output={tmp_path / 'run'}", "seed=3")
    for other in (tmp_path / "run", tiny.distilled):
        with pytest.raises(AssertionError, match="differ"):
            assert_same_tensors(other / "student.safetensors", tiny.plain / "student.safetensors")


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16", "teacher.precision=bf16"],
        ["eval.precision=bf16", "train.channels_last=true"],
        ["train.accumulate=2", "train.clip=0.1"],
        ["train.optimizer=sgd", "train.schedule=poly", "train.lr=0.01"],
        ["train.schedule=constant", "data.workers=1", "eval.mode=slide", "eval.window=[32, 32]"],
        ["model.weights=@plain", "teacher={model: {name: '@name', args: @args, weights: '@teacher', mean: [0, 0, 0]}}"],
    ],
    ids=lambda overrides: " ".join(overrides)[:40],
)
def test_other_settings(tiny, tmp_path, overrides):
    teacher = load_recipe(tiny.teacher / "recipe.yaml").model
    for mark, text in {
        "@plain": str(tiny.plain),
        "@teacher": str(tiny.teacher / "student.safetensors"),
        "@name": teacher.name,
        "@args": json.dumps(teacher.args),
    }.items():
        overrides = [override.replace(mark, text) for override in overrides]
    run = tmp_path / "run"
    gskd_ok("distill", tiny.recipe, f"output={run}", "train.steps=2", *overrides)
    assert all(np.isfinite(record["loss"]) for record in steps(run))
    assert len(steps(run)) == 2
    with pytest.raises(AssertionError, match="differ"):  # each setting did something
        assert_same_tensors(
            run / "checkpoints/step-00000002/model.safetensors",
            tiny.distilled / "checkpoints/step-00000002/model.safetensors",
        )


def test_every_loss_from_a_recipe(tiny, tmp_path):
    """All at once, at "auto" layers, with widths and class counts filled in; and one twice, on layers of its own."""
    terms = {name: {"weight": 0.01} for name in LOSSES}
    terms["cirkd_memory"]["args"] = {"pixel_bank": 5, "region_bank": 5}
    terms["afdcd"]["args"] = {"groups": 4}
    terms["early"] = {"loss": "at", "student": "encoder[1]", "teacher": "encoder[1]"}
    terms["levels"] = {"loss": "psd", "student": ["encoder[1]", "decoder"], "teacher": ["encoder[2]", "decoder"]}
    run = tmp_path / "run"
    gskd_ok("distill", tiny.recipe, f"output={run}", "train.steps=2", f"terms={json.dumps(terms)}")
    logged = steps(run)[-1]["terms"]
    assert set(logged) == {"task", *terms}
    silent = [name for name, value in logged.items() if not np.isfinite(value["raw"]) or value["raw"] == 0]
    assert silent == ["psd"]  # the encoder's last stage has one pixel here: nothing to compare


# --- eval, predict, data check ---


def test_eval_gives_the_run_its_own_score(tiny, tmp_path):
    said = gskd_ok("eval", tiny.distilled, "--json", tmp_path / "score.json")
    score = json.loads((tmp_path / "score.json").read_text())
    result = json.loads((tiny.distilled / "result.json").read_text())
    assert score == result["best"]["val"]
    assert re.search(rf"mIoU\W+{100 * score['miou']:.2f}\b", said.out)
    assert all(f"IoU {name}" in said.out for name in CAMVID.classes)
    gskd_ok("eval", tiny.distilled, "--split", "test", "--json", tmp_path / "test.json")
    assert json.loads((tmp_path / "test.json").read_text()) == result["best"]["test"] != score


def test_eval_with_windows_flips_and_scales(tiny, tmp_path):
    for name, overrides in {
        "slide": ["eval.mode=slide", "eval.window=[32, 32]"],
        "flip": ["eval.flip=true"],
        "both": ["eval.mode=slide", "eval.window=[32, 32]", "eval.flip=true", "eval.scales=[0.75, 1]"],
    }.items():
        gskd_ok("eval", tiny.distilled, *overrides, "--json", tmp_path / f"{name}.json")
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("slide", "flip", "both")]
    own = json.loads((tiny.distilled / "result.json").read_text())["best"]["val"]
    assert len({json.dumps(score["iou"]) for score in [*found, own]}) == 4
    assert {score["pixels"] for score in found} == {own["pixels"]}


def test_a_moved_run_is_whole(tiny, tmp_path):
    shutil.copytree(tiny.distilled, tmp_path / "moved")
    before = snapshot(tmp_path / "moved")
    gskd_ok("eval", tmp_path / "moved", "--json", tmp_path / "score.json")
    score = json.loads((tmp_path / "score.json").read_text())
    assert score == json.loads((tiny.distilled / "result.json").read_text())["best"]["val"]
    assert snapshot(tmp_path / "moved") == before


def test_predict_writes_pictures_of_the_images_size(tiny, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (45, 70, 4), np.uint8)
    Image.fromarray(noise[..., :3]).save(folder / "wide.jpg")
    Image.fromarray(noise[:, :33]).save(folder / "see through.png")
    Image.fromarray(noise[..., 0]).save(tmp_path / "grey.PNG")
    (folder / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    said = gskd_ok("predict", tiny.distilled, folder, tmp_path / "grey.PNG", "-o", out)
    assert said.out.startswith("3 images")
    sizes = {"wide": (70, 45), "see through": (33, 45), "grey": (70, 45)}
    for kind in ("index", "colour", "overlay"):
        assert {path.stem: Image.open(path).size for path in (out / kind).iterdir()} == sizes
    for name in sizes:
        index = np.asarray(Image.open(out / "index" / f"{name}.png"))
        assert index.dtype == np.uint8
        assert index.max() < 11
        colour = np.asarray(Image.open(out / "colour" / f"{name}.png"))
        np.testing.assert_array_equal(colour, CAMVID.palette[index])
        assert not np.array_equal(np.asarray(Image.open(out / "overlay" / f"{name}.png")), colour)


def write_video(path, frames):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_predict_takes_patterns_and_the_frames_of_a_video_and_writes_what_is_asked(tiny, tmp_path):
    shades = [np.full((48, 64, 3), shade, np.uint8) for shade in (20, 120, 220)]
    write_video(tmp_path / "clip.mp4", shades)
    Image.fromarray(shades[0]).save(tmp_path / "still.png")
    Image.fromarray(shades[0]).save(tmp_path / "other.bmp")
    out = tmp_path / "out"
    wanted = ["--write", "probability", "--write", "index", "--set", "eval.mode=slide", "--set", "eval.window=[32,32]"]
    said = gskd_ok("predict", tiny.distilled, tmp_path / "clip.mp4", tmp_path / "*.png", "-o", out, *wanted)
    assert said.out.startswith("4 images")
    assert {path.name for path in out.iterdir()} == {"index", "probability"}
    names = {"clip_000000", "clip_000001", "clip_000002", "still"}
    assert {path.stem for path in (out / "probability").iterdir()} == names
    for name in names:
        share = np.load(out / "probability" / f"{name}.npy")
        assert (share.shape, share.dtype) == ((11, 48, 64), np.float16)
        np.testing.assert_allclose(share.sum(0, dtype=np.float32), 1, atol=5e-3)
        index = np.asarray(Image.open(out / "index" / f"{name}.png"))
        best = np.take_along_axis(share, index[None].astype(int), axis=0)[0]
        np.testing.assert_array_equal(best, share.max(axis=0))  # fp16 may tie


def test_predicted_probabilities_of_averages_are_not_passed_through_softmax_again(tiny, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    shares = []
    for name, scales in (("one", "[1.0]"), ("twice", "[1.0,1.0]")):
        arguments = ["--write", "probability", "--set", f"eval.scales={scales}"]
        gskd_ok("predict", tiny.distilled, tmp_path / "a.png", "-o", tmp_path / name, *arguments)
        shares.append(np.load(tmp_path / name / "probability" / "a.npy"))
    np.testing.assert_allclose(shares[1], shares[0], atol=2e-3)


def test_nothing_predicted_is_written_over(tiny, tmp_path):
    write_video(tmp_path / "clip.mp4", [np.zeros((48, 64, 3), np.uint8)] * 2)
    for name in ("clip_000000", "clip_1"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    refused = gskd("predict", tiny.distilled, tmp_path, "-o", tmp_path / "out")
    assert_refused(refused, "a frame of", "clip.mp4 and", "would both be written as clip_000000")
    assert not (tmp_path / "out").exists()
    twice = [tmp_path / "clip_1.png", tmp_path / "*_1.png", tmp_path / "clip.mp4"]
    assert gskd_ok("predict", tiny.distilled, *twice, "-o", tmp_path / "out").out.startswith("3 images")


def test_what_is_no_video_is_left_out_and_named(tiny, tmp_path):
    write_video(tmp_path / "clip.mkv", [np.zeros((48, 64, 3), np.uint8)] * 2)
    (tmp_path / "none.mp4").write_bytes(b"no video")
    refused = gskd("predict", tiny.distilled, tmp_path / "clip.mkv", tmp_path / "none.mp4", "-o", tmp_path / "out")
    assert_refused(refused, "1 of 2 files left out", "none.mp4: not a readable video")
    assert len(list((tmp_path / "out" / "index").iterdir())) == 2


def test_a_video_of_sound_alone(tiny, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "song.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused = gskd("predict", tiny.distilled, tmp_path / "song.mkv", "-o", tmp_path / "out")
    assert_refused(refused, "song.mkv: not a readable video: it holds no pictures")


def test_every_file_that_is_left_out_is_named(tiny, tmp_path):
    bad = [tmp_path / f"{name}.png" for name in "abcde"]
    for path in bad:
        path.write_text("no image")
    refused = gskd("predict", tiny.distilled, tmp_path, "-o", tmp_path / "out")
    assert_refused(refused, "5 of 5 files left out", *(f"{path}: not a readable image" for path in bad))


def test_an_image_with_two_names_is_predicted_under_both(tiny, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    gskd_ok("predict", tiny.distilled, tmp_path, "-o", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "index").iterdir()} == {"a.png", "b.png"}


def test_data_check_of_good_data(tiny):
    said = gskd_ok("data", "check", tiny.recipe, "data.test=test")
    assert all(f"{split}: 4 of 32 x 48" in said.out for split in ("train", "val", "test"))
    assert all(name in said.out for name in CAMVID.classes)


def test_data_check_says_where_splits_share_images(tiny):
    said = gskd_ok("data", "check", tiny.recipe, "data.val=train")
    assert "train: 4 of 32 x 48" in said.out
    assert "data.train and data.val are both train" in said.out
    assert "also in" not in gskd_ok("data", "check", tiny.recipe, "data.test=test").out


# --- demo, help, shipped recipes, camvid ---


def test_demo_compares_three_runs_and_does_not_train_twice(tmp_path):
    out = tmp_path / "demo"
    tiny = [
        "train.steps=2",
        "train.batch=2",
        "train.threads=1",
        "train.log_every=1",
        "train.tensorboard=false",
        "augment.crop=[32, 32]",
        "data.options={size: [32, 48], length: 2}",
        "model.args={encoder_name: tu-mobilenetv3_small_050, encoder_weights: null, decoder_channels: 8}",
    ]
    said = gskd_ok("demo", "-o", out, *tiny)
    for part in ("plain student", "GSKD student", "mIoU", "bicyclist", "ms per image", "demo.png", "report.html"):
        assert part in said.out
    with Image.open(out / "demo.png") as picture:
        assert min(picture.size) > 32
    before = {name: digest for name, digest in snapshot(out).items() if name not in ("demo.png", "report.html")}
    again = gskd_ok("demo", "-o", out, *tiny)
    assert "step 1/2" in said.out
    assert "step" not in again.out
    assert {name: digest for name, digest in snapshot(out).items() if name not in ("demo.png", "report.html")} == before

    def scores_in(text):
        return re.findall(r"^│ (?:mIoU|s of training).*$", text, re.MULTILINE)

    assert scores_in(again.out) == scores_in(said.out) != []


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ([], ["train", "distill", "eval", "predict", "data", "demo"]),
        (["train"], ["RECIPE", "KEY=VALUE", "--resume"]),
        (["distill"], ["RECIPE", "KEY=VALUE", "--resume"]),
        (["eval"], ["RUN", "KEY=VALUE", "--split", "--json"]),
        (["predict"], ["RUN", "IMAGES", "--output"]),
        (["data"], ["check"]),
        (["data", "check"], ["RECIPE", "KEY=VALUE"]),
        (["demo"], ["KEY=VALUE", "--output"]),
    ],
)
def test_help_names_what_there_is(command, parts):
    said = gskd_ok(*command, "--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", said.out)
    assert [part for part in parts if part not in text] == []


def test_the_version_is_that_of_the_package():
    assert gskd_ok("--version").out == f"gskd {__version__}\n"


def test_shipped_recipes_parse_and_are_named_by_the_help():
    folder = Path(load_recipe.__code__.co_filename).parent / "recipes"
    stems = {path.stem for path in folder.glob("*.yaml")}
    assert {stem for stem in stems if not stem.startswith("compare_")} == set(SHIPPED)
    text = re.sub(r"\W+", "", gskd_ok("train", "--help").out)
    for name in SHIPPED:
        assert load_recipe(name).output.startswith("runs/")
        assert re.sub(r"\W+", "", name) in text


def test_the_console_script_in_a_process_of_its_own(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", Path("run"))
    process = spawn("train", recipe, "train.steps=1", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "step 1/1" in out
    assert len(records(tmp_path / "run")) == 2


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path, monkeypatch):
    from gskd.run import Run

    def stop(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "add_metrics", stop)
    stopped = gskd("train", tiny.recipe, f"output={tmp_path / 'run'}")
    assert stopped.code == 130
    assert stopped.err.startswith("gskd: stopped")
    assert "--resume" in stopped.err


def test_ctrl_c_before_anything_has_begun(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gskd.cli.app", stop)
    stopped = gskd("train", "scenes")
    assert (stopped.code, stopped.err.count("\n")) == (130, 1)
    assert stopped.err.startswith("gskd: stopped")


@pytest.mark.slow
def test_camvid(camvid_root, tmp_path):
    gskd_ok(
        "train",
        "camvid_student",
        f"data.root={camvid_root}",
        f"output={tmp_path / 'run'}",
        "data.test=null",
        "train.steps=2",
        "train.log_every=1",
        "train.threads=1",
    )
    assert len(steps(tmp_path / "run")) == 2
    assert scores(tmp_path / "run")[0]["pixels"] > 101 * 360 * 480 * 0.9
