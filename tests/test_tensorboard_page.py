"""TensorBoard itself, started on loopback and looked at in Chromium: what a user sees of a run.

Screenshots stay in the folder that the environment variable WW_ARTIFACTS names.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from tests.browser import CHROMIUM, FLAGS, NEEDS_A_BROWSER, train
from tests.processes import start_python
from ww_monitor import History, Monitor, plots
from ww_monitor.sinks.heatmap import alpha_colours
from ww_monitor.walk.torch import walk

LAYERS = ("encoder.0", "encoder.2", "head")
SECONDS = 60

WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
from tensorboard.main import run_main
run_main()
"""
"""TensorBoard, which imports TensorFlow where it is there, for seconds, and does without it."""

pytestmark = NEEDS_A_BROWSER


def recorded(folder: Path) -> History:
    """What TensorBoard has in the folder, and the monitor in memory."""
    from ww_monitor.sinks.tensorboard import TensorBoard

    def watching(net: nn.Module) -> Monitor:
        figures = plots.SpectralFigures(["encoder.2"], every=4, matrices=lambda: walk(net))
        return Monitor(every_n_steps=5, sinks=[TensorBoard(folder, figures=figures)])

    return train(watching).history


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/custom_scalars/layout", timeout=5) as answer:
                if b"ww_monitor" in answer.read():
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    pytest.fail(f"TensorBoard shows no layout after {SECONDS} s: {log.read_text()}")


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The address of a TensorBoard over a real run, and the history of that run."""
    pytest.importorskip("tensorboard", reason="it is looked at itself; `pip install tensorboard`")
    folder = tmp_path_factory.mktemp("board")
    history = recorded(folder / "logs" / "run")
    log, port = folder / "tensorboard.log", free_port()
    command = ["-c", WITHOUT_TENSORFLOW, "--logdir", str(folder / "logs"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast=false", "--reload_interval", "2"]
    with log.open("wb") as out:
        process = start_python(*command, output=out)
        try:
            wait_until_up(f"http://127.0.0.1:{port}", process, log)
            yield SimpleNamespace(address=f"http://127.0.0.1:{port}", history=history)
        finally:
            process.terminate()
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a headless browser that reaches nothing but loopback."""
    api = pytest.importorskip("playwright.sync_api", reason="the browser's driver; `pip install playwright`")
    with api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1500, "height": 1300},
        )
        context.route(lambda url: not url.startswith("http://127.0.0.1:"), lambda route: route.abort())
        yield context.pages[0]
        context.close()


@pytest.fixture
def look(page, board, tmp_path_factory):
    """Open a view, wait for a text on it, save what it looks like."""
    artifacts = os.environ.get("WW_ARTIFACTS")
    folder = Path(artifacts) if artifacts else tmp_path_factory.mktemp("artifacts")
    folder.mkdir(parents=True, exist_ok=True)

    def open_view(view: str, *, wait_for: str):
        page.goto("about:blank")
        page.goto(f"{board.address}/#{view}")
        page.get_by_text(wait_for).first.wait_for(timeout=1000 * SECONDS)
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(1000)

        def save(name: str) -> None:
            page.screenshot(path=folder / f"tensorboard-{name}.png")
            assert (folder / f"tensorboard-{name}.png").stat().st_size > 10_000

        return page, save

    return open_view


CHARTS = {
    "alpha of every layer and the band from 2 to 6": {
        *(f"ww_alpha/{layer}" for layer in LAYERS),
        "ww_band/alpha_low",
        "ww_band/alpha_high",
    },
    "correlation traps of every layer": {f"ww_num_traps/{layer}" for layer in LAYERS},
    "trap headroom of every layer (above 1 a trap is expected)": {
        *(f"ww_trap_headroom/{layer}" for layer in LAYERS),
        "ww/trap_headroom",
        "ww_band/headroom",
    },
}


def legend(card) -> set[str]:
    """The names in the legend of a chart, which is folded at first: a line is a mark and a name."""
    card.locator(".toggle-matches-button").click()
    card.locator(".match-list-entry").first.wait_for(timeout=5000)
    return {" ".join(text.split()[1:]) for text in card.locator(".match-list-entry").all_text_contents()}


def test_the_custom_scalars_page_has_every_layer_in_one_chart(look):
    page, save = look("custom_scalars", wait_for="ww_monitor")
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    assert cards.count() == len(CHARTS)
    for title, tags in CHARTS.items():
        card = cards.filter(has=page.get_by_text(title, exact=True))
        assert card.get_by_text(f"Matches ({len(tags)})").is_visible()
        assert legend(card) == {f"{tag} (run)" for tag in tags}
    save("charts")


def test_the_custom_scalars_page_has_the_models_alpha_in_its_band(look):
    page, _ = look("custom_scalars", wait_for="ww_monitor")
    title = "alpha of the model in the band from 2 to 6"
    card = page.locator("tf-custom-scalar-margin-chart-card").filter(has=page.get_by_text(title, exact=True))
    assert card.get_by_text(title, exact=True).is_visible()
    assert legend(card) == {"ww/alpha (run)"}
    drawn = card.locator("svg path").evaluate_all("paths => paths.map(p => p.getAttribute('d') || '')")
    assert any(path.count("L") >= 8 for path in drawn)


def test_the_images_page_has_alpha_over_time_and_the_spectrum(look, board):
    page, save = look("images", wait_for="ww/alpha_map")
    assert page.get_by_text("ww_spectrum/encoder.2", exact=True).is_visible()
    save("images")
    sources = page.locator("tf-image-loader img").evaluate_all("images => images.map(i => i.src)")
    sizes = page.locator("tf-image-loader img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(sources) == 2
    assert min(sizes) > 300
    from PIL import Image

    with urllib.request.urlopen(sources[0], timeout=10) as answer:
        picture = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    last = board.history.last
    for layer in LAYERS:
        colour = alpha_colours(np.array([last[layer].value("alpha")]))[0]
        assert (picture == colour).all(-1).sum() >= 36 * 18, layer


def test_the_text_page_tells_the_trap_and_its_address(look):
    page, save = look("text", wait_for="ww/findings/text_summary")
    assert page.get_by_text("trap at step 25: encoder.2: ", exact=False).first.is_visible()
    assert page.get_by_text("w[3, 4] = ", exact=False).first.is_visible()
    assert page.get_by_text("Holding now:").first.is_visible()
    save("text")


def test_the_histograms_page_has_the_esd_of_every_layer(look):
    page, save = look("histograms&tagFilter=ww_esd", wait_for="encoder.2")
    for layer in LAYERS:
        assert page.get_by_text(f"ww_esd/{layer}").first.is_visible()
    save("histograms")
