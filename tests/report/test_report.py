"""The report: what it says is what the runs say, and every control of the page does what it is there for."""

import contextlib
import json
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from gskd import auto_tap
from gskd.assembly import open_split
from gskd.report import gather, write_page
from gskd.report.content import BEFORE, TEACHER
from gskd.run import Run, inference_of
from gskd.structure import StructureReader, similarity_everywhere, similarity_map
from helpers import assert_refused, gskd, gskd_ok, snapshot

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


def embedded(page):
    """What the page's script reads; as strictly as a browser does."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory):
    """Of the plain and the distilled student."""
    before = snapshot(tiny.folder)
    output = tmp_path_factory.mktemp("report") / "report.html"
    said = gskd_ok("report", tiny.plain, tiny.distilled, "-o", output, "--images", 3, "--explored", 2).out
    assert "MiB" in said
    assert snapshot(tiny.folder) == before  # it only looks
    return output


@pytest.fixture(scope="module")
def data(page):
    return embedded(page)


def test_it_needs_nothing_from_outside(page):
    class Links(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag, attrs):
            self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]

    links = Links()
    links.found = []
    text = page.read_text()
    links.feed(text)
    assert all(link.startswith(("#", "data:")) for link in links.found)
    assert "default-src 'none'" in text
    assert not re.search(r"fetch\(|XMLHttpRequest|@import|url\((?!#)", text.split('id="data"')[0])


def test_it_says_what_the_runs_say(tiny, page, data):
    content = gather([tiny.plain, tiny.distilled], images=1, explored=0)
    rows = {row["name"]: row for row in content.rows}
    assert list(rows) == data["networks"] == [TEACHER, BEFORE, "plain", "distilled"]
    for name, folder in {"plain": tiny.plain, "distilled": tiny.distilled}.items():
        result = Run(folder).read_result()
        assert rows[name]["miou"]["val"] == result["best"]["val"]["miou"]
        assert rows[name]["iou"] == list(result["best"]["val"]["iou"].values())
        assert rows[name]["parameters"] == result["parameters"]
        assert f"{100 * result['best']['val']['miou']:.1f}" in page.read_text()
    assert rows[TEACHER]["miou"]["val"] == Run(tiny.distilled).read_result()["teacher"]["val"]["miou"]
    assert rows[TEACHER]["parameters"] > rows["plain"]["parameters"]
    assert rows[BEFORE]["multiply_adds"] == rows["plain"]["multiply_adds"] > 1e6
    assert sum(content.share) == pytest.approx(1)
    assert "differences are to <b>plain</b>" in page.read_text()


def test_pictures_are_what_the_networks_predict(tiny, tmp_path):
    content = gather([tiny.distilled], images=2, explored=0)
    gskd_ok("eval", tiny.distilled, "--json", tmp_path / "score.json")
    right = labelled = 0
    content = gather([tiny.distilled], images=99, explored=0)
    for picture in content.pictures:
        valid = picture.labels["truth"] != 255
        right += (picture.labels["distilled"] == picture.labels["truth"])[valid].sum()
        labelled += valid.sum()
    assert right / labelled == pytest.approx(json.loads((tmp_path / "score.json").read_text())["pixel_accuracy"])


def test_the_student_before_training_is_the_one_that_was_trained(tiny):
    """Its maps move from there: the same seed, the same first weights."""
    structure = gather([tiny.distilled], images=1, explored=1).structures[0]
    assert set(structure.similarity) == {TEACHER, BEFORE, "distilled"}
    before, after = structure.similarity[BEFORE], structure.similarity["distilled"]
    assert 0 < (before - after).abs().mean() < 0.5
    for name, one in structure.similarity.items():
        torch.testing.assert_close(one, one.T)
        own = one.diagonal()  # 0 of a point at which no channel is active
        assert ((own - 1).abs().lt(1e-5) | own.eq(0)).all()
        assert structure.everywhere[name].shape[0] == len(one)


def test_structure_is_of_what_was_distilled(tiny, tmp_path):
    """Of a run with GSKD on class probabilities alone, it is theirs: not that of features nobody asked to move."""
    run = tmp_path / "on_logits"
    terms = "terms={gskd_logits: {weight: 10}}"
    gskd_ok("distill", tiny.recipe, f"output={run}", terms, "teacher.cache=null", "train.steps=2")
    content = gather([tiny.plain, run], images=1, explored=1)
    write_page(content, tmp_path / "r.html")
    assert content.vectors == "class probabilities"
    assert (tmp_path / "r.html").read_text().count("of class probabilities") == 1
    found = content.structures[0]
    data = open_split(Run(run).load_recipe(), "val")
    sample = data[0]
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    for name, folder in {TEACHER: tiny.teacher, "on_logits": run, "plain": tiny.plain}.items():
        model, inference = Run(folder).load_model(), inference_of(Run(folder).load_recipe())
        layer = auto_tap(model, "logits")
        logits, everywhere = StructureReader(model, layer, inference).features(image, found.points)
        torch.testing.assert_close(found.similarity[name], similarity_map(logits.softmax(1)))
        shares = similarity_everywhere(logits.softmax(1), everywhere.softmax(0))
        assert found.everywhere[name].mean().item() == pytest.approx(shares.mean().item(), abs=0.02)
    assert gather([tiny.distilled, run], images=1, explored=0).vectors == "features"  # the first run's


def test_a_run_of_train_alone_has_no_teacher(tiny):
    content = gather([tiny.plain], images=1)
    assert [row["name"] for row in content.rows] == [BEFORE, "plain"]
    assert not content.structures[0].error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["names no run folder"]),
        (["@nowhere"], ["nowhere", "holds no recipe.yaml"]),
        (["@plain", "@plain"], ["named twice"]),
        (["@plain", "data.val=nowhere"], ["nowhere"]),
        (["@plain", "-o", "no/such/report.html"], ["no/such", "no folder"]),
    ],
    ids=str,
)
def test_what_cannot_be_shown_is_one_line(tiny, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    places = {"@nowhere": tmp_path / "nowhere", "@plain": tiny.plain}
    given = [places.get(argument, argument) for argument in arguments] or ["seed=1"]
    assert_refused(gskd("report", *given), *parts)
    assert not list(tmp_path.glob("*.html"))


def test_a_file_that_is_there_stays(tiny, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    assert_refused(gskd("report", tiny.plain, "-o", tmp_path / "report.html"), "exists already")
    assert (tmp_path / "report.html").read_text() == "mine"


def test_pictures_of_one_class_and_odd_names(tiny, tmp_path):
    """No pair of two classes, hence no number; a name that is mathematics to a plotting library; no metrics."""
    one_class = "_odd $ {$x_1$"
    shutil.copytree(tiny.distilled, tmp_path / one_class)
    (tmp_path / one_class / "metrics.jsonl").write_text("")
    content = gather([tiny.plain, tmp_path / one_class], images=2, explored=2)
    for structure in content.structures:
        assert all(np.isfinite(structure.error[name]).all() for name in structure.error)
    content.structures[0].error["plain"] = (0.1, float("nan"))
    write_page(content, tmp_path / "r.html")
    embedded(tmp_path / "r.html")


def test_runs_on_other_data_are_not_put_side_by_side(tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny.plain, other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("length: 4", "length: 3"))
    assert_refused(gskd("report", tiny.plain, other, "-o", tmp_path / "r.html"), "other was scored on other data")


def test_what_must_be_known_is_said(tiny, tmp_path):
    wider = tmp_path / "wider"
    shutil.copytree(tiny.teacher, wider)
    content = gather([tiny.plain, tiny.distilled, wider], ["eval.scales=[0.5]"], images=1, explored=0)
    notes = " ".join(content.notes)
    assert "different networks" in notes
    assert "with eval.scales=[0.5]" in notes
    write_page(content, tmp_path / "r.html")
    assert "differences are to <b>plain</b>" in (tmp_path / "r.html").read_text()


def test_an_unfinished_run_is_named(tiny, tmp_path):
    shutil.copytree(tiny.plain, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert_refused(gskd("report", tmp_path / "run", "-o", tmp_path / "r.html"), "not finished")


def test_names_of_others_are_text(tiny, tmp_path):
    """A folder's name is somebody's text, and no part of the page."""
    run = tmp_path / "<img src=x onerror=alert(1)><script>"
    shutil.copytree(tiny.plain, run)
    gskd_ok("report", run, "-o", tmp_path / "r.html", "--images", 1, "--explored", 0)
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text
    assert text.count("<script") == text.count("</script>") == 2


@pytest.mark.parametrize(("structural", "third"), [("a", "a"), ("c", "d"), ("none", "d")])
def test_runs_of_a_comparison_are_chosen_by_their_score(tmp_path, structural, third):
    """And the best one that has GSKD is among them."""
    from gskd.report.content import _shown

    terms = {structural: {"structure": {"loss": "gskd"}}}

    rows = [
        {
            "variant": name,
            "round": round_,
            "seeds": [seed],
            "miou": {"val": {"0": score}},
            "terms": terms.get(name, {"kd": {"loss": None}}),
        }
        for name, round_, seed, score in [
            ("plain", "steps", 0, 0.1),
            ("a", "steps", 0, 0.2),
            ("b", "steps", 2, 0.5),
            ("c", "steps", 0, 0.4),
            ("d", "steps", 0, 0.3),
            ("a", "seconds", 0, 0.9),
        ]
    ]
    shown = _shown(tmp_path, {"baseline": "plain", "compared_on": "val", "rows": rows})
    assert [path.relative_to(tmp_path).as_posix() for path in shown] == [
        "runs/plain/seed-0",
        "runs/b/seed-2",
        "runs/c/seed-0",
        f"runs/{third}/seed-0",
    ]


# In a browser


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    if BROWSER is None or DRIVER is None:
        pytest.skip("needs Chromium and its driver: apt install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage")
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("headless", "no-sandbox", "no-first-run", f"user-data-dir={profile}", "window-size=1200,1000"):
        options.add_argument(f"--{argument}")
    for argument in quiet:
        options.add_argument(f"--disable-{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get(page.as_uri())
    deadline = time.monotonic() + 60
    while not driver.execute_script("return document.body.dataset.ready") and time.monotonic() < deadline:
        time.sleep(0.05)
    yield driver
    logged = driver.get_log("browser")
    driver.quit()
    assert not logged


def pixels(browser, selector):
    """What a canvas shows."""
    return browser.execute_script("return document.querySelector(arguments[0]).toDataURL()", selector)


def text(browser, selector):
    return browser.find_element("css selector", selector).text


def choose(browser, selector, value):
    script = """const s = document.querySelector(arguments[0]); s.value = arguments[1];
        s.dispatchEvent(new Event("input")); s.dispatchEvent(new Event("change")); return s.value"""
    assert browser.execute_script(script, selector, str(value)) == str(value)
    time.sleep(0.2)


@contextlib.contextmanager
def changes(browser, *selectors):
    before = [pixels(browser, selector) for selector in selectors]
    yield
    for selector, old in zip(selectors, before, strict=True):
        assert pixels(browser, selector) != old, f"{selector} did not change"


def test_the_page_is_ready_without_a_complaint(browser):
    assert browser.execute_script("return document.body.dataset.ready") == "yes"
    assert browser.get_log("browser") == []


def test_every_control_of_the_pictures(browser, data):
    for selector, value in {
        "#left": "image",
        "#right": "errors of distilled",
        "#divide": 20,
        "#strength": 10,
        "#picture": 1,
    }.items():
        with changes(browser, "#view"):
            choose(browser, selector, value)


def test_the_cross_reads_every_network_by_mouse_and_by_keyboard(browser, data):
    view = browser.find_element("css selector", "#view")
    view.click()
    said = text(browser, "#reading")
    for name in ("truth", *data["networks"]):
        assert f"{name}: " in said
    with changes(browser, "#view"):
        view.send_keys("\ue012")  # left


def test_a_point_can_be_chosen_in_every_way(browser, data):
    where, maps = ".panel:nth-child(1) .where", ".panel:nth-child(3) .map"
    for act in (
        lambda: choose(browser, "#point", len(data["structures"][0]["label"]) // 2),
        lambda: browser.find_element("css selector", where).click(),
        lambda: browser.find_element("css selector", maps).click(),
        lambda: browser.find_element("css selector", maps).send_keys("\ue014"),  # right
        lambda: choose(browser, "#scene", 1),
    ):
        before = text(browser, "#byclass")
        with changes(browser, where):
            act()
            time.sleep(0.2)
        assert text(browser, "#byclass") != before


def test_panels_are_teacher_before_and_after(browser, data):
    titles = [panel.text for panel in browser.find_elements("css selector", ".panel h3")]
    assert titles == [TEACHER, BEFORE, "distilled"]
    choose(browser, "#student", "plain")
    assert [panel.text for panel in browser.find_elements("css selector", ".panel h3")][2] == "plain"
    choose(browser, "#student", "distilled")


def test_the_table_says_what_the_map_holds(browser, data, tiny):
    """From the similarity map to the PNG, the canvas and the mean: nothing is lost on the way but rounding."""
    choose(browser, "#scene", 0)
    choose(browser, "#point", 0)
    structure = gather([tiny.plain, tiny.distilled], images=3, explored=2).structures[0]
    label = structure.points.label
    rows = [row.text.split() for row in browser.find_elements("css selector", "#byclass tbody tr")]
    for number, row in zip(label.unique().tolist(), rows, strict=True):
        others = (label == number) & (torch.arange(len(label)) != 0)
        expected = [structure.similarity[name][0, others].mean().item() for name in (TEACHER, BEFORE, "distilled")]
        found = [float(cell) if cell != "-" else np.nan for cell in row[-3:]]
        np.testing.assert_allclose(found, expected, atol=5e-3)


def test_it_fits_a_phone(browser):
    browser.set_window_size(400, 800)
    time.sleep(0.3)
    widths = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    browser.set_window_size(1200, 1000)
    assert widths[0] <= widths[1]


def test_everything_can_be_reached_by_keyboard(browser):
    script = """return [...document.querySelectorAll("select, input, canvas, summary, a, .scroll")]
        .filter((one) => one.id !== "ramp" && one.tabIndex < 0).length"""
    assert browser.execute_script(script) == 0
    named = """return [...document.querySelectorAll("select, input")].filter((one) => !one.labels.length).length"""
    assert browser.execute_script(named) == 0
