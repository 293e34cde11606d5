import math
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gskd.errors import GSKDError
from gskd.recipe import EvalMode, Precision, Recipe, TermRecipe, dump_recipe, load_recipe, parse_recipe

LEAST = {"output": "runs/a", "model": {"name": "smp:Unet"}}


def parse(*overrides: str, **tree: Any) -> Recipe:
    return parse_recipe({**LEAST, **tree}, overrides)


def refusal(*overrides: str, **tree: Any) -> str:
    with pytest.raises(GSKDError) as caught:
        parse(*overrides, **tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- what is read ---


def test_defaults_and_values() -> None:
    recipe = parse(train={"steps": 7, "precision": "bf16"}, terms={"kd": {"weight": 2}}, teacher={"run": "runs/t"})
    assert (recipe.output, recipe.model.name, recipe.train.steps, recipe.train.batch) == ("runs/a", "smp:Unet", 7, 8)
    assert recipe.train.precision is Precision.bf16
    assert recipe.terms == {"kd": TermRecipe(weight=2.0)}
    assert recipe.teacher is not None
    assert recipe.teacher.model is None


def test_override_wins_and_reaches_new_branches() -> None:
    recipe = parse(
        "train.lr=1e-3",
        "augment.crop=[32, 48]",
        "terms.gskd.args.samples=4",
        "teacher.model.name=smp:FPN",
        "eval.mode=slide",
        "model.args={encoder_weights: null}",
        "output=a=b",
        train={"lr": 5},
    )
    assert recipe.train.lr == 1e-3
    assert recipe.augment.crop == [32, 48]
    assert recipe.terms["gskd"].args == {"samples": 4}
    assert recipe.teacher is not None
    assert recipe.teacher.model is not None
    assert recipe.teacher.model.name == "smp:FPN"
    assert recipe.eval.mode is EvalMode.slide
    assert recipe.model.args == {"encoder_weights": None}
    assert recipe.output == "a=b"


def test_later_override_wins_and_the_callers_tree_is_left_alone() -> None:
    tree = {"output": "a", "model": {"name": "m:f"}, "train": {"steps": 3}}
    assert parse_recipe(tree, ["train.steps=4", "train.steps=5"]).train.steps == 5
    assert tree["train"] == {"steps": 3}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", "0.001", "1.0e-3"])
def test_every_spelling_of_a_float(text: str) -> None:
    assert parse(f"train.lr={text}").train.lr == 1e-3


def test_null_leaves_a_term_out() -> None:
    terms = {"kd": {"weight": 1}, "gskd": {"weight": 50}}
    assert list(parse("terms.gskd=null", terms=terms).terms) == ["kd"]
    assert list(parse("terms.gskd=", terms=terms).terms) == ["kd"]
    assert list(parse(terms={"kd": None, "gskd": {}}).terms) == ["gskd"]
    assert parse("terms.kd.weight=3", terms={"kd": None}).terms == {"kd": TermRecipe(weight=3.0)}


def test_null_leaves_the_teacher_out() -> None:
    assert parse("teacher=null", teacher={"run": "runs/t"}).teacher is None


def test_empty_value_is_null() -> None:
    assert parse("data.root=", data={"root": "somewhere"}).data.root is None
    assert "train.lr: expected a finite number, found None" in refusal("train.lr=")


def test_merge_keys_may_repeat(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "output: a\nmodel: &m {name: 'm:f', args: {a: 1}}\nteacher: {model: {<<: *m, name: 'm:g'}}\n",
    )
    teacher = load_recipe(path).teacher
    assert teacher is not None
    assert teacher.model is not None
    assert (teacher.model.name, teacher.model.args) == ("m:g", {"a": 1})


def test_dates_are_text() -> None:
    assert parse("output=2024-01-05").output == "2024-01-05"
    assert parse("output=2024-13-45").output == "2024-13-45"


# --- what is refused ---


def test_every_mistake_is_named_at_once() -> None:
    message = refusal(
        "nonsense",
        "terms.kd.wieght=1",
        "train.steps.x=2",
        outputs="x",
        train={"steps": 5, "batch": "many", "optimizer": "adam", "lr": -1},
        data={"workers": [1], "rot": "x"},
        augment={"crop": [1, 2, 3], "scale": [2, 1]},
        eval=5,
    )
    for part in (
        "override 'nonsense': expected key=value",
        "unknown key terms.kd.wieght; did you mean 'weight'?",
        "train.steps holds a value, not further keys",
        "unknown key outputs; did you mean 'output'",
        "train.batch: expected a whole number, found 'many'",
        "train.optimizer: expected one of adamw, sgd, found 'adam'",
        "train.lr: expected more than 0, got -1",
        "data.workers: expected a whole number, found [1]",
        "unknown key data.rot; did you mean 'root'",
        "augment.crop: expected height and width",
        "augment.scale: expected a low and a high factor",
        "eval: expected keys and values, found 5",
    ):
        assert part in message


def test_one_mistake_is_named_once() -> None:
    message = refusal("teacher.model=5")
    assert message == "recipe: teacher.model: expected keys and values or null, found 5"
    assert refusal("output=[1]").count("output") == 1


def test_missing_output_and_names() -> None:
    with pytest.raises(GSKDError) as caught:
        parse_recipe({"teacher": {"model": {}}})
    for part in ("output: missing", "model.name: missing", "teacher.model.name: missing"):
        assert part in str(caught.value)
    assert "output: missing" in refusal("output=''")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps=true", "train.steps: expected a whole number, found True"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=0", "train.steps: expected more than 0"),
        ("train.lr=.nan", "train.lr: expected a finite number"),
        ("train.lr=nan", "train.lr: expected a finite number"),
        ("train.lr=.inf", "train.lr: expected a finite number"),
        ("eval.scales=[1, .inf]", "eval.scales: expected a list of finite numbers"),
        ("eval.scales=[]", "eval.scales"),
        ("eval.scales=1", "eval.scales"),
        ("eval.window=[0, 5]", "eval.window"),
        ("eval.overlap=1", "eval.overlap"),
        ("eval.every=0", "eval.every"),
        ("augment.crop=[1.5, 2]", "augment.crop"),
        ("augment.crop=[0, 2]", "augment.crop"),
        ("augment.hue=0.6", "augment.hue"),
        ("augment.flip=-0.1", "augment.flip"),
        ("seed=-1", "seed"),
        (f"seed={2**63}", "seed"),
        ("train.accumulate=3", "train.batch: 8 images do not divide"),
        ("train.accumulate=0", "train.accumulate"),
        ("train.threads=0", "train.threads"),
        ("train.clip=0", "train.clip"),
        ("train.warmup=1", "train.warmup"),
        ("train.momentum=-0.1", "train.momentum"),
        ("eval.window=[1,1]", "eval.window"),
        ("eval.overlap=0.999999", "eval.overlap"),
        ("train.class_balance=-1", "train.class_balance"),
        ("train.class_balance=.inf", "train.class_balance"),
        ("train.weight_decay=-1", "train.weight_decay"),
        ("train.device=cuda:0", "train.device"),
        ("data.workers=-1", "data.workers"),
        ("model.std=[1, 1, 0]", "model.std"),
        ("model.mean=[]", "model.mean"),
        ("teacher.model.std=[1]", "teacher.model.std"),
        ("teacher={}", "teacher: expected either run or model"),
        ("teacher={run: a, model: {name: 'm:f'}}", "teacher: expected either run or model"),
        ("terms=null", "terms: expected keys and values"),
        ("terms=[kd]", "terms: expected keys and values"),
        ("terms.kd=5", "terms.kd: expected keys and values or null, found 5"),
        ("model=null", "model: expected keys and values"),
        ("model.args={1: 2}", "model.args: expected keys and values"),
        ("model.args={a: 1, a: 2}", "'a' stands twice"),
        ("model.args={a: [}", "not valid YAML"),
        ("model.args=!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("model.args=!!timestamp 2024-13-45", "not valid YAML"),
        ("=5", "expected key=value"),
        ("train..steps=5", "unknown key train."),
    ],
)
def test_refused(override: str, part: str) -> None:
    assert part in refusal(override)


@pytest.mark.parametrize("text", ["1e3", "007", "12_3", "true", "12:30"])
def test_a_number_where_text_is_due_is_not_rewritten(text: str) -> None:
    assert "output: expected text" in refusal(f"output={text}")
    assert parse(f"output='{text}'").output == text


@pytest.mark.parametrize("key", ["output", "data.root", "model.args.x", "data.options.a", "teacher.model.name"])
@pytest.mark.parametrize("text", ["'${oc.env:HOME}'", "'${seed}'", "'???'", "'x/${nowhere}'"])
def test_interpolation_is_refused_not_carried_out(key: str, text: str) -> None:
    message = refusal(f"{key}={text}")
    assert "recipes know neither interpolation nor NUL" in message
    assert text.strip("'") in message


def test_no_path_holds_a_nul() -> None:
    assert "output: expected plain values, found 'a\\x00b'" in refusal('output="a\\0b"')


def test_interpolation_deep_in_arguments() -> None:
    assert "${x}" in refusal("data.options.a=[1, {b: ['${x}']}]")
    assert "${x}" in refusal("terms.kd.args.a='${x}'")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(GSKDError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(GSKDError, match="no such file"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GSKDError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")
    for text, part in {
        "": "found nothing",
        "- a": "found a list",
        "a: [": "not valid YAML",
        "train:\n  lr: 1\n  lr: 2\n": "'lr' stands twice.*line 3",
        "? [a]\n: 1": "not valid YAML",
        "a: \x07": "not valid YAML",
        "[" * 5000: "not valid YAML",
    }.items():
        with pytest.raises(GSKDError, match=part) as caught:
            load_recipe(write(tmp_path, text))
        assert "recipe.yaml" in str(caught.value)


# --- round trip ---

TEXT = st.text(string.printable, max_size=12).filter(lambda text: "${" not in text and text != "???")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@settings(max_examples=12, deadline=None)
@given(
    output=TEXT.filter(bool),
    lr=st.floats(1e-300, 1e300),
    args=st.dictionaries(TEXT, VALUES, max_size=3),
    terms=st.dictionaries(TEXT, st.fixed_dictionaries({"weight": st.floats(0, 10)}), max_size=2),
)
def test_dump_and_load_give_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, output: str, lr: float, args: dict[str, Any], terms: dict[str, Any]
) -> None:
    recipe = parse(output=output, train={"lr": lr}, model={"name": "m:f", "args": args}, terms=terms)
    assert recipe.model.args == args
    path = write(tmp_path_factory.getbasetemp(), dump_recipe(recipe))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "text", ["1e3", "2024-01-05", "007", "null", "", "yes", "1.5", "12:30", "=", "<<", "a: b", "#x"]
)
def test_text_that_looks_like_something_else_survives(tmp_path: Path, text: str) -> None:
    recipe = parse(model={"name": "m:f", "args": {"x": text, text: 1}})
    assert load_recipe(write(tmp_path, dump_recipe(recipe))).model.args == {"x": text, text: 1}


def test_small_floats_survive(tmp_path: Path) -> None:
    recipe = parse("train.lr=1e-05", "train.weight_decay=1.2345678901234567e-17")
    loaded = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert (loaded.train.lr, loaded.train.weight_decay) == (1e-05, 1.2345678901234567e-17)
    assert not math.isnan(loaded.train.lr)
