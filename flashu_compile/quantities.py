"""Numbers formatted for people."""

from __future__ import annotations


def quantity(value: float) -> str:
    """Format with three significant digits and a decimal prefix (1536 -> `1.54 k`); whole below a thousand."""
    if abs(value) < 1000:
        return f"{value:.0f}"
    for prefix in ("k", "M", "G", "T"):
        value /= 1000
        if abs(value) < 999.5:
            return f"{value:#.3g}".rstrip(".") + f" {prefix}"
    return f"{value / 1000:.3g} P"


def size(count: float) -> str:
    """Format a number of bytes: `42.0 MB`."""
    text = quantity(count)
    return f"{text}B" if " " in text else f"{text} B"


def change(before: float, after: float) -> str:
    """Format the change from `before` to `after` in whole per cent: `−37 %`; empty if it rounds to zero."""
    share = round(100 * (after / before - 1)) if before else 0
    return f"{share:+d} %".replace("-", "−") if share else ""


def seconds(value: float) -> str:
    """Format a time with three significant digits: `1.24 s`, `83.1 ms`."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
