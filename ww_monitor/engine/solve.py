"""Where matrices are solved: one decision for all matrices of a device, then there or on the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from ww_monitor.engine.measure import as_solved, batch_of, measured
from ww_monitor.engine.options import Options
from ww_monitor.metric import Batch, Loaded
from ww_monitor.spectra.device import Accelerator
from ww_monitor.spectra.eigenvalues import bytes_of, resolved, solve_on_device
from ww_monitor.spectra.elements import Moments, moments
from ww_monitor.spectra.host import Eigenvalues, input_status

MOST_COPIED = 512 << 20
"""Bytes that loading may allocate on a device (adapters merged, weights dequantised) before what is there is solved."""

HOST_RATE = 2e10
"""Multiply-adds a second of one host core on M²N + M³ (measured: 3072 × 768 in 0.09 s on a Zen 4 core)."""


class DeviceQueue:
    """The chunks on one device, until it is decided for all of them together where they are solved.

    The device solves them if it has full-rate float64, unless they are so few and small that one core of the host is
    done before the device's latency has passed. What it fails at, the host solves. What loading allocates is counted
    (`watch_memory`), but not beside a training that allocates too.
    """

    def __init__(self, accelerator: Accelerator, options: Options, *, watch_memory: bool = True) -> None:
        self._accelerator, self._options, self._watch_memory = accelerator, options, watch_memory
        self._waiting: list[Loaded] = []
        self._before, self._decided = 0, False
        self.to_host: list[Loaded] = []
        """What is left to the host; whoever takes it clears it."""

    def add(self, loaded: Loaded) -> list[Batch]:
        """Wait with the others; the batches of all that waited, if loading has allocated too much."""
        if self._watch_memory and not self._waiting:
            self._before = self._accelerator.allocated() - loaded.weights[0].nbytes  # the chunk has been loaded by now
        self._waiting.append(loaded)
        if self._watch_memory and self._accelerator.allocated() - self._before > MOST_COPIED:
            return self.solve()
        return []

    def solve(self) -> list[Batch]:
        """Solve all that waits, a short side at a time; what the device does not solve is in `to_host`."""
        waiting, self._waiting = self._waiting, []
        refusal, sides = self._accelerator.refusal(), dict[int, list[Loaded]]()
        if not refusal and not self._decided and self._sooner_on_host(waiting):
            refusal = "few and small"
        self._decided = True  # what comes after an early solve would look few and small alone
        try:
            sides = sides if refusal else self._by_side(waiting)
        except Exception as error:  # noqa: BLE001 - a device that fails leaves its matrices to the host
            refusal = type(error).__name__
        if refusal:
            self._leave(waiting, refusal)
        del waiting  # now only `sides` holds weights, one side less with each that is solved
        return [batch for side in sorted(sides, reverse=True) for batch in self._solve_side(sides.pop(side))]

    def _leave(self, chunks: Sequence[Loaded], reason: str) -> None:
        where = self._not_here(reason)
        self.to_host += [replace(part, solved_on=where) for chunk in chunks for part in chunk.apart()]

    def _not_here(self, reason: str) -> str:
        return f"cpu, not {self._accelerator.device}: {reason}"

    def _sooner_on_host(self, waiting: Sequence[Loaded]) -> bool:
        matrices = [matrix for loaded in waiting for matrix in loaded.matrices]
        counts: dict[int, int] = defaultdict(int)
        for matrix in matrices:
            counts[matrix.short_side] += matrix.shape[0]
        on_device = sum(self._accelerator.seconds(*one) for one in counts.items())
        return sum(matrix.cost for matrix in matrices) / HOST_RATE < on_device

    def _by_side(self, waiting: Sequence[Loaded]) -> dict[int, list[Loaded]]:
        """By short side, the chunks of one shape, scale and precision as one; with their moments, read together."""
        shapes: dict[object, list[Loaded]] = defaultdict(list)
        for loaded in waiting:
            shapes[loaded.matrices[0].shape, loaded.matrices[0].eigenvalue_factor, loaded.dtype].append(loaded)
        joined, found = [], []
        for parts in shapes.values():
            matrices = [matrix for part in parts for matrix in part.matrices]
            joined.append(replace(parts[0], matrices=matrices, weights=[w for part in parts for w in part.weights]))
            taken = Moments.joined(moments(stack) for stack in as_solved(joined[-1], self._options))
            found.append(torch.stack(list(vars(taken).values())))  # not read yet: once for all shapes, below
        sides: dict[int, list[Loaded]] = defaultdict(list)
        for loaded, numbers in zip(joined, self._accelerator.read(found), strict=True):
            sides[loaded.matrices[0].short_side].append(replace(loaded, moments=Moments(*numbers)))
        return sides

    def _solve_side(self, chunks: list[Loaded]) -> list[Batch]:
        """Measure, then solve: the weights are given up in between, as their Gram matrices are made."""
        options, resolve = self._options, self._options.preset == "weightwatcher"
        if self._accelerator.spare() < bytes_of(chunks[0].matrices[0].short_side):
            self._leave(chunks, "no memory")
            return []
        stacks, known = list[torch.Tensor](), []
        for one in chunks:
            try:
                values = measured(one, input_status(one.known_moments.squares), options)
            except Exception as error:  # noqa: BLE001 - the host finds out which layer it was
                self._leave([one], type(error).__name__)
            else:
                stacks += as_solved(one, options)
                known.append((replace(one, weights=()), values))
        if not known:
            return []
        chunks.clear()  # with this name `stacks` is the last to hold weights; the solve empties it
        del one
        kept = list(stacks) if resolve else []
        solved, reasons = solve_on_device(stacks, self._accelerator)
        if resolve:
            ends = accumulate(map(len, kept))
            parts = [solved.take(slice(end - len(stack), end)) for stack, end in zip(kept, ends, strict=True)]
            solved = Eigenvalues.joined(resolved(*pair) for pair in zip(parts, kept, strict=True))
        batches, end = [], 0
        for one, values in known:
            step = one.matrices[0].shape[0]
            start, end = end, end + len(one.matrices) * step
            # the reason of a slice is its layer's: no text is less than ""
            of_layers = [max(reasons[at : at + step]) for at in range(start, end, step)]
            where = [self._not_here(reason) if reason else str(self._accelerator.device) for reason in of_layers]
            batches.append(batch_of(one, solved.take(slice(start, end)), values, options, where=where))
        return batches
