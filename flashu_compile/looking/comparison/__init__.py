"""Find where an engine departs from a reference, value by value."""

from flashu_compile.looking.comparison.compare import compare_layers

__all__ = ["compare_layers"]
