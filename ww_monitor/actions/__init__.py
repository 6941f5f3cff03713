"""What changes a run, off unless asked: rates and weight decays by layer, from the spectra at the snapshots.

    optimizer = torch.optim.AdamW(ww_monitor.actions.param_groups(model), lr=1e-3)
    SpectralMonitor(every_n_steps=100, actions=[LayerwiseRate(low=1, high=5, dry_run=False)])

Each snapshot that is due gives every layer a factor, its metric `rate_factor` or `decay_factor`; with `dry_run`, the
default, that is all. Without it the factor multiplies the option of the layer's parameter group while the optimizer
steps, and only then: a scheduler, a checkpoint and the rest of the loop see the rates of their own. What they are worth
here stands in `docs/evidence.md`.

An action of one's own is any object that is a `ww_monitor.record.Action`.
"""

from ww_monitor.actions.groups import param_groups
from ww_monitor.actions.layerwise import LayerwiseDecay, LayerwiseRate

__all__ = ["LayerwiseDecay", "LayerwiseRate", "param_groups"]
