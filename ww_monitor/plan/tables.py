"""Plans as the cells of a table."""

from __future__ import annotations

from collections.abc import Sequence

from ww_monitor.plan.ranks import RankPlan

HEAD = (
    "model", "ranks", "without work", "cost of a rank", "max ÷ mean", "time",
    "moved in all", "sent by a rank", "told to a rank", "workspace",
)  # fmt: skip

HEAD_PER_RANK = ("model", "ranks", "rank", "matrices", "cost", "time", "sent", "workspace")


def row(name: str, plan: RankPlan) -> list[str]:
    """A line under `HEAD`; the last column and what a rank sends are those of the rank with the most."""
    return [
        name,
        str(plan.world_size),
        str(plan.num_idle),
        f"{plan.cost:.2e}",
        f"{plan.balance:.2f}",
        in_words(plan.seconds),
        in_bytes(plan.bytes_moved),
        in_bytes(plan.bytes_sent),
        in_bytes(plan.bytes_told),
        in_bytes(plan.peak_bytes),
    ]


def rows_per_rank(name: str, plan: RankPlan) -> list[list[str]]:
    """Lines under `HEAD_PER_RANK`."""
    return [
        [
            name,
            str(plan.world_size),
            str(share.rank),
            str(share.num_matrices),
            f"{share.cost:.2e}",
            in_words(share.seconds),
            in_bytes(share.bytes_sent),
            in_bytes(share.peak_bytes),
        ]
        for share in plan.shares
    ]


def in_words(seconds: float) -> str:
    """Two figures, in the unit that suits.

    >>> in_words(0.1734), in_words(88.9), in_words(65300)
    ('0.17 s', '1.5 min', '18 h')
    """
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{_figures(seconds / length)} {unit}"
    return f"{_figures(seconds)} s"


def in_bytes(count: float) -> str:
    """Two figures, in powers of 1000.

    >>> in_bytes(0), in_bytes(1.77e14), in_bytes(996_000)
    ('0', '180 TB', '1 MB')
    """
    if not count:
        return "0"
    units = ["B", "kB", "MB", "GB", "TB"]
    while float(f"{count:.2g}") >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{_figures(count)} {units[0]}"


def _figures(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
