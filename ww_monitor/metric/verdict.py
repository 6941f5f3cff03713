"""What the numbers of a row can be trusted for, and which phase of training it is in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ww_monitor.metric.batch import Batch
from ww_monitor.spectra.powerlaw import SMALL_SAMPLE
from ww_monitor.spectra.status import Status

POOR_FIT = 1.25
"""ks · √n_tail above which a tail is no power law: the 1 % point of the Kolmogorov–Smirnov test with an estimated
exponential scale (Lilliefors 1969, JASA 64), since ln λ of a power-law tail is exponential. The choice of xmin makes
it lenient."""


def statuses(batch: Batch) -> torch.Tensor:
    """`[B]` the `Status` of the row: OK, or why it has no spectrum or no tail."""
    return torch.where(batch.status == Status.OK, batch.tail.status, batch.status)


NORMS = frozenset(
    ("log_norm", "log_spectral_norm", "stable_rank", "rms_norm", "matrix_rank", "rank_loss", "trap_headroom")
)
"""What a row of thin slices adds to the model's values; nothing is left out under weightwatcher's preset."""

VERDICTS = (
    "ok", "not_finite", "zero", "solver_failed", "degenerate", "rank_deficient", "few_eigenvalues", "random_like",
    "poor_fit", "thin_slices",
)  # fmt: skip
"""What `verdicts` counts through. The first four are the `Status` of a spectrum, by number."""


def verdicts(batch: Batch) -> torch.Tensor:
    """`[B]` index into `VERDICTS`: what each row's numbers can be trusted for, the first that applies.

    - `not_finite`, `zero`, `solver_failed`: there is no spectrum.
    - `thin_slices`: a kernel whose slices have a short side of at most 4 (depthwise, narrow groups, a first layer on
      colours). Its pool of eigenvalues lists the norms of its taps, not one spectrum: whatever alpha says of
      them, the model's values take no more of the row than `NORMS`. A bank
      `[C, 1, k]` is not read as one C × k matrix instead: that is not the map that the layer applies (each channel has
      its own filter, none mixes them), the usual 3, 4 and 9 taps would still be too few to judge, and with more taps
      its leading mode is how smooth the filters are. Σλ, hence every Frobenius norm, is the same either way.
    - `degenerate`: all eigenvalues are equal to within 64 storage roundings (an orthogonal matrix).
    - `rank_deficient`: half of the eigenvalues are numerically zero, or rows are copies or combinations of others, so
      that more than 5 % of the modes of the rows and columns that are not zero are missing.
    - `few_eigenvalues`: fewer than 20, where alpha has a standard error of more than a quarter of alpha − 1.
    - `random_like`: no eigenvalue exceeds what a random matrix has, so alpha describes noise.
    - `poor_fit`: the tail is no power law (`POOR_FIT`).
    - `ok`.
    """
    tail = batch.tail
    tests = [
        ("thin_slices", torch.full_like(batch.flat, batch.thin)),
        ("degenerate", batch.flat),
        ("rank_deficient", batch.deficient),
        ("few_eigenvalues", (tail.num_fitted < SMALL_SAMPLE) | (tail.status == Status.FEW_EIGENVALUES)),
        ("degenerate", tail.status == Status.DEGENERATE),
        ("random_like", (batch.bulk.num_spikes == 0) & torch.isfinite(batch.bulk.variance)),
        ("poor_fit", tail.ks * tail.n_tail.sqrt() > POOR_FIT),
    ]
    return torch.where(batch.status == Status.OK, _first(tests, VERDICTS, batch), batch.status)


PHASES = (
    "", "rank-collapse", "random-like", "very heavy-tailed", "heavy-tailed", "bulk-decay", "bleeding-out",
    "bulk+spikes",
)  # fmt: skip

BLEEDING = 1.2
"""λmax over the bulk edge up to which spikes bleed out of the bulk rather than stand apart from it (our choice)."""


def phases(batch: Batch) -> torch.Tensor:
    """`[B]` index into `PHASES`: which phase of training each row is in, the first that applies; 0 if unknown.

    - rank-collapse: verdict `rank_deficient`;
    - random-like: no spike above the random bulk;
    - very heavy-tailed, heavy-tailed, bulk-decay: a good fit with alpha < 2, < 4, ≤ 6;
    - bleeding-out, bulk+spikes: spikes within, or beyond, 1.2 times the bulk edge.

    Source: Martin & Mahoney 2021 (JMLR 22), who name the 5+1 phases and their exponents; as they and their tool say,
    alpha means nothing in the random-like phase and is unstable in the last two.
    """
    verdict, alpha = verdicts(batch), batch.tail.alpha
    ratio = batch.eigenvalues[:, -1] / batch.bulk.edge_max
    fits = verdict == VERDICTS.index("ok")
    learnt = fits | (verdict == VERDICTS.index("poor_fit"))
    tests = [
        ("rank-collapse", verdict == VERDICTS.index("rank_deficient")),
        ("random-like", verdict == VERDICTS.index("random_like")),
        ("very heavy-tailed", fits & (alpha < 2)),
        ("heavy-tailed", fits & (alpha < 4)),
        ("bulk-decay", fits & (alpha <= 6)),
        ("bleeding-out", learnt & (ratio < BLEEDING)),
        ("bulk+spikes", learnt),
    ]
    return _first(tests, PHASES, batch)


def _first(tests: Sequence[tuple[str, torch.Tensor]], names: Sequence[str], batch: Batch) -> torch.Tensor:
    """`[B]` index of the name of the first test that holds, 0 where none does."""
    found = torch.zeros_like(batch.status)
    for name, holds in reversed(tests):  # so that the first overwrites the others
        found = torch.where(holds, names.index(name), found)
    return found
