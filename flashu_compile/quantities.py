"""Numbers as people read them."""

from __future__ import annotations


def quantity(value: float) -> str:
    """Three significant digits and a decimal prefix (1536 -> `1.54 k`); whole below a thousand."""
    if abs(value) < 1000:
        return f"{value:.0f}"
    for prefix in ("k", "M", "G", "T"):
        value /= 1000
        if abs(value) < 999.5:
            return f"{value:#.3g}".rstrip(".") + f" {prefix}"
    return f"{value / 1000:.3g} P"


def size(count: float) -> str:
    """Bytes: `42.0 MB`."""
    text = quantity(count)
    return f"{text}B" if " " in text else f"{text} B"


def change(before: float, after: float) -> str:
    """By how much `after` is less or more, in whole per cent: `−37 %`; nothing where there is no difference to see."""
    share = round(100 * (after / before - 1)) if before else 0
    return f"{share:+d} %".replace("-", "−") if share else ""
