"""The report's page in Chromium: what a user sees of a run, and that it asks for nothing and complains of nothing.

Screenshots stay in the folder that the environment variable WW_ARTIFACTS names.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.browser import CHROMIUM, FLAGS, NEEDS_A_BROWSER, train
from ww_monitor import Finding, History, Layer, Monitor, Snapshot, write_report
from ww_monitor.sinks.jsonl import JsonLines

pytest.importorskip("plotly", reason="its script is in the page; `pip install plotly`")
pytestmark = NEEDS_A_BROWSER

LAYERS = ["encoder.0", "encoder.2", "head"]
HOSTILE = [
    "<script>alert(1)</script>",
    "../../x",
    "a\u2028b",
    "\"'`</script><img src=x onerror=alert(1)>",
    "<a href='https://example.org'>%{x}</a>",
    "__proto__",
    "constructor",
    "🔥 & слой",
]

CONTRAST = """() => {
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parts = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, under) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => a * top[i] + (1 - a) * under[i]); };
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const color = parts(getComputedStyle(at).backgroundColor);
      if (color.length && color[3] !== 0) { layers.push(color); if ((color[3] ?? 1) === 1) break; }
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walker.nextNode()); ) {
    const node = text.parentElement, box = node.getBoundingClientRect();
    if (!text.data.trim() || !box.width || !box.height || node.closest("script, style, [hidden]")) continue;
    const style = getComputedStyle(node), svg = node instanceof SVGElement;
    const ink = over(parts(svg ? style.fill : style.color), ground(node)), [a, b] = [light(ink), light(ground(node))];
    found.push([text.data.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""
"""Every text in sight and the contrast of its colour with what is behind it (WCAG 2.1)."""


def recorded(folder: Path) -> History:
    """The history file of a run."""
    train(lambda net: Monitor(every_n_steps=5, sinks=[JsonLines(folder / "ww_history.jsonl")]))
    return History.read(folder / "ww_history.jsonl")


def hostile() -> Snapshot:
    layers = tuple(
        Layer(name, "dense", (1, 8, 8), verdict="ok", metrics={"alpha": 3.0, "<b>": 1.0, "constructor": 2.0})
        for name in HOSTILE
    )
    findings = tuple(Finding("trap<img>", name, "critical", f"{name}: </script><img src=x>") for name in HOSTILE)
    return Snapshot(layers, step=0, findings=findings, summary={"alpha": 3.0})


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    api = pytest.importorskip("playwright.sync_api", reason="the browser's driver; `pip install playwright`")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield found
        found.close()


class Look:
    """A page that was opened from disk, and what it asked for and said."""

    def __init__(self, browser, path: Path, scheme: str) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000}, color_scheme=scheme)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: [self.said.append(dialog.message), dialog.dismiss()])
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.locator("html[data-ready]").wait_for(state="attached", timeout=60_000)

    def open_layer(self, row: int) -> None:
        self.page.locator("#layers .body .row button.layer").nth(row).click()
        self.page.locator("#layer-other .main-svg").first.wait_for()

    def map(self, key: str):
        return self.page.evaluate(f"Array.from(document.querySelector('#map').data[0].{key}, (row) => Array.from(row))")

    def column(self, number: int) -> list[str]:
        rows = self.page.locator("#layers .body .row").all()
        return [row.locator("[role=cell]").nth(number).inner_text() for row in rows]


@pytest.fixture(scope="module")
def look(browser, tmp_path_factory):
    """A function: open the report of some runs; what was opened stays quiet to the end."""
    opened = []

    def made(*runs, scheme="light"):
        path = write_report(*runs, path=tmp_path_factory.mktemp("page") / "report.html")
        opened.append((path, Look(browser, path, scheme)))
        return opened[-1][1]

    yield made
    for path, one in opened:
        assert (
            one.said,
            [url for url in one.asked if url != path.as_uri() and not url.startswith(("data:", "blob:"))],
        ) == ([], [])


@pytest.fixture(scope="module")
def one(look, history):
    return look(history)


def save(page, name: str) -> None:
    if folder := os.environ.get("WW_ARTIFACTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"report-{name}.png", full_page=True)


def test_the_map_has_a_cell_a_layer_and_a_step(one, history):
    z = np.array(one.map("z"), float)
    assert z.shape == (len(LAYERS), len(history))
    shown = one.page.evaluate("document.querySelector('#map').layout.yaxis.ticktext")
    expected = [history.series("alpha", layer=name)[1] for name in shown]
    assert z == pytest.approx(np.array(expected), rel=1e-3, nan_ok=True)
    one.page.locator("#map-metric").select_option("trap_headroom")
    one.page.locator("#map[data-metric=trap_headroom]").wait_for()
    assert np.array(one.map("z"), float) == pytest.approx(
        np.array([history.series("trap_headroom", layer=name)[1] for name in shown]), rel=1e-3
    )
    save(one.page, "light")


def test_the_models_curves_have_the_findings_on_their_axis(one, history):
    traces = one.page.evaluate(
        "document.querySelector('#curves [data-metric=alpha] .js-plotly-plot').data.map(({x, name}) => ({x, name}))"
    )
    begun = {finding.step for finding in history.findings if finding.severity == "critical"}
    assert begun
    (critical,) = [trace for trace in traces if trace["name"] == "critical"]
    assert traces[-1] == critical, "nothing lies on it"
    assert set(critical["x"]) == begun


def test_the_table_sorts_either_way(one, history):
    for column, metric in ((4, "alpha"), (6, "trap_headroom")):
        header = one.page.locator("#layers .head button").nth(column)
        header.click()
        falling = sorted(LAYERS, key=lambda name: -history.last[name].value(metric))
        assert one.column(0) == falling
        header.click()
        assert one.column(0) == falling[::-1]
        assert one.page.locator("#layers .head [aria-sort=ascending]").count() == 1
    one.page.locator("#find").fill("head")
    assert one.column(0) == ["head"]
    one.page.locator("#find").fill("")
    one.page.locator("#layers .head button").first.click()
    assert one.column(0) == LAYERS


def test_a_click_opens_a_layer_with_its_spectrum_and_the_slider_changes_it(one, history):
    one.open_layer(1)
    page = one.page
    assert page.locator("#layer-name").inner_text() == "encoder.2"

    def drawn():
        return page.evaluate(
            "document.querySelector('#esd').data.map(({name, x, y}) => [name, Array.from(x), Array.from(y)])"
        )

    last = drawn()
    placed = {name.split(" = ")[0]: x[0] for name, x, _ in last if " = " in name}
    row = history.last["encoder.2"]
    expected = {
        "xmin": row.value("xmin"),
        "Marchenko–Pastur edge": row.value("bulk_max"),
        "detX": row.value("erg_lambda"),
    }
    assert placed == pytest.approx(expected, rel=1e-3)
    assert any(name.startswith("power law, alpha") for name, _, _ in last)
    layout = page.evaluate(
        "[document.querySelector('#esd').layout.xaxis.type, document.querySelector('#esd').layout.yaxis.type]"
    )
    assert layout == ["log", "log"]
    assert "w" not in page.locator("#entries table td").first.inner_text()
    assert page.locator("#entries td").all_inner_texts()[:3] == ["0", "3", "4"]
    save(page, "layer")
    page.locator("#esd-step").fill("0")
    assert page.locator("#esd-label").inner_text() == f"step 0 (1 of {len(history)})"
    first = drawn()
    assert first[0][1:] != last[0][1:]
    assert page.locator("#entries").inner_text() == "There are none at this step."
    esd = history[0]["encoder.2"].esd
    assert len(first[0][1]) == sum(count > 0 for count in esd.counts)
    assert page.evaluate("Array.from(document.querySelector('#layer-headroom').data[0].y)") == pytest.approx(
        history.series("trap_headroom", layer="encoder.2")[1], rel=1e-3
    )
    page.keyboard.press("Escape")
    assert not page.locator("#layer").is_visible()


def test_a_name_in_the_first_sentence_opens_its_layer(one):
    one.page.locator("#lead button.layer").first.click()
    assert one.page.locator("#layer-name").inner_text() == "encoder.2"
    one.page.locator("#close").click()


def test_both_themes_can_be_read(one):
    one.open_layer(1)
    for theme in ("light", "dark"):
        assert one.page.evaluate("document.documentElement.dataset.theme") == theme
        found = one.page.evaluate(CONTRAST)
        assert len(found) > 150
        assert [(text, ratio) for text, ratio in found if ratio < 4.5] == []
        save(one.page, f"{theme}-layer")
        one.page.evaluate("document.querySelector('#theme').click()")
        one.page.wait_for_timeout(300)


def test_two_runs_are_aligned_by_step_and_their_differences_coloured(look, history):
    other = History(
        replace(
            snapshot,
            layers=tuple(
                replace(layer, metrics={**layer.metrics, "alpha": layer.value("alpha") + 9})
                for layer in snapshot.layers
            ),
        )
        for snapshot in history.snapshots[2:]
    )
    two = look(history, other, scheme="dark")
    assert two.page.evaluate("document.documentElement.dataset.theme") == "dark"
    two.page.locator("#map-run").select_option("difference")
    two.page.wait_for_function(f"document.querySelector('#map').data[0].x.length === {len(other)}")
    z = np.array(two.map("z"), float)
    assert z == pytest.approx(np.full_like(z, 9.0), abs=0.01)
    worse = two.page.locator("#layers .body .row .worse").all_inner_texts()
    assert worse == ["+9.00"] * len(LAYERS)
    two.open_layer(0)
    names = two.page.evaluate("document.querySelector('#esd').data.map(({name}) => name)")
    assert {"eigenvalues A", "eigenvalues B"} <= set(names)
    shares = "[...document.querySelectorAll('#curves [data-metric=verdict] .js-plotly-plot')]"
    ranges = two.page.evaluate(f"{shares}.map((one) => one.layout.xaxis.range)")
    assert ranges == [[history[0].step, history.last.step]] * 2
    save(two.page, "two")


def test_hostile_names_are_shown_and_do_nothing(look):
    page = look(hostile())
    assert page.column(0) == HOSTILE
    assert page.page.evaluate("document.images.length") == 0
    assert page.page.locator("a").count() == 0
    page.open_layer(3)
    assert page.page.locator("#layer-name").inner_text() == HOSTILE[3]
    assert page.page.locator("#esd-note").inner_text() == "The history has no spectrum of this layer."
    assert page.page.locator("#layer-findings li").all_inner_texts() == [
        "trap<img> from step 0 on: </script><img src=x>"
    ]
    for metric in ("<b>", "constructor"):
        page.page.locator("#map-metric").select_option(metric)
        page.page.locator(f"#map[data-metric='{metric}']").wait_for()
    assert page.page.locator("svg a, img").count() == 0


def test_one_layer_of_which_nothing_is_known_is_a_page_too(look):
    page = look(
        Snapshot((Layer("only", "dense", (1, 8, 8), status="error: it broke", metrics={"alpha": float("nan")}),))
    )
    assert page.page.locator("#lead li").count() == 3
    assert page.column(2) == ["the analysis failed"]
    page.open_layer(0)
    assert page.page.locator("#esd").is_hidden()


def test_a_snapshot_without_layers_is_a_page_too(look):
    page = look(Snapshot((), step=3))
    assert page.page.locator("#layers").inner_text().endswith("No layer.")
    for table in ("#layers", "#findings"):
        box, text = (page.page.locator(f"{table}{inner}").bounding_box() for inner in ("", " .empty"))
        assert text["y"] + text["height"] <= box["y"] + box["height"], "the sentence is in sight"
    assert not page.page.locator("#map-section").is_visible()


def test_layers_without_a_partner_have_no_difference_and_it_is_said(look):
    one, other = (Snapshot((Layer(name, "dense", (1, 8, 8), metrics={"alpha": 3.0}),), step=0) for name in "ab")
    page = look(one, other).page
    page.locator("#map-run").select_option("difference")
    page.wait_for_function("document.querySelector('#map').hidden")
    assert page.locator("#map-here").inner_text() == "No layer of A has a partner of its name in B."
    page.locator("#map-run").select_option("b")
    page.wait_for_function("!document.querySelector('#map').hidden")


def test_a_band_has_gaps_where_nothing_is_known_and_long_names_end_in_sight(look):
    def snapshot(step):
        known = {"alpha": float("nan") if step == 3 else 3.0, "sigma": 0.5}
        layer = Layer("model.decoder." + 9 * "very." + "long.name", "dense", (1, 8, 8), verdict="ok", metrics=known)
        return Snapshot((layer,), step=step, summary=known)

    page = look([snapshot(step) for step in range(6)])
    page.open_layer(0)
    x, y = page.page.evaluate("[document.querySelector('#layer-alpha').data[0]].flatMap(({x, y}) => [x, y])")
    assert x == [0, 1, 2, 2, 1, 0, None, 4, 5, 5, 4, None]
    assert y == [2.5, 2.5, 2.5, 3.5, 3.5, 3.5, None, 2.5, 2.5, 3.5, 3.5, None]
    style = page.page.evaluate("getComputedStyle(document.querySelector('#layers .body button.layer')).direction")
    assert style == "rtl"
