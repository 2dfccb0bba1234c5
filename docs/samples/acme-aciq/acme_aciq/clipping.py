"""Where to clip, in units of a distribution's spread. With x within +-a in 2^M steps the expected
squared error is that of rounding, a^2 / (3 * 4^M), and that of clipping; its derivative is 0 at

    Laplace(0, b), x = a / b:  x exp(x) = 3 * 4^M, that is x = W(3 * 4^M), Lambert's function
    N(0, s^2),     x = a / s:  x erfc(x / sqrt 2) + x / (3 * 4^M) = sqrt(2 / pi) exp(-x^2 / 2)

Of values without negatives, half of such a distribution, all codes lie on one side: M + 1 bits.
Source: arXiv 1810.05723, equations 10 and 11.
"""

from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfc, lambertw


@cache
def laplace_clip(bits: int) -> float:
    """In units of b = E|x|."""
    return float(lambertw(3.0 * 4.0**bits).real)


@cache
def gauss_clip(bits: int) -> float:
    """In units of the standard deviation."""

    def slope(x: float) -> float:
        tail = x * erfc(x / np.sqrt(2)) - np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)
        return float(tail + x / (3 * 4.0**bits))

    return float(brentq(slope, 1e-6, 40.0))
