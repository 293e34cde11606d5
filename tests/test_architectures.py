"""Every family of networks by its name, and each as teacher and as student of every other."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gskd import Distiller, GSKDError, GSKDLoss, KDLoss, Term, logits_of
from gskd.architectures import build_model, has_own_weights, require_trusted, without_pretraining
from gskd.layers import auto_tap
from helpers import assert_refused, gskd, gskd_ok, write_recipe

CLASSES = 5
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SMALL: dict[str, Any] = {"encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
FAMILIES: dict[str, dict[str, Any]] = {
    "smp:DeepLabV3Plus": {**SMALL, "encoder_output_stride": 16, "decoder_channels": 16},
    "smp:Unet": {**SMALL, "decoder_channels": [16, 16, 8, 8, 8]},
    "smp:PSPNet": {**SMALL, "psp_out_channels": 16},
    "smp:Segformer": {**SMALL, "decoder_segmentation_channels": 16},
    "torchvision:deeplabv3_mobilenet_v3_large": {"weights": None, "weights_backbone": None},
    "torchvision:lraspp_mobilenet_v3_large": {"weights": None, "weights_backbone": None},
    "transformers:segformer": {
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 16,
    },
    "transformers:upernet": {
        "backbone_config": {
            "model_type": "convnext",
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "out_features": STAGES,
        },
        "hidden_size": 16,
        "use_auxiliary_head": False,
        "auxiliary_in_channels": 24,
    },
    "transformers:dpt": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "neck_hidden_sizes": [8, 16, 24, 24],
        "backbone_out_indices": [0, 1, 2, 3],
        "fusion_hidden_size": 16,
        "use_auxiliary_head": False,
    },
    "transformers:mobilevit": {
        "hidden_sizes": [16, 20, 24],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "aspp_out_channels": 16,
        "num_attention_heads": 2,
    },
    "transformers:mobilenet_v2": {"depth_multiplier": 0.35},
    "transformers:mask2former": {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
            "window_size": 2,
            "out_features": STAGES,
        },
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "encoder_layers": 1,
        "num_attention_heads": 2,
        "dim_feedforward": 32,
        "decoder_layers": 2,
        "num_queries": 6,
    },
}
TAPS = {"transformers:mask2former": "model.pixel_level_module[decoder_last_hidden_state]"}
TEACHERS = list(FAMILIES)
STUDENTS = [name for name in FAMILIES if name != "transformers:mask2former"]  # it has no per-pixel logits to train


@pytest.fixture(scope="module")
def networks():
    """Two of each, so that a family can teach itself; the frozen ones are not to be trained elsewhere."""
    torch.manual_seed(0)
    return {
        side: {name: build_model(name, FAMILIES[name], CLASSES) for name in names}
        for side, names in (("teacher", TEACHERS), ("student", STUDENTS))
    }


def pairs():
    """Those with a Unet are enough to see each family in each place; the others take minutes."""
    return [
        pytest.param(teacher, student, marks=() if "smp:Unet" in (teacher, student) else pytest.mark.slow)
        for teacher in TEACHERS
        for student in STUDENTS
    ]


@pytest.mark.parametrize(("teacher_name", "student_name"), pairs())
def test_one_step_of_every_pair(networks, teacher_name, student_name):
    teacher, student = networks["teacher"][teacher_name], networks["student"][student_name]
    torch.manual_seed(1)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    terms = {
        "gskd": Term(GSKDLoss(only_correct=False), 10, teacher=TAPS.get(teacher_name, "auto")),
        "kd": Term(KDLoss(), 1),
    }
    distiller = Distiller(student, teacher, terms)
    distiller.zero_grad()
    result = distiller(images, labels)
    result.loss.backward()
    assert result.loss.isfinite()
    assert all(value.raw.isfinite() for value in result.terms.values())
    assert set(distiller._silent_steps) == set()  # each term was heard at its layer
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def table(networks) -> str:
    lines = ["| model | class | `auto` features | `auto` logits | teacher | student |", "|---|---|---|---|---|---|"]
    for name in FAMILIES:
        model = networks["teacher"][name]
        features = f"name one: `{TAPS[name]}`" if name in TAPS else f"`{auto_tap(model, 'features')}`"
        student = "yes" if name in STUDENTS else "no"
        logits = f"`{auto_tap(model, 'logits')}`"
        lines.append(f"| `{name}` | {type(model).__name__} | {features} | {logits} | yes | {student} |")
    return "\n".join(lines)


def test_the_table_in_the_documentation_is_what_was_tried(networks):
    """``GSKD_WRITE_DOCS=1 pytest tests/test_architectures.py`` writes it anew."""
    begin, end = "<!-- begin: made by tests/test_architectures.py -->\n", "\n<!-- end -->"
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    if os.environ.get("GSKD_WRITE_DOCS"):
        PAGE.write_text(before + begin + table(networks) + end + after, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == before + begin + table(networks) + end + after


def test_queries_make_a_semantic_map():
    class Output:
        class_queries_logits = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]]) * 10  # class 0, class 1, none
        masks_queries_logits = torch.tensor([[[[9.0, -9]], [[-9, 9.0]], [[9.0, 9]]]]) * 10

    probability = logits_of(Output()).softmax(1)
    torch.testing.assert_close(probability[0, :, 0], torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "args", "part"),
    [
        ("torchvision:deeplab", {}, "unknown function; did you mean 'deeplabv3"),
        ("torchvision:fcn_resnet50", {"num_classes": 3}, "args.num_classes is 3, the data has 5"),
        ("transformers:segfromer", {}, "'segfromer' is no model_type that segments; did you mean 'segformer'"),
        ("transformers:segformer", {"num_labels": 3}, "args.num_labels is 3, the data has 5"),
        ("transformers:bert", {}, "'bert' is no model_type that segments"),
        ("hf:org/x", {"trust_remote_code": True}, "args trust_remote_code: code and pickles of the hub are not loaded"),
        ("hf:org/x", {"use_safetensors": False}, "code and pickles of the hub are not loaded"),
    ],
)
def test_mistakes_are_named(name, args, part):
    with pytest.raises(GSKDError) as caught:
        build_model(name, args, 5)
    assert part in str(caught.value)


def test_only_import_paths_need_trust(monkeypatch):
    monkeypatch.delenv("GSKD_ALLOW_IMPORTS", raising=False)
    for name in (*FAMILIES, "hf:org/name"):
        require_trusted(name, "model")
    with pytest.raises(GSKDError, match="is Python code that would be run"):
        require_trusted("torchvision.models:resnet18", "model")


def test_nobody_downloads_weights_that_others_replace():
    assert without_pretraining("torchvision:fcn_resnet50", {"aux_loss": True}) == {
        "aux_loss": True,
        "weights": None,
        "weights_backbone": None,
    }
    assert without_pretraining("torchvision:fcn_resnet50", {"weights": "DEFAULT"}) == {
        "aux_loss": True,  # that of the weights, which the run's file holds as well
        "weights": None,
        "weights_backbone": None,
    }
    assert "aux_loss" not in without_pretraining("torchvision:lraspp_mobilenet_v3_large", {"weights": "DEFAULT"})
    assert without_pretraining("hf:a/b", {}) == {"pretrained": False}
    assert [has_own_weights(name, {}) for name in ("smp:Unet", "torchvision:x", "transformers:x", "hf:x", "a:b")] == [
        False, False, False, True, True
    ]  # fmt: skip
    assert has_own_weights("torchvision:x", {"weights": "DEFAULT"})
    assert not has_own_weights("hf:x", {"pretrained": False})
    assert not has_own_weights("hf:x", {"num_labels": 3, "ignore_mismatched_sizes": True})


@pytest.fixture
def segformer_folder(tmp_path, monkeypatch):
    """A model as transformers saves it: config.json and safetensors."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    model = build_model("transformers:segformer", FAMILIES["transformers:segformer"], 11).eval()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


def test_a_model_of_the_hub_from_a_folder(segformer_folder):
    folder, model = segformer_folder
    images = torch.randn(1, 3, 64, 64)
    loaded = build_model(f"hf:{folder}").eval()
    assert torch.equal(logits_of(loaded(images)), logits_of(model(images)))
    bare = build_model(f"hf:{folder}", {"pretrained": False}).eval()
    assert not torch.equal(logits_of(bare(images)), logits_of(model(images)))
    head = build_model(f"hf:{folder}", {"num_labels": 3, "ignore_mismatched_sizes": True})
    assert logits_of(head(images)).shape[1] == 3
    with pytest.raises(GSKDError, match="cannot be built with"):
        build_model("hf:nobody/has-this", {})


def test_a_model_of_the_hub_is_opened_again_as_it_was_changed(segformer_folder, tmp_path):
    """What ``args`` change of its configuration is part of the network, also where its weights come from the run."""
    folder, _ = segformer_folder
    args = {"decoder_hidden_size": 24, "ignore_mismatched_sizes": True, "semantic_loss_ignore_index": 3}
    args |= {"hidden_act": "relu"}  # leaves no trace in any shape
    model = build_model(f"hf:{folder}", args).eval()
    again = build_model(f"hf:{folder}", without_pretraining(f"hf:{folder}", args)).eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(logits_of(again(images)), logits_of(model(images)))
    assert (again.config.hidden_act, again.config.decoder_hidden_size) == ("relu", 24)
    assert not hasattr(again.config, "ignore_mismatched_sizes")


def test_a_teacher_of_the_hub_has_to_be_whole(segformer_folder, tmp_path):
    """Of an encoder alone the head starts at random: a start for a student, and nothing to learn from."""
    folder, _ = segformer_folder
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("decode_head.classifier")}, folder / "model.safetensors"
    )
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "run",
        model={"name": f"hf:{folder}"},
        teacher={"model": {"name": f"hf:{folder}"}},
        terms={"kd": {}},
        train={"steps": 1},
    )
    refused = gskd("distill", recipe)
    assert refused.code == 2
    reason = "2 tensors not among its weights, and random in a teacher: decode_head.classifier.bias, decode_head"
    assert refused.err.splitlines()[-1].startswith(f"gskd: model 'hf:{folder}': {reason}")  # below transformers' bars
    gskd_ok("train", recipe, "teacher=null", "terms={}")


def test_a_hub_folder_with_a_pickle_or_code_is_refused(segformer_folder, tmp_path):
    folder, model = segformer_folder
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(GSKDError, match="cannot be built with"):
        build_model(f"hf:{folder}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForSemanticSegmentation": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GSKDError, match="cannot be built with"):
        build_model(f"hf:{folder}")
    assert not (tmp_path / "run").exists()


def test_a_hub_teacher_of_a_torchvision_student_through_the_command_line(segformer_folder, tmp_path):
    folder, _ = segformer_folder
    student = "torchvision:lraspp_mobilenet_v3_large"
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "run",
        model={"name": student, "args": FAMILIES[student]},
        teacher={"model": {"name": f"hf:{folder}"}},
        terms={"gskd": {"args": {"only_correct": False}}, "kd": {}},
        train={"steps": 2},
    )
    gskd_ok("distill", recipe)
    gskd_ok("eval", tmp_path / "run")
    assert_refused(
        gskd("distill", recipe, "teacher.model.name=transformers:segformer", f"output={tmp_path / 'other'}"),
        "teacher.model.weights: missing",
    )


# gskd taps


def test_taps_lists_layers_with_strides_and_what_auto_means(tmp_path):
    said = gskd_ok("taps", "smp:Unet", "encoder_name=resnet18", "decoder_channels=[32,32,16,16,8]", "--size", "64").out
    rows = {
        row[0]: row[1:] for row in ([c.strip() for c in line.split("│")[1:-1]] for line in said.splitlines()) if row
    }
    assert rows["encoder[5]"] == ["512", "2 x 2", "32", "levels"]
    assert rows["decoder"] == ["8", "64 x 64", "1", "features"]
    assert rows["segmentation_head.0"] == ["1", "64 x 64", "1", "logits"]
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "never")
    assert "student: Unet" in gskd_ok("taps", recipe, "--size", "64").out
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["smp:Unett"], "unknown architecture"),
        (["smp:Unet", "encoder_name=resnet19"], "unknown encoder"),
        (["smp:Unet", "encoder_name"], "expected key=value"),
        (["nowhere.models:net"], "is Python code that would be run"),
        (["nothing.yaml"], "no such file"),
    ],
)
def test_taps_refuses_in_one_line(arguments, part):
    assert_refused(gskd("taps", *arguments), part)
