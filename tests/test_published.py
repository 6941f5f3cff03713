"""The theory's published claim on real trained weights: alpha-hat orders a family of models by test error."""

from __future__ import annotations

from ww_monitor import analyze

TEST_ERROR = {"resnet20-12fca82f.th": 8.27, "resnet32-d509ac18.th": 7.37}
"""Percent, CIFAR-10, as their authors state it."""


def test_the_better_model_has_the_smaller_alpha_hat(shared):
    by_error = sorted(TEST_ERROR, key=lambda file: TEST_ERROR[file])
    alpha_hat = [analyze(shared / "data" / file, preset="weightwatcher").summary["alpha_weighted"] for file in by_error]
    assert alpha_hat == sorted(alpha_hat)
