"""The pictures of the documentation, from real runs: `python -m benchmarks.pictures`, some five minutes on two cores.

The two runs of `make demo` (the pushed one ends where its traps stop it), and of the evidence a net with a too large
rate and the small GPT. The report is looked at in Chromium, where there is one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence import runs as evidence
from examples import demo
from ww_monitor import History, plots, write_report
from ww_monitor.walk.torch import walk

DOCS = Path(__file__).parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        net = train(folder)
        shutil.copy(demo.picture(folder), output / "curves.png")
        healthy, pushed, fast, text = (
            History.read(folder / name / "ww_history.jsonl") for name in ("healthy", "pushed", "fast", "text")
        )
        panels(
            output / "learning.png",
            (f"fc1 at step {healthy[0].step}: as initialised", partial(plots.spectrum, healthy[0]["fc1"])),
            (f"fc1 at step {healthy.last.step}: trained", partial(plots.spectrum, healthy.last["fc1"])),
        )
        panels(
            output / "overtrained.png",
            ("SGD 0.1: healthy", partial(plots.spectrum, healthy.last["fc1"])),
            ("AdamW 3e-2: over-trained", partial(plots.spectrum, fast.last["0"])),
        )
        weights = next(item for item in walk(net) if item.name == "fc1")
        shuffled = plots.shuffled_eigenvalues(weights)
        panels(
            output / "trap.png",
            ("fc1 where the run was stopped", partial(plots.real_and_shuffled, pushed.last["fc1"], shuffled)),
            ("on the way there", partial(plots.curves, pushed, "trap_headroom")),
        )
        panels(output / "depth.png", ("", partial(plots.depth_and_time, text)), width=8.0)
        photograph(write_report(folder / "pushed", path=folder / "report.html"), output / "report.png")


def train(folder: Path) -> demo.Net:
    """The four runs, each into its folder; gives the pushed net as it ended."""
    pl.seed_everything(0, verbose=False)
    healthy = demo.Net(demo.Digits(), [300, 100], pushed=False, learning_rate=0.1)
    demo.train(healthy, folder / "healthy", watch_every=100, steps=1_500, batch=32, seed=0)
    _, net = demo.train_pushed(folder / "pushed", watch_every=250, steps=13_000, seed=0)
    chosen = {
        "too large a rate": ("AdamW 3e-2", "fast", {}),
        "small GPT": ("AdamW 3e-3", "text", {"steps": 600, "every": 25}),
    }
    for run in evidence.every_run():
        label, name, shorter = chosen.get(run.study, ("no run", "", {}))
        if run.seed == 0 and run.name.startswith(label):
            evidence.train(replace(run, study="", name=name, **shorter), folder)
    return net


def panels(path: Path, *drawn: tuple[str, Callable[..., Axes]], width: float = 10.0) -> None:
    """Pictures side by side, each with its title."""
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    for ax, (title, draw) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        draw(ax=ax).set_title(title, fontsize="medium")
    figure.savefig(path, dpi=100)


def photograph(page: Path, path: Path) -> None:
    """The top of a report with its worst layer opened, as it looks in a browser."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        print("no browser: report.png stays as it is")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": 1500, "height": 1000}, color_scheme="light")
        view.goto(page.as_uri())
        view.locator("html[data-ready]").wait_for(state="attached", timeout=120_000)
        view.locator("#lead button.layer").first.click()
        view.locator("#layer-other .main-svg").first.wait_for()
        view.mouse.move(0, 0)
        view.wait_for_timeout(500)
        view.screenshot(path=path, timeout=120_000)
        browser.close()


if __name__ == "__main__":
    main()
