"""How many modes carry a layer, and how large its outputs are: what is watched beside the tail of the spectrum."""

from __future__ import annotations

import torch

from ww_monitor.kind import Kind
from ww_monitor.metric.batch import NAN, Batch
from ww_monitor.metric.table import metric


@metric(
    source="after Roy & Vetterli 2007, EUSIPCO, who take σ for λ",
    read="number of modes that carry the layer; compare with stable_rank and with its own past",
)
def effective_rank(batch: Batch) -> torch.Tensor:
    """exp(−Σ p ln p) with p = λ/Σλ."""
    p = batch.eigenvalues / batch.eigenvalues.sum(1, keepdim=True)
    return torch.exp(-torch.special.xlogy(p, p).sum(1))


@metric(
    unit="weight",
    source="the norm that Muon and µP hold: Yang, Simon & Bernstein 2023, arXiv 2310.17813; arXiv 2601.08393",
    read="near 1: outputs of the size of the inputs, whatever the width",
    needs="groups",
)
def rms_norm(batch: Batch) -> torch.Tensor:
    """σmax √(fan_in/fan_out), the operator norm from RMS to RMS; a kernel's is that of its largest slice and group.

    Groups share neither inputs nor outputs, so that the largest of their norms is that of all. A kernel larger than 1
    has a lower bound here: its operator is a sum of slices with phases. A file tells neither groups, so that it gives a
    lower bound too, nor whether a kernel is transposed, whose sides are taken the other way round then. Not known for
    an embedding, whose inputs have no RMS of their own.
    """
    ratios = batch.per_row([NAN if m.kind is Kind.EMBEDDING else m.fan_in / m.fan_out for m in batch.matrices])
    whole = batch.eigenvalues[:, -1] / batch.per_row([m.eigenvalue_factor for m in batch.matrices])
    of_group = batch.column("group_eigenvalue")
    largest: torch.Tensor = torch.where(torch.isnan(of_group), whole, of_group) * ratios
    return largest.sqrt()
