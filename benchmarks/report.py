"""A report of 1,000 layers at 1,000 snapshots: how long it takes to build, its size, and how it opens in Chromium.

    python -m benchmarks.report

Generates a history (1.3 GB, in a temporary folder), builds the page from it in this process, opens it headless, opens a
layer, moves the slider, switches the map's metric and scrolls the table. Writes its section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.table import Bound, claim, machine, markdown, write_section
from ww_monitor import metrics
from ww_monitor.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
SIDE, BINS = 1024, 64
COUNTED = ("n_tail", "num_spikes", "num_traps", "erg_num", "erg_gap", "matrix_rank", "rank_loss")

SCROLL = """async () => {
  const list = document.querySelector("#layers"), times = [];
  let before = performance.now();
  for (let i = 0; i < 120; i++) {
    list.scrollTop += 210;
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - before);
    before = performance.now();
  }
  return times;
}"""


def generate(path: Path, *, layers: int, snapshots: int, seed: int = 0) -> None:
    """Values that drift and tremble, spectra whose counts are Poisson: what deflates as badly as a real run's."""
    rng = np.random.default_rng(seed)
    names = [entry.name for entry in metrics() if entry.standard]
    about = [(f"model.layers.{i // 7}.{list(ROLES)[i % 7]}", list(ROLES.values())[i % 7]) for i in range(layers)]
    level = rng.lognormal(0.7, 0.5, (layers, len(names)))
    shape = np.exp(-0.5 * ((np.arange(BINS) - 40) / 11) ** 2)
    with path.open("w", encoding="utf-8") as file:
        for number in range(snapshots):
            level *= np.exp(rng.normal(0, 0.004, level.shape))
            seen = level * np.exp(rng.normal(0, 0.01, level.shape))
            whole = [names.index(name) for name in COUNTED]
            seen[:, whole] = np.rint(30 * seen[:, whole])
            seen[:, names.index("num_traps")] = 0.0
            counts = rng.poisson(SIDE * shape / shape.sum(), (layers, BINS)).tolist()
            step = 100 * number
            rows = [
                _row(about_one, dict(zip(names, values, strict=True)), bins, step)
                for about_one, values, bins in zip(about, seen.tolist(), counts, strict=True)
            ]
            found = [_finding(about[number % layers][0], step)] if number % 10 == 9 else []
            summary = dict(zip(names, seen.mean(0).tolist(), strict=True))
            whole_snapshot = {"schema": 1, "layers": rows, "skipped": [], "summary": summary, "findings": found}
            file.write(
                json.dumps({**whole_snapshot, "step": step, "epoch": 0, "preset": "default", "seconds": 1.0}) + "\n"
            )


def _row(about: tuple[str, str], values: dict[str, float], counts: list[int], step: int) -> dict[str, object]:
    known = {"name": about[0], "role": about[1], "kind": "dense", "shape": [1, SIDE, SIDE], "status": "ok"}
    esd = {"low": -3.0 + 1e-3 * values["alpha"], "high": 1.0 + 1e-2 * values["alpha"], "counts": counts, "num_zero": 0}
    rest = {"verdict": "ok", "phase": "", "trap_entries": [], "step": step, "solved_on": "cpu"}
    return {**known, **rest, "esd": esd, "metrics": values}


def _finding(layer: str, step: int) -> dict[str, object]:
    message = f"{layer}: no eigenvalue rises above the random bulk: under-trained"
    return {
        "rule": "under_trained",
        "layer": layer,
        "severity": "warning",
        "message": message,
        "step": step,
        "state": "begin",
    }


def opened(page: Path) -> dict[str, float]:
    """Milliseconds in headless Chromium, from the start of the navigation or the act; "busy …": of the main thread."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": 1400, "height": 1000})
        session = view.context.new_cdp_session(view)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy() -> float:
            values = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
            return 1e3 * values["TaskDuration"]

        view.goto(page.as_uri())
        view.wait_for_selector("html[data-ready]", timeout=120_000)
        found = {
            "first paint": view.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"),
            "table": view.evaluate("performance.getEntriesByName('table')[0].startTime"),
            "usable": view.evaluate("performance.getEntriesByName('ready')[0].startTime"),
        }
        found["busy usable"] = busy()
        start = time.perf_counter()
        view.locator("#layers .row button.layer").nth(20).click()
        view.locator("#esd .scatterlayer .trace").first.wait_for()
        found["layer"] = 1e3 * (time.perf_counter() - start)
        start = time.perf_counter()
        view.locator("#esd-step").fill("3")
        view.wait_for_function("document.querySelector('#esd-label').textContent.includes('(4 of')")
        found["slider"] = 1e3 * (time.perf_counter() - start)
        view.keyboard.press("Escape")
        before = busy()
        frames = view.evaluate(SCROLL)
        found["busy frame"] = (busy() - before) / len(frames)
        found["frame"] = statistics.median(frames)
        start = time.perf_counter()
        view.locator("#map-metric").select_option("trap_headroom")
        view.wait_for_function("document.querySelector('#map').dataset.metric === 'trap_headroom'")
        found["map"] = 1e3 * (time.perf_counter() - start)
        browser.close()
    return found


def section(layers: int, snapshots: int, folder: Path) -> str:
    """Generate, build, open; the section of `RESULTS.md`."""
    history = folder / "ww_history.jsonl"
    if not history.exists():
        generate(history, layers=layers, snapshots=snapshots)
    start = time.perf_counter()
    cpu = time.process_time()
    page = write_report(history, path=folder / "report.html")
    built, busy = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = page.stat().st_size / 1e6
    found = opened(page)
    second, none = Bound(most=5, unit=" s"), None
    rows = [
        claim("built from the file", f"{built:.0f} s", Bound(most=60, unit=" s"), built),
        claim("— of it on a core", f"{busy:.0f} s", Bound(most=60, unit=" s"), busy),
        claim("peak memory of the process, torch included", f"{peak:.0f} MiB", none, none),
        claim("size of the page", f"{size:.1f} MB", Bound(most=20, unit=" MB"), size),
        claim(
            "first paint", f"{found['first paint'] / 1e3:.2f} s", Bound(most=2, unit=" s"), found["first paint"] / 1e3
        ),
        claim("table of layers there", f"{found['table'] / 1e3:.2f} s", none, none),
        claim("usable: table, curves, map", f"{found['usable'] / 1e3:.1f} s", second, found["usable"] / 1e3),
        claim("— of it on a core", f"{found['busy usable'] / 1e3:.1f} s", second, found["busy usable"] / 1e3),
        claim("a layer opened, with its spectrum", f"{found['layer']:.0f} ms", none, none),
        claim("slider moved to another step", f"{found['slider']:.0f} ms", none, none),
        claim("map of another metric", f"{found['map']:.0f} ms", none, none),
        claim("a frame while the table scrolls", f"{found['frame']:.0f} ms", none, none),
        claim("— of it on a core", f"{found['busy frame']:.1f} ms", Bound(most=16, unit=" ms"), found["busy frame"]),
    ]
    text = f"""## The report (`python -m benchmarks.report`)

{machine()}.
Headless Chromium without a GPU, on the same cores; the load average was {os.getloadavg()[0]:.0f} and the niceness
{os.nice(0)}, so that "on a core" (CPU time of the process, of the page's main thread) says more than the seconds that
passed.

A generated history of {layers:,} layers at {snapshots:,} snapshots ({history.stat().st_size / 1e9:.2f} GB), every
standard metric and a spectrum a row. Of the main metrics the page has every snapshot, of the others and of the spectra
some, as it says.

"""
    return text + markdown(["what", "measured", "required", "held?"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--snapshots", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="a folder that keeps history and page, and has them next time")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text = section(options.layers, options.snapshots, folder)
    print(text)
    if (options.layers, options.snapshots) == (1000, 1000):
        write_section("report", text)


if __name__ == "__main__":
    main()
