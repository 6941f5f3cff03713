"""`python -m benchmarks.evidence [--quick] [--jobs 2] [--folder …] [--antigrokking history.jsonl]`."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.evidence import study
from benchmarks.evidence.judge import lines, published, read, results
from benchmarks.evidence.runs import every_run, quick_runs, train


def train_one(index: int, quick: bool, folder: Path) -> str:
    run = (quick_runs() if quick else every_run())[index]
    train(run, folder)
    return f"{run.study}: {run.name}"


def main() -> None:
    parser = study.arguments(__doc__, "one seed of each set-up, a tenth as long", folder="runs/evidence")
    parser.add_argument("--antigrokking", type=Path, help="history of the published set-up, to be judged too")
    options = parser.parse_args()
    folder = study.folder_of(options)
    with ProcessPoolExecutor(options.jobs) as pool:
        number = len(quick_runs() if options.quick else every_run())
        for done in pool.map(train_one, range(number), [options.quick] * number, [folder] * number):
            print(done, flush=True)
    runs = read(folder) + (published(options.antigrokking) if options.antigrokking else [])
    found = results(runs)
    print(lines(found["runs"], ["study", "run", "best", "end", "loses", "loss_begins", "alarms"]))
    print(lines(found["rules"], [column for column in found["rules"][0] if column != "severity"]))
    name = "stopping_quick" if options.quick else "stopping" if options.antigrokking else "stopping_own"
    study.keep(name, found)  # the page's tables are of our own runs and the published set-up together


if __name__ == "__main__":
    main()
