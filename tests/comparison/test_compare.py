"""``gskd compare`` through the command line, on runs of a few steps."""

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

import gskd
import helpers
from gskd.comparison import load_comparison
from gskd.comparison.grid import equal_seconds_cell, equal_steps_cell
from gskd.recipe import dump_recipe


def tree(folder, **changes):
    """A comparison with its teacher's and student's recipes beside it."""
    teacher = helpers.write_recipe(folder / "teacher.yaml", folder / "unused", model=helpers.TEACHER_UNET, seed=1)
    base = helpers.write_recipe(folder / "base.yaml", folder / "unused", terms=helpers.TERMS)
    return {
        "output": str(folder / "out"),
        "teacher": str(teacher),
        "base": str(base),
        "recipe": {"data": {"test": "test"}},
        "seeds": [0, 1],
        "variants": {
            "plain": {"terms": {}},
            "kd": {"terms": {"kd": {"weight": 1}}, "seeds": [0]},
        },
        "parallel": 2,
        **changes,
    }


def write(folder, **changes):
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(tree(folder, **changes), sort_keys=False), encoding="utf-8")
    return path


def test_a_variant_that_is_null_is_left_out(tmp_path):
    path = write(tmp_path)
    assert [variant.name for variant in load_comparison(path, ["variants.kd=null"]).variants] == ["plain"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    path = write(folder)
    process = helpers.spawn("compare", path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return path, folder / "out", out


def test_the_grid_holds_every_run_once(compared):
    _, output, out = compared
    runs = {path.parent.relative_to(output).as_posix() for path in output.rglob("recipe.yaml")}
    assert {"teacher", "runs/plain/seed-0", "runs/plain/seed-1", "runs/kd/seed-0"} <= runs
    assert all((output / run / "result.json").is_file() for run in runs)
    assert out.count("begun: ") == len(runs)
    kinds = {run: json.loads((output / run / "run.json").read_text())["kind"] for run in runs}
    assert kinds["runs/kd/seed-0"] == "distill"
    assert kinds["runs/plain/seed-1"] == "train"


def test_the_table_is_printed_and_written(compared):
    _, output, out = compared
    results = json.loads((output / "results.json").read_text())
    rows = {(row["variant"], row["round"]): row for row in results["rows"]}
    plain, kd = rows["plain", "steps"], rows["kd", "steps"]
    assert (plain["seeds"], kd["seeds"]) == ([0, 1], [0])
    assert plain["difference"] is None
    assert kd["difference_seeds"] == [0]
    for seed in (0, 1):
        result = json.loads((output / f"runs/plain/seed-{seed}/result.json").read_text())
        assert plain["miou"]["test"][str(seed)] == pytest.approx(result["best"]["test"]["miou"])
        assert plain["miou"]["val"][str(seed)] == result["best"]["val"]["miou"]
    expected = kd["miou"]["test"]["0"] - plain["miou"]["test"]["0"]
    assert kd["difference"]["all"]["mean"] == pytest.approx(expected)
    assert kd["difference"]["all"]["low"] <= expected <= kd["difference"]["all"]["high"]
    assert kd["peak_memory_gib"] > 0.1
    assert set(results["teacher"]) == {"val", "test"}
    lines = list(csv.DictReader((output / "results.csv").open()))
    assert [(line["variant"], line["round"]) for line in lines] == list(rows)
    assert float(lines[0]["test_miou"]) > 0
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "results.md").read_text()
    for title in ("equal steps: mIoU", "equal seconds: mIoU"):
        assert title in out
        assert title in text
    assert max(map(len, out[out.index("equal steps") :].splitlines()[:9])) <= 80  # a terminal's width
    assert f"| plain | 2 | {helpers.STEPS} |" in text
    assert "| s/step | GiB |" in text
    numbers = [
        word for line in text.splitlines() if line.startswith("| ") for word in line.split() if word[-1].isdigit()
    ]
    assert len(numbers) > 20
    assert [number for number in numbers if number not in out.split()] == []  # nothing is cut off, but wrapped


def test_everybody_gets_the_seconds_of_the_slowest(compared):
    _, output, _ = compared
    results = json.loads((output / "results.json").read_text())
    rows = {(row["variant"], row["round"]): row for row in results["rows"]}
    slowest = max(("plain", "kd"), key=lambda name: rows[name, "steps"]["seconds_per_step"])
    other = {"plain": "kd", "kd": "plain"}[slowest]
    assert results["seconds_budget"] == pytest.approx(rows[slowest, "steps"]["seconds_per_step"] * helpers.STEPS)
    steps = round(results["seconds_budget"] / rows[other, "steps"]["seconds_per_step"])
    assert rows[slowest, "seconds"]["steps"] == helpers.STEPS
    assert rows[other, "seconds"]["steps"] == steps
    assert rows[other, "seconds"]["steps"] >= helpers.STEPS


def test_pairs_begin_from_the_same_student(compared):
    _, output, _ = compared
    first = {
        name: helpers.steps(output / "runs" / name / "seed-0")[0]["terms"]["task"]["raw"] for name in ("plain", "kd")
    }
    assert first["plain"] == first["kd"]


def test_a_finished_grid_is_not_made_again_and_can_grow(compared):
    path, output, _ = compared
    before = {name: stamp for name, stamp in helpers.snapshot(output / "runs").items() if "counts" not in name}
    said = helpers.gskd_ok("compare", path, "--table")
    assert "equal seconds" in said.out
    added = helpers.gskd_ok("compare", path, "variants.kd.seeds=[0,1]", "equal_seconds=off", "parallel=1")
    assert added.out.count("begun: ") == 1
    assert "begun: kd seed 1" in added.out
    after = helpers.snapshot(output / "runs")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("change", ["images", "labels"])
def test_runs_are_compared_on_the_same_images_and_labels(compared, tmp_path, change):
    """What was kept of one run is of a test split that has changed since: another image, or other labels."""
    path, output, _ = compared
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    options = ["compare", path, f"output={copy}", "--table", "equal_seconds=off"]
    helpers.gskd_ok(*options)
    expected = json.loads((copy / "results.json").read_text())["rows"]
    kept = next((copy / "runs/kd/seed-0").glob("counts_test_*.npy"))
    counts = np.load(kept)
    stale = np.concatenate([counts, counts[:1]]) if change == "images" else counts + np.eye(3, dtype=np.int64)[:, [1]]
    np.save(kept, stale)
    said = helpers.gskd_ok(*options).out
    assert "images or labels of test have changed" in said
    assert json.loads((copy / "results.json").read_text())["rows"] == expected
    assert np.array_equal(np.load(kept), counts)


def test_a_test_split_without_labels_is_not_compared_on(compared, tmp_path):
    path, output, _ = compared
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    for file in copy.rglob("result.json"):
        result = json.loads(file.read_text())
        result["best"]["test"]["miou"] = None
        file.write_text(json.dumps(result))
    helpers.gskd_ok("compare", path, f"output={copy}", "--table", "equal_seconds=off")
    results = json.loads((copy / "results.json").read_text())
    assert results["compared_on"] == "val"
    assert {row["variant"]: row["miou"]["test"]["0"] for row in results["rows"]} == {"plain": None, "kd": None}
    assert results["rows"][1]["difference"]["all"]["low"] <= results["rows"][1]["difference"]["all"]["high"]


def test_a_finished_run_is_not_taken_for_one_of_another_recipe_or_teacher(compared, tmp_path):
    path, output, _ = compared
    for option in ((), ("--table",)):
        outcome = helpers.gskd("compare", path, "recipe.train.lr=0.5", *option)
        assert outcome.code == 2
        assert "was begun with another recipe: train.lr was 0.001, is now 0.5" in outcome.err
    copy = shutil.copytree(output, tmp_path / "out")
    shutil.copy(output / "runs/plain/seed-0/student.safetensors", copy / "teacher/student.safetensors")
    outcome = helpers.gskd("compare", path, f"output={copy}", "--table")
    assert outcome.code == 2
    assert "kd/seed-0: was begun with another teacher" in outcome.err


def test_a_pace_that_moves_a_little_does_not_throw_runs_away(tmp_path):
    plain = {"terms": {}, "train": {"steps": 100}}
    comparison = load_comparison(write(tmp_path, seeds=[0], variants={"fast": plain, "slow": plain}))
    fast, slow = comparison.variants

    def finish(cell, seconds):
        cell.run.path.mkdir(parents=True, exist_ok=True)
        cell.run.recipe_file.write_text(dump_recipe(cell.recipe))
        cell.run.info_file.write_text(json.dumps({"kind": "train", "classes": [], "palette": []}))
        cell.run.result.write_text(json.dumps({"seconds": seconds}))

    finish(equal_steps_cell(comparison, fast, 0), 10)
    assert equal_seconds_cell(comparison, fast, 0) is None  # not before all have been timed
    finish(equal_steps_cell(comparison, slow, 0), 20)
    first = equal_seconds_cell(comparison, fast, 0)
    assert first.recipe.train.steps == 200
    assert equal_seconds_cell(comparison, slow, 0) == equal_steps_cell(comparison, slow, 0)
    finish(first, 20)
    for seconds, same in ((10.1, True), (9.9, True), (7, False)):
        finish(equal_steps_cell(comparison, fast, 0), seconds)
        assert (equal_seconds_cell(comparison, fast, 0).run == first.run) == same


def test_an_interrupted_grid_continues(tmp_path):
    path = write(tmp_path, equal_seconds="off", recipe={"train": {"steps": 12}}, variants={"plain": {"terms": {}}})
    process = helpers.spawn("compare", path)
    run = tmp_path / "out" / "runs" / "plain" / "seed-0"
    helpers.wait_until(lambda: any((run / "checkpoints").glob("step-*")), process, 120)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    teacher = helpers.snapshot(tmp_path / "out" / "teacher")
    assert not (tmp_path / "out" / "results.json").exists()
    said = helpers.gskd_ok("compare", path)
    assert "begun: teacher" not in said.out
    assert helpers.snapshot(tmp_path / "out" / "teacher") == teacher
    assert "resumed at step" in (run.parent / "seed-0.log").read_text()
    assert [line["step"] for line in helpers.steps(run)] == list(range(1, 13))


def test_a_run_that_fails_is_named_after_the_others_are_made(tmp_path):
    variants = {"plain": {"terms": {}}, "bad": {"terms": {"kd": {"student": "nowhere"}}}}
    path = write(tmp_path, seeds=[0], variants=variants, equal_seconds="off")
    outcome = helpers.gskd("compare", path)
    assert outcome.code == 2
    assert (
        "1 of 2 runs failed: bad seed 0: gskd: DeepLab" in outcome.err
        or "layer 'nowhere' does not exist" in outcome.err
    )
    assert "plain" in outcome.out
    assert (tmp_path / "out" / "results.csv").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key sedes; did you mean 'seeds'"),
        ({"base": None}, "base: missing"),
        ({"base": "scene"}, "no such file"),
        ({"variants": {"a": {"train": {"stepz": 3}}}}, "variants.a: unknown key train.stepz"),
        ({"variants": {"a": {"seed": 3}}}, "variants.a.seed: is the comparison's"),
        ({"variants": {"a/b": {}}}, "expected a name of letters"),
        ({"variants": {"a": {"terms": {}}}, "baseline": "b"}, "no variant 'b'"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"seeds": "0"}, "seeds: expected a list of whole numbers"),
        ({"parallel": 0}, "parallel: expected a whole number"),
        ({"equal_seconds": "fast"}, "equal_seconds: expected one of slowest, baseline, off"),
        ({"teacher": None}, "neither the comparison nor its base names a teacher"),
        ({"seeds": [-1]}, "seeds: expected a list of whole numbers from 0"),
        ({"variants": {"a": {"terms": {"cdw": {}}}}}, "variants.a.terms.cdw: unknown loss 'cdw'; did you mean"),
        ({"variants": {"a": {"terms": {"at": {"args": {"x": 1}}}}}}, "terms.at.args: no argument 'x'; at takes none"),
        ({"variants": {"a": {}, "b": {"data": {"test": "val"}}}}, "variants.b.data: differs from that of a"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    outcome = helpers.gskd("compare", path)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_terms_of_a_variant_replace_those_of_the_base(tmp_path):
    variants = load_comparison(write(tmp_path)).variants
    assert [list(variant.recipe.terms) for variant in variants] == [[], ["kd"]]
    kept = load_comparison(write(tmp_path, variants={"all": {"train": {"lr": 0.5}}})).variants[0]
    assert set(kept.recipe.terms) == set(helpers.TERMS)
    assert kept.recipe.train.lr == 0.5
    assert kept.recipe.train.batch == 4


def test_a_teacher_to_train_replaces_the_one_that_the_base_names(tmp_path):
    comparison = load_comparison(write(tmp_path, base="cityscapes_r101_r18", recipe={}))
    assert comparison.variants[0].recipe.teacher.run == str(tmp_path / "out" / "teacher")


def test_what_is_said_of_teacher_and_terms_for_all_is_the_students(tmp_path):
    """So that the place of the cache can be named on the command line, beside that of the data."""
    changes = {"teacher": {"cache": "elsewhere"}, "terms": {"kd": {"weight": 3}}, "augment": {"views": 4}}
    comparison = load_comparison(
        write(tmp_path, base="camvid_gskd", teacher="camvid_teacher", recipe=changes, variants={"all": {}})
    )
    student = comparison.variants[0].recipe
    assert (student.teacher.cache, student.terms["kd"].weight, student.augment.views) == ("elsewhere", 3, 4)
    assert (comparison.teacher.teacher, comparison.teacher.terms, comparison.teacher.augment.views) == (None, {}, 4)


def test_more_steps_do_not_give_more_scores_to_pick_the_best_from(tmp_path):
    variant = load_comparison(write(tmp_path)).variants[0]
    assert (variant.at(0, tmp_path).train.steps, variant.at(0, tmp_path).eval.every) == (helpers.STEPS, 2)
    longer = variant.at(0, tmp_path, 3 * helpers.STEPS)
    assert (longer.train.steps, longer.eval.every) == (3 * helpers.STEPS, 6)


@pytest.mark.slow
def test_the_lock_lives_as_long_as_the_runs(tmp_path):
    """Killed without a chance to clean up, a comparison leaves runs behind; nobody may start beside them."""
    changes = {"seeds": [0], "recipe": {"train": {"steps": 2000}}, "teacher": None}
    path = write(tmp_path, variants={"plain": {"terms": {}}}, **changes)
    process = helpers.spawn("compare", path)
    run = tmp_path / "out" / "runs" / "plain" / "seed-0"
    helpers.wait_until((run / "metrics.jsonl").is_file, process, 120)
    process.kill()
    process.wait()
    outcome = helpers.gskd("compare", path)
    for orphan in psutil.process_iter(["cmdline"]):
        if str(run.with_name("seed-0.yaml")) in (orphan.info["cmdline"] or []):
            orphan.kill()
            orphan.wait()
    process.communicate()
    assert outcome.code == 2
    assert "another gskd compare works on it" in outcome.err


def test_two_at_once_on_one_folder_are_refused(tmp_path):
    import fcntl

    path = write(tmp_path)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = helpers.gskd("compare", path)
    assert outcome.code == 2
    assert "another gskd compare works on it" in outcome.err


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (Path(gskd.__file__).parent / "recipes").glob("compare_*.yaml"))
)
def test_shipped_comparisons_are_whole(name):
    comparison = load_comparison(name)
    without_teacher = {variant.name: variant.recipe.train for variant in comparison.variants if not variant.distils}
    assert without_teacher.keys() - {"balanced"} == {"plain"}
    assert without_teacher["plain"].class_balance == 0
    assert without_teacher.get("balanced", without_teacher["plain"]).class_balance == float(
        "balanced" in without_teacher
    )


def test_a_table_of_nothing_says_so(tmp_path):
    outcome = helpers.gskd("compare", write(tmp_path), "--table")
    assert outcome.code == 2
    assert "holds no finished run yet" in outcome.err
