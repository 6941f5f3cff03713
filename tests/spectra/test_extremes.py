"""What a device finds of the largest entries is what the host finds by looking at all of them."""

import numpy as np
import pytest
import torch

from ww_monitor.spectra import extremes as module
from ww_monitor.spectra.device import Accelerator
from ww_monitor.spectra.elements import elements, large_entries, moments
from ww_monitor.spectra.extremes import extremes


def draw(law, shape=(120, 90), seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    if law == "student":
        w /= (torch.randn((4, *shape), generator=generator, dtype=torch.float64).square().mean(0)).sqrt()
    elif law == "cauchy":
        w /= torch.randn(shape, generator=generator, dtype=torch.float64)
    elif law == "shifted":
        w[3, 4] += 40.0
        w += 7.0
    elif law == "huge":
        w[5, 6], w[7, 8] = 1e9, -3e8
    elif law == "grid":
        w = (w * 2).round()
        w[2, 3] = 60.0
    elif law == "ties at the limit":
        w = w.sign()
        w[:2] *= 9.0
    elif law == "large mean":
        w = 1e4 + w
    return w


LAWS = ["normal", "student", "cauchy", "shifted", "huge", "grid", "ties at the limit", "large mean"]


def asked(matrices):
    stack = torch.stack(matrices)
    return extremes(list(stack), moments(stack), Accelerator(torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_trimming_and_large_entries_are_the_hosts_or_not_known(law, dtype):
    w = draw(law).to(dtype)
    expected, reach = elements(w[None]), w.numel() ** 0.25
    (found,) = asked([w])
    trimmed = found.trimmed(reach)
    if trimmed is not None:
        mean, std = trimmed
        if float(expected.headroom) > 1:
            assert mean == pytest.approx(float(expected.mean), rel=1e-12, abs=1e-12 * std)
            assert std == pytest.approx(float(expected.std), rel=1e-12)
        large, addresses = large_entries(w[None], expected), found.above(mean, std, w.shape)
        if addresses is not None and float(expected.headroom) > 1:
            assert torch.equal(addresses.index, large.index)
            assert torch.equal(addresses.value, large.value.double())


def test_most_laws_are_settled_by_the_largest_entries():
    """Else the way around the host's waits would never be taken."""
    for law in ("student", "shifted", "huge", "grid"):
        for dtype in (torch.float32, torch.bfloat16):
            w = draw(law).to(dtype)
            (found,) = asked([w])
            mean, std = found.trimmed(w.numel() ** 0.25)
            assert len(found.above(mean, std, w.shape).index) >= 1


def test_pieces_make_no_difference(monkeypatch):
    w = draw("student")
    (whole,) = asked([w])
    monkeypatch.setattr(module, "_PIECE", 777)
    (parts,) = asked([w])
    np.testing.assert_array_equal(whole.index, parts.index)
    np.testing.assert_array_equal(whole.value, parts.value)
    assert parts.others == pytest.approx(whole.others, rel=1e-12)


def test_more_large_entries_than_are_known_are_not_named():
    w = draw("normal")
    w.view(-1)[:200] = 50.0 + torch.arange(200, dtype=torch.float64)
    (found,) = asked([w])
    assert found.trimmed(w.numel() ** 0.25) is None or found.above(0.0, 1.0, w.shape) is not None
    few = module.Extremes(0.0, found.index[:4], found.value[:4], found.reach, found.others)
    assert few.above(0.0, 1.0, w.shape) is None


def test_many_matrices_are_one_read():
    class Counting(Accelerator):
        reads = 0

        def read(self, tensors):
            Counting.reads += 1
            return super().read(tensors)

    stack = torch.stack([draw("student", seed=k) for k in range(5)])
    found = extremes(list(stack), moments(stack), Counting(torch.device("cpu")))
    assert (len(found), Counting.reads) == (5, 1)
