"""Where weightwatcher 0.7.7's own figure is not well defined: case, column, its value, ours, why.

Compares every column of the tool's values on 28 cases, which the parity tests read too, under
`preset="weightwatcher"`. What differs by more than 1e-9 relative must have a reason below, otherwise this script fails.
`python -m benchmarks.reference_table` prints the table that stands in benchmarks/REFERENCE.md.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

import ww_monitor
from tests.reference.cases import CASES, number, rows_of
from ww_monitor.metric import weightwatcher as _columns  # noqa: F401 - the table is complete once this is imported
from ww_monitor.metric.table import TABLE

RANDOM = ("rand_", "ww_softrank", "ww_maxdist", "max_rand_eval", "num_traps")
NOT_NUMBERS = ("layer_id", "name", "longname", "layer_type", "has_esd", "status", "warning")

REASONS = {
    "failed": "its fit failed and it writes -1; NaN here (B2)",
    "stale": "its sigma of fewer than 8 points keeps the value -1/√n (B19)",
    "identity": "all eigenvalues tie: its alpha is infinite; degenerate here",
    "even": "it exchanges N and M of kernels with an even number of slices (B4)",
    "zeros": "all zero: logarithms of zero and 0/0; NaN here",
    "square": "spikes far outside a square bulk, fitted with a quarter circle of fixed radius (B3)",
    "sv_min": "smallest singular value of a matrix that is singular to rounding",
}
"""Why a figure of the tool's is not well defined; the numbers are those of its list of known bugs."""


def reason(case: str, row: dict[str, Any], column: str) -> str:
    """Why `column` of this row is not well defined, or `""`."""
    fitted = ("alpha", "D", "sigma", "xmin", "xmax", "num_pl_spikes", "alpha_weighted", "log_alpha_norm", "ERG_gap")
    if case == "zeros_60x40":
        return "zeros"
    if row["status"] == "failed" and column in fitted:
        return "failed"
    if case == "identity_60" and column in fitted:
        return "identity"
    if column == "sigma" and number(row["sigma"]) < 0:
        return "stale"
    if case == "rank30_120x80" and column in ("sv_min", "detX_val", "detX_val_unrescaled"):
        return "sv_min"
    if case == "conv2x2_64_32":
        return "even"
    return ""


def compared() -> list[tuple[str, str, float, float, str, float]]:
    """`(case, column, its value, ours, reason, relative deviation)` of every number, well defined or not."""
    found = []
    for case, build in CASES.items():
        names = [name for name in TABLE["weightwatcher"] if not name.startswith(RANDOM)]
        snapshot = ww_monitor.analyze(build(), preset="weightwatcher", metrics=names)
        for row, layer in matched(rows_of(case), snapshot):
            for column in row:
                if column in NOT_NUMBERS or column.startswith(RANDOM):
                    continue
                ours = layer.get(column, math.nan)
                theirs = number(row[column])
                found.append((case, column, theirs, ours, reason(case, row, column), deviation(theirs, ours)))
    return found


def matched(rows: list[dict[str, Any]], snapshot: ww_monitor.Snapshot) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of the same layer; what the tool lists twice (tied weights) or we list alone is left out."""
    ours = {row["longname"]: row for row in snapshot.to_pandas().to_dict("records")}
    return [(row, ours[row["longname"]]) for row in rows if row["longname"] in ours]


def deviation(theirs: float, ours: float) -> float:
    if theirs == ours or (math.isnan(theirs) and math.isnan(ours)):
        return 0.0
    if not (math.isfinite(theirs) and math.isfinite(ours)):
        return math.inf
    return abs(theirs - ours) / max(abs(theirs), abs(ours))


def main() -> None:
    found = compared()
    agreed = [row for row in found if row[5] <= 1e-9]
    print(
        f"{len(agreed)} of {len(found)} numbers agree to 1e-9 relative; largest deviation among them"
        f" {max(row[5] for row in agreed):.1e}. The others:\n"
    )
    print("| case | column | weightwatcher 0.7.7 | here | why |\n|---|---|---|---|---|")
    unexplained = 0
    for case, column, theirs, ours, why, off in found:
        if not off <= 1e-9:
            unexplained += not why
            print(f"| {case} | {column} | {theirs:.6g} | {ours:.6g} | {REASONS.get(why, '**unexplained**')} |")
    if unexplained:
        sys.exit(f"{unexplained} deviations without a reason")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
