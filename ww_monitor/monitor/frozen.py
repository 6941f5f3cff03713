"""Rows of matrices that training leaves alone: made once, and again only when the weights have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import Layer

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Checksum = tuple[int, int]


@dataclass(frozen=True)
class Checked:
    """The checksums of the frozen matrices at one moment, and the rows that still hold, by name."""

    sums: Mapping[str, Checksum]
    rows: Mapping[str, Layer]


class FrozenRowCache:
    """Keeps the row of every frozen matrix with a checksum of its weights."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Checksum, Layer]] = {}

    def check(self, items: Iterable[Matrix | Skipped]) -> Checked:
        """What holds still; a matrix that cannot be read now is left to the analysis."""
        frozen: dict[str, torch.Tensor] = {}
        for item in items:
            if isinstance(item, Matrix) and item.frozen:
                try:
                    frozen[item.name] = checksum(item.load())
                except Exception:  # noqa: BLE001 - the analysis will meet it again, and say what is wrong
                    self._kept.pop(item.name, None)
        sums = dict(zip(frozen, _on_host(list(frozen.values())), strict=True))
        kept = {name: self._kept[name] for name in sums if name in self._kept}
        return Checked(sums, {name: row for name, (known, row) in kept.items() if known == sums[name]})

    def keep(self, checked: Checked, layers: Iterable[Layer]) -> None:
        """Remember the rows made of what has been checked."""
        self._kept.update({row.name: (checked.sums[row.name], row) for row in layers if row.name in checked.sums})

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()


def checksum(weights: torch.Tensor) -> torch.Tensor:
    """Sum of all bit patterns, and of every third, as int64 `[2]` on the device: one pass, nothing is waited for."""
    bits = weights.detach().contiguous().view(-1).view(_SAME_WIDTH[weights.element_size()])
    # one sum alone would miss entries that change places
    return torch.stack([bits.sum(dtype=torch.int64), bits[::3].sum(dtype=torch.int64)])


def _on_host(sums: Sequence[torch.Tensor]) -> list[Checksum]:
    """The checksums on the host, with one read a device."""
    found: dict[int, Checksum] = {}
    by_device = {device: [k for k, s in enumerate(sums) if s.device == device] for device in {s.device for s in sums}}
    for places in by_device.values():
        values = torch.stack([sums[k] for k in places]).tolist()
        found.update({k: (pair[0], pair[1]) for k, pair in zip(places, values, strict=True)})
    return [found[k] for k in range(len(sums))]
