"""Factors by layer, computed by hand."""

import math

import pytest

from ww_monitor import InvalidArgument, Layer, Snapshot
from ww_monitor.actions import LayerwiseDecay, LayerwiseRate


def seen(*alphas: float, **last) -> Snapshot:
    """Layers a, b, … of 64 × 64 with these Hill alphas, the last one as told."""
    rows = [{"name": name, "kind": "dense", "shape": (1, 64, 64)} for name, _ in zip("abcdef", alphas, strict=False)]
    rows[-1].update(last)
    return Snapshot(tuple(Layer(**row, metrics={"alpha_hill": a}) for row, a in zip(rows, alphas, strict=True)))


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (LayerwiseRate(), [0.5, 0.75, 1.5]),  # TempBalance: 0.5 + (alpha − 2)/(6 − 2)
        (LayerwiseRate(low=1, high=5), [1.0, 2.0, 5.0]),  # LLR
        (LayerwiseDecay(low=0.67, high=3), [0.67, 0.67 + 2.33 / 4, 3.0]),  # AlphaDecay
        (LayerwiseRate(low=1, high=5, keep_mean=True), [3 / 8, 6 / 8, 15 / 8]),
        (LayerwiseRate(low=2, high=2), [2.0, 2.0, 2.0]),
    ],
)
def test_factors_are_linear_in_alpha_between_low_and_high(action, expected):
    assert list(action.factors(seen(2.0, 3.0, 6.0)).values()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alphas", [(3.0, 1.5, 9.0, 2.2), (10.0, 11.0), (2.0, 2.0, 8.0, 8.0)])
def test_keep_mean_leaves_the_mean_rate_where_it_was(alphas):
    factors = LayerwiseRate(low=1, high=5, keep_mean=True).factors(seen(*alphas)).values()
    assert sum(factors) / len(factors) == pytest.approx(1.0, rel=1e-12)
    assert max(factors) / min(factors) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize(
    "last",
    [
        {"kind": "embedding"},
        {"role": "head"},
        {"shape": (1, 64, 49)},
        {"shape": (9, 64, 5)},  # 45 eigenvalues
        {"name": "block.out"},
    ],
)
def test_an_embedding_a_head_few_eigenvalues_and_what_is_excluded_keep_the_base_and_span_nothing(last):
    action = LayerwiseRate(low=1, high=5, exclude=["block.*"])
    assert action.factors(seen(2.0, 3.0, 6.0, **last)) == {"a": 1.0, "b": 5.0}


def test_a_layer_whose_alpha_is_not_known_keeps_the_base():
    assert LayerwiseRate(low=1, high=5).factors(seen(2.0, math.nan, 6.0)) == {"a": 1.0, "c": 5.0}


@pytest.mark.parametrize("alphas", [(3.0,), (3.0, 3.0), (math.nan, 3.0), (math.nan, math.nan)])
def test_where_there_is_nothing_to_balance_every_layer_keeps_the_base(alphas):
    assert LayerwiseRate().factors(seen(*alphas)) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": -0.1}, "expected 0 <= low <= high"),
        ({"low": 2, "high": 1}, "expected 0 <= low <= high and high > 0, got 2, 1"),
        ({"low": 0, "high": 0}, "high > 0"),
        ({"high": math.inf}, "expected"),
        ({"high": math.nan}, "expected"),
        ({"exclude": "head"}, "exclude must be a sequence of globs; got the string 'head'"),
    ],
)
@pytest.mark.parametrize("kind", [LayerwiseRate, LayerwiseDecay])
def test_a_wrong_bound_is_refused(kind, wrong, message):
    with pytest.raises(InvalidArgument, match=f"{kind.__name__}: .*{message}"):
        kind(**wrong)


def test_actions_are_dry_runs_unless_told():
    assert (LayerwiseRate().dry_run, LayerwiseDecay().dry_run) == (True, True)
