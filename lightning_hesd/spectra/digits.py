"""Numbers as texts with as many digits as are certain, and true minus signs."""

from __future__ import annotations

import math

MOST_DIGITS = 6
"""Largest number of digits of a number."""


def number(value: float, digits: int) -> str:
    """Return a number with some digits and a true minus."""
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}").replace("inf", "∞")


def certain(value: float, low: float, high: float) -> str:
    """Return a number with as many digits as its interval leaves certain, six at most.

    Examples:
        >>> certain(1.23456, 1.2, 1.3), certain(-0.0413, -0.19, -0.039), certain(0.5, 0.5, 0.5)
        ('1.23', '−0.04', '0.5')
    """
    error = max(high - value, value - low)
    if not 0 < error < math.inf or value == 0 or not math.isfinite(value):
        return number(value, MOST_DIGITS if error == 0 else 2)
    place = math.floor(math.log10(error))
    digits = math.floor(math.log10(abs(value))) - place + (2 if error < 1.95 * 10.0**place else 1)
    return number(value, min(max(digits, 1), MOST_DIGITS))


def interval(low: float, high: float) -> str:
    """Return an interval, rounded outward to two digits of its width.

    Examples:
        >>> interval(-0.1896, -0.0399), interval(-0.25, -0.25), interval(-math.inf, -1.234)
        ('[−0.19, −0.03]', '[−0.25, −0.25]', '[−∞, −1.23]')
    """
    width = high - low
    if not 0 < width < math.inf:
        return f"[{number(low, 3)}, {number(high, 3)}]"
    unit = 10.0 ** (math.floor(math.log10(width)) - 1)
    ends = math.floor(low / unit + 1e-9) * unit, math.ceil(high / unit - 1e-9) * unit
    return f"[{number(ends[0], MOST_DIGITS)}, {number(ends[1], MOST_DIGITS)}]"
