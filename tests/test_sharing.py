"""A student that others load: the same network, nothing of the machine it came from, and no code of theirs."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from gskd import GSKDError
from gskd.architectures import build_model
from gskd.data.datasets import open_dataset
from gskd.evaluation import Inference, predict
from gskd.export import Deployed
from gskd.run import Run, inference_of
from gskd.sharing import PretrainedStudent, share_run
from helpers import assert_refused, gskd, gskd_ok, write_recipe


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("shared") / "student"
    gskd_ok("share", tiny.distilled, "-o", output, "--license", "apache-2.0")
    return output


def test_what_is_loaded_is_the_run_s_best_student(tiny, folder):
    student, run = PretrainedStudent.from_pretrained(folder), Run(tiny.distilled)
    recipe = run.load_recipe()
    assert not student.training
    image = open_dataset("scenes", None, "val", {"size": [40, 52], "length": 1})[0].image
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    expected = predict(run.load_model(), pixels, inference_of(recipe)).argmax(0)
    assert np.array_equal(student.label_map(image), expected.numpy())
    logits = student(pixels[None])
    assert tuple(logits.shape) == (1, 11, 40, 52)
    assert student.classes == tuple(run.info()["classes"])
    assert student.palette.tolist() == run.info()["palette"]


def test_the_card_says_what_it_is_and_nothing_of_the_machine(tiny, folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "gskd"
    score = Run(tiny.distilled).read_result()["best"]["val"]["miou"]
    assert f"| val | {100 * score:.1f} |" in card.text
    assert "gskd:" in card.text  # the recipe
    assert "Teacher: teacher" in card.text
    for file in ("README.md", "config.json"):
        assert str(tiny.folder) not in (folder / file).read_text()


def test_it_runs_in_windows_where_it_was_scored_in_windows(tiny, tmp_path):
    run = tmp_path / "run"
    gskd_ok("train", tiny.recipe, f"output={run}", "eval.mode=slide", "eval.window=[32,32]", "eval.overlap=0.5")
    share_run(Run(run), tmp_path / "shared")
    student = PretrainedStudent.from_pretrained(tmp_path / "shared")
    image = open_dataset("scenes", None, "val", {"size": [60, 90], "length": 1})[0].image
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    inference = inference_of(Run(run).load_recipe())
    expected = predict(Run(run).load_model(), pixels, inference)
    assert not torch.equal(expected, predict(Run(run).load_model(), pixels, Inference()))
    assert np.array_equal(student.label_map(image), expected.argmax(0).numpy())
    assert "Windows of 32 x 32 at scale 1." in (tmp_path / "shared" / "README.md").read_text()


def test_the_card_names_no_place_of_the_machine(tiny, tmp_path):
    """Neither that of the weights that training began from, nor any in the options of the data."""
    run = tmp_path / "run"
    gskd_ok("train", tiny.recipe, f"output={run}", f"model.weights={tiny.plain}")
    recipe = (run / "recipe.yaml").read_text()
    assert str(tiny.plain) in recipe
    (run / "recipe.yaml").write_text(recipe.replace("length: 4", f"length: 4\n    note: [{tmp_path}/x.csv]"))
    share_run(Run(run), tmp_path / "shared")
    for file in (tmp_path / "shared").glob("*.[mj]*"):
        assert str(tmp_path) not in file.read_text().replace(str(tmp_path / "shared"), "")
        assert str(tiny.folder) not in file.read_text()
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "weights: plain" in card
    assert "x.csv" in card


def test_a_network_of_a_local_folder_travels_without_it(tmp_path, monkeypatch):
    """Whoever takes the student has no such folder, and need not know of it."""
    pytest.importorskip("transformers", reason="needs the extra transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    small = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
    base = build_model("transformers:segformer", {**small, "decoder_hidden_size": 16}, 11)
    base.save_pretrained(tmp_path / "secret" / "base")
    model = {"name": f"hf:{tmp_path}/secret/base", "args": {"hidden_act": "relu"}}
    gskd_ok("train", write_recipe(tmp_path / "r.yaml", tmp_path / "run", model=model, train={"steps": 1}))
    share_run(Run(tmp_path / "run"), tmp_path / "shared")
    (tmp_path / "secret").rename(tmp_path / "gone")
    student = PretrainedStudent.from_pretrained(tmp_path / "shared")
    assert student.network.model.config.hidden_act == "relu"
    (tmp_path / "gone").rename(tmp_path / "secret")
    image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    expected = Deployed(Run(tmp_path / "run").load_model(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()
    assert torch.equal(student(image), expected(image))
    for file in ("README.md", "config.json"):
        assert "secret" not in (tmp_path / "shared" / file).read_text()


def test_a_weight_that_is_missing_is_an_error(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if key.endswith("weight")))
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(GSKDError, match=r"do not fit.*Missing key"):
        PretrainedStudent.from_pretrained(tmp_path)


def test_a_folder_of_others_runs_no_code(folder, tmp_path):
    """A model name is a module to import: not without being allowed."""
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "name": "os:system", "args": {"command": "false"}}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(GSKDError, match="os:system"):
        PretrainedStudent.from_pretrained(tmp_path)


def test_what_stands_there_stays(tiny, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert_refused(gskd("share", tiny.distilled, "-o", tmp_path), "expected a new or empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_without_weights_is_refused(tiny, tmp_path):
    assert_refused(gskd("share", tmp_path / "nothing", "-o", tmp_path / "out"), "holds no recipe.yaml")
    assert not (tmp_path / "out").exists()


def test_uploading(tiny, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        PretrainedStudent, "push_to_hub", lambda self, name, **given: sent.append((name, given["model_card_kwargs"]))
    )
    share_run(Run(tiny.plain), tmp_path / "a", push="me/student")
    assert sent == [("me/student", {"place": "me/student"})]
    assert 'from_pretrained("me/student")' in (tmp_path / "a" / "README.md").read_text()

    def refused(self, name, **given):
        raise OSError("401 Unauthorized\nand more")

    monkeypatch.setattr(PretrainedStudent, "push_to_hub", refused)
    with pytest.raises(GSKDError, match=r"hub me/student: 401 Unauthorized; the folder .* is complete"):
        share_run(Run(tiny.plain), tmp_path / "b", push="me/student")
    assert (tmp_path / "b" / "model.safetensors").is_file()


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_an_image_of_another_kind_is_refused(folder, image):
    with pytest.raises(GSKDError, match="image: expected"):
        PretrainedStudent.from_pretrained(folder).label_map(image)
