"""Faults on purpose: killed processes, full disks, folders that cannot be used, rules and sinks that misbehave.

`python -m benchmarks.faults [--quick]` tells of each kind how many were tried and how many survived.
"""

from __future__ import annotations

Counts = dict[str, tuple[int, int]]
"""What was done → how often, and how often nothing was lost, ended or changed by it."""
