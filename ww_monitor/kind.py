"""What layers there are, and everything that depends on which one a weight belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class About:
    """What holds for all weights of a kind.

    Attributes:
        label: The weights in words, in the plural.
        role: The role of each, or `None` where its name tells.
        layer_type: Weightwatcher's word for it, in that tool's table.
        ndim: Least and largest number of dimensions of the stored tensor.
        eigenvalue_factor: What eigenvalues are multiplied by after the solve.
    """

    label: str
    role: str | None = None
    layer_type: str = "dense"
    ndim: tuple[int, int] = (2, 3)
    eigenvalue_factor: float = 1.0


class Kind(str, Enum):
    """What a layer is. A member equals, prints and is saved as its plain word; what it means is in `about`.

    The factor of convolutions is weightwatcher 0.7.7's normalisation, kept so that published alpha-hat values stay
    comparable; it shifts log-scale metrics and leaves alpha alone.

    >>> Kind("conv") is Kind.CONV, Kind.CONV == "conv", f"{Kind.CONV}", Kind.CONV.about.eigenvalue_factor
    (True, True, 'conv', 0.5)
    """

    about: About

    DENSE = "dense", About("dense weights")
    EMBEDDING = "embedding", About("embedding tables", role="embed", layer_type="embedding")
    CONV = "conv", About("convolution kernels", role="conv", layer_type="conv2d", ndim=(3, 5), eigenvalue_factor=0.5)
    ATTENTION = "attention", About("attention projections")
    RECURRENT = "recurrent", About("recurrent kernels", role="")
    PARAMETER = "parameter", About("parameters that only their name and shape explain", ndim=(2, 5))
    OTHER = "other", About("tensors that no known layer owns", role="")

    def __new__(cls, word: str, about: About = About("")) -> Kind:  # noqa: D102 - the default is for `Kind("conv")`
        member = str.__new__(cls, word)
        member._value_, member.about = word, about
        return member

    __str__, __repr__ = str.__str__, str.__repr__  # as of enum.StrEnum, which Python 3.10 lacks
