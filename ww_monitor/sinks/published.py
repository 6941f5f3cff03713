"""Which values a tracker gets: the few that matter, by default; the history file has all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from ww_monitor.errors import check_names
from ww_monitor.record import Histogram, Layer, Snapshot, layer_key, summary_key

Publish = str | Sequence[str]

MODEL_METRICS = (
    "alpha", "alpha_hat", "num_spikes", "num_traps", "trap_headroom", "stable_rank", "log_spectral_norm",
    "delta_norm", "left_rotation", "right_rotation", "update_ratio", "snapshots_dropped", "rate_factor", "decay_factor",
)  # fmt: skip
"""Metrics of the model that are shown, as far as they are there; the second line is what `track_delta`,
`track_updates`, `mode="async"` and `actions` add."""

LAYER_METRICS = ("alpha", "trap_headroom", "num_traps", "alpha_hat", "num_spikes")
"""Metrics of a layer that are shown, the most important first."""

SPREAD = ("alpha", "trap_headroom", "alpha_hat")
"""Metrics of which a role shows mean, 10 % and 90 % of its layers; of counts it shows the mean."""

MOST_MATRICES = 100
"""Layers of a model that has more are shown by role."""

MOST_CHARTS = 240
"""Charts of single layers: as many of `LAYER_METRICS` are shown as fit, so that 48 layers have all five."""

MOST_HISTOGRAMS = 32
"""Layers of a model that has more have no histogram of their eigenvalues each (our choice: as many as one looks at)."""


class Published:
    """Chooses what a tracker gets of a snapshot.

    Args:
        publish: `"key"`, `"all"`, or names of metrics and globs on keys, among which `"key"` stands for its own set.

    >>> layer = Layer("fc", "dense", (1, 64, 64), metrics={"alpha": 3.0, "ks": 0.1}, verdict="ok")
    >>> snapshot = Snapshot((layer,), summary={"alpha": 3.0, "ks": 0.1})
    >>> Published("key").scalars(snapshot)
    {'ww/alpha': 3.0, 'ww_verdict/ok': 1.0, 'ww_alpha/fc': 3.0}
    >>> Published(["ks"]).scalars(snapshot)
    {'ww/ks': 0.1, 'ww_ks/fc': 0.1}
    """

    def __init__(self, publish: Publish = "key") -> None:
        check_names("publish", "it", publish)
        given = (publish,) if isinstance(publish, str) else tuple(publish)
        self.key = "key" in given
        patterns = ["*" if one == "all" else one for one in given if one != "key"]
        # the names of layers lose their brackets as they become keys
        self.patterns = (*patterns, *(one.replace("]", "").replace("[", "_") for one in patterns if "[" in one))
        self._verdicts: dict[str, None] = {}

    def scalars(self, snapshot: Snapshot, *, layers: bool = True) -> dict[str, float]:
        """The values under their flat keys, as plain finite floats.

        Args:
            snapshot: What was seen.
            layers: Give those of layers and of roles too.
        """
        shares = self._shares(snapshot)
        chosen = {**dict(_of_model(snapshot)), **shares} if self.key else {}
        if self.key and layers:
            chosen |= dict(_by_role(snapshot) if len(snapshot.layers) > MOST_MATRICES else self._by_layer(snapshot))
        if self.patterns:
            everything = {**snapshot.scalars(layers=layers), **shares}
            chosen |= {key: value for key, value in everything.items() if self.asked(key)}
        return {key: float(value) for key, value in chosen.items() if math.isfinite(value)}

    def shows_of_model(self, metric: str) -> bool:
        """Whether the model's value of this metric is shown, when it is known."""
        return (self.key and metric in MODEL_METRICS) or self.asked(summary_key(metric))

    def asked(self, key: str) -> bool:
        """Whether the user named this key, or the metric that it is of."""
        # `ww/<metric>` of the model, `ww_<metric>/<layer>` of a layer.
        metric = key.partition("/")[2] if key.startswith(summary_key("")) else key.partition("/")[0][len("ww_") :]
        # `fnmatch` would take no notice of case on Windows.
        return any(fnmatchcase(key if "/" in pattern else metric, pattern) for pattern in self.patterns)

    def histograms(self, snapshot: Snapshot) -> Iterator[tuple[str, Histogram]]:
        """Key and histogram of the layers whose eigenvalues are shown."""
        few = self.key and len(snapshot.layers) <= MOST_HISTOGRAMS
        for name, layer in zip(snapshot.key_names, snapshot.layers, strict=True):
            key = layer_key("esd", name)
            if layer.esd is not None and (few or self.asked(key)):
                yield key, layer.esd

    def layer_metrics(self, snapshot: Snapshot) -> tuple[str, ...]:
        """The metrics that each layer is shown by; none where roles stand for them."""
        if not self.key or not 0 < len(snapshot.layers) <= MOST_MATRICES:
            return ()
        return LAYER_METRICS[: MOST_CHARTS // len(snapshot.layers)]

    def _shares(self, snapshot: Snapshot) -> dict[str, float]:
        """The share of layers with each verdict; one that is gone falls to 0."""
        found = [layer.verdict for layer in snapshot.layers if layer.verdict]
        self._verdicts.update(dict.fromkeys(found))
        return {layer_key("verdict", one): found.count(one) / max(1, len(found)) for one in self._verdicts}

    def _by_layer(self, snapshot: Snapshot) -> Iterator[tuple[str, float]]:
        for metric in self.layer_metrics(snapshot):
            for name, layer in zip(snapshot.key_names, snapshot.layers, strict=True):
                yield layer_key(metric, name), layer.value(metric)


def _of_model(snapshot: Snapshot) -> Iterator[tuple[str, float]]:
    for metric in MODEL_METRICS:
        yield summary_key(metric), snapshot.summary.get(metric, math.nan)


def roles(snapshot: Snapshot) -> dict[str, list[Layer]]:
    """The layers by what they do, or by their kind where that is not known; adapters and merged weights apart."""
    groups: dict[str, list[Layer]] = {}
    for layer in snapshot.layers:
        # As walkers name them: `<name>.lora[<adapter>]` and `<name>.merged`.
        part = re.search(r"\.([a-z]\w*)\[[^\]]*\]$|\.(merged)$", layer.name)
        name = "_".join(filter(None, [layer.role or layer.kind, part and (part[1] or part[2])]))
        groups.setdefault(name, []).append(layer)
    return groups


def _by_role(snapshot: Snapshot) -> Iterator[tuple[str, float]]:
    for role, layers in roles(snapshot).items():
        for metric in LAYER_METRICS:
            values = np.array([layer.value(metric) for layer in layers], dtype=float)
            yield from _spread(metric, role, values[np.isfinite(values)], spread=metric in SPREAD and len(layers) > 1)


def _spread(metric: str, role: str, known: np.ndarray, *, spread: bool) -> Iterator[tuple[str, float]]:
    if known.size:
        yield layer_key(metric, f"{role}_mean"), float(known.mean())
        if spread:
            low, high = np.quantile(known, (0.1, 0.9))
            yield layer_key(metric, f"{role}_p10"), float(low)
            yield layer_key(metric, f"{role}_p90"), float(high)


def spread_of(snapshot: Snapshot, metric: str) -> Mapping[str, float]:
    """10 % and 90 % of a metric over all layers, under the model's keys."""
    known = [value for layer in snapshot.layers if math.isfinite(value := layer.value(metric))]
    if not known:
        return {}
    low, high = np.quantile(known, (0.1, 0.9))
    return {summary_key(f"{metric}_p10"): float(low), summary_key(f"{metric}_p90"): float(high)}
