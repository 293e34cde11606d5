import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gskd.architectures import build_model, without_pretraining
from gskd.environment import environment
from gskd.errors import GSKDError
from gskd.models import save_weights
from gskd.recipe import EvalMode, Precision, Recipe, parse_recipe
from gskd.run import Run, inference_of


class Data:
    classes = ("road", "sky")
    palette = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)

    def __len__(self) -> int:
        return 0


def recipe(*overrides: str) -> Recipe:
    base = {
        "output": "a",
        "model": {"name": "torch.nn:Conv2d", "args": {"in_channels": 3, "out_channels": 2, "kernel_size": 1}},
    }
    return parse_recipe(base, overrides)


def made(path: Path) -> Run:
    run = Run(path)
    run.create(recipe(), "train", Data())  # type: ignore[arg-type]
    return run


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    run = made(tmp_path / "deep" / "a")
    assert run.exists
    assert run.load_recipe() == recipe()
    assert run.load_recipe(("train.steps=3",)).train.steps == 3
    info = run.info()
    assert (info["kind"], info["classes"], info["palette"]) == ("train", ["road", "sky"], [[1, 2, 3], [4, 5, 6]])
    assert info["environment"].keys() >= {"processor", "commit", "threads"}
    assert info["environment"]["versions"]["torch"] == environment()["versions"]["torch"] != "unknown"
    assert sorted(p.name for p in run.path.iterdir()) == ["recipe.yaml", "run.json"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert made(tmp_path).exists


@pytest.mark.parametrize(
    ("name", "part"), [("recipe.yaml", "holds another run; continue it with --resume"), ("x.txt", "found other files")]
)
def test_a_folder_in_use_is_left_alone(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(GSKDError, match=part):
        made(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]


def test_output_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(GSKDError, match="expected a new or empty folder"):
        made(tmp_path / "file")
    with pytest.raises(GSKDError, match=r"output .*cannot be made"):
        made(tmp_path / "file" / "below")
    with pytest.raises(GSKDError, match="cannot be written"):
        Run(tmp_path / "file").add_metrics({"step": 1})
    assert (tmp_path / "file").read_text() == "mine"


def test_no_run_there(tmp_path: Path) -> None:
    assert not Run(tmp_path / "none").exists
    with pytest.raises(GSKDError, match=r"holds no recipe\.yaml"):
        Run(tmp_path).load_recipe()
    with pytest.raises(GSKDError, match=r"holds no recipe\.yaml"):
        Run(tmp_path).load_model()


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{}", '{"classes": ["a"], "palette": []}', '{"classes": "ab", "palette": [1, 2]}', "\x00"]
)
def test_run_json_that_says_nothing(tmp_path: Path, text: str) -> None:
    run = made(tmp_path)
    run.info_file.write_text(text)
    with pytest.raises(GSKDError, match=r"run\.json cannot be read"):
        run.info()
    run.info_file.unlink()
    with pytest.raises(GSKDError, match=r"run\.json cannot be read"):
        run.load_model()


def test_model_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSKD_ALLOW_IMPORTS", "1")
    run = made(tmp_path)
    with pytest.raises(GSKDError, match=r"has no scored weights yet"):
        run.load_model()
    model = build_model(recipe().model.name, recipe().model.args)
    save_weights(model, run.student)
    loaded = run.load_model()
    assert not loaded.training
    assert torch.equal(loaded.weight, model.weight)
    run.student.write_bytes(run.student.read_bytes()[:-2])
    with pytest.raises(GSKDError, match="not a whole safetensors file"):
        run.load_model()
    save_weights(torch.nn.Conv2d(3, 5, 1), run.student)
    with pytest.raises(GSKDError, match="of another shape"):
        run.load_model()


def test_a_moved_run_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSKD_ALLOW_IMPORTS", "1")
    run = made(tmp_path / "a")
    save_weights(build_model(recipe().model.name, recipe().model.args), run.student)
    run.path.rename(tmp_path / "b")
    assert Run(tmp_path / "b").load_model() is not None


def test_resuming_forgets_the_steps_to_come(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.drop_metrics_after(5)  # nothing logged yet
    assert not run.metrics.exists()
    for step in (1, 2, 2, 3):
        run.add_metrics({"step": step, "loss": 0.5})
    with open(run.metrics, "a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a line
    run.drop_metrics_after(2)
    run.add_metrics({"step": 3})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3]
    assert lines[0] == {"step": 1, "loss": 0.5}
    run.drop_metrics_after(0)
    assert run.metrics.read_text() == ""


@pytest.mark.parametrize("line", ["5", "[]", "null", '{"step": null}', '{"loss": 1}', "\x00\x00", ""])
def test_odd_lines_are_dropped(tmp_path: Path, line: str) -> None:
    run = made(tmp_path)
    run.metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    run.drop_metrics_after(9)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_pretrained_encoders_are_not_fetched_when_weights_follow() -> None:
    args = {"encoder_name": "resnet18", "encoder_weights": "imagenet"}
    assert without_pretraining("smp:Unet", args) == {"encoder_name": "resnet18", "encoder_weights": None}
    assert without_pretraining("package:net", args) == args
    assert args["encoder_weights"] == "imagenet"


def test_inference_follows_the_recipe() -> None:
    asked = recipe(
        "eval.mode=slide",
        "eval.window=[33, 44]",
        "eval.overlap=0.5",
        "eval.scales=[0.5, 1]",
        "eval.flip=true",
        "train.precision=bf16",
        "model.mean=[0.1, 0.2, 0.3]",
    )
    inference = inference_of(asked)
    assert (inference.mode, inference.window, inference.overlap) == (EvalMode.slide.value, (33, 44), 0.5)
    assert (inference.scales, inference.flip, inference.mean) == ((0.5, 1.0), True, (0.1, 0.2, 0.3))
    assert inference.dtype == torch.bfloat16
    asked.eval.precision = Precision.fp32
    assert inference_of(asked).dtype == torch.float32


def test_a_run_that_recorded_nothing_is_taken_back_and_no_other(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.add_metrics({"step": 1})
    run.discard_if_unused()
    assert run.exists
    run.metrics.unlink()
    (run.path / "mine.txt").write_text("kept")
    run.discard_if_unused()
    assert [path.name for path in run.path.iterdir()] == ["mine.txt"]


def test_what_a_kill_leaves_of_a_new_folder_blocks_nobody(tmp_path):
    """run.json is written before recipe.yaml, which makes the folder a run."""
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "recipe.yaml.partial").write_text("out")
    Run(tmp_path).check_free()
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(GSKDError, match="found other files"):
        Run(tmp_path).check_free()
