"""Where does an engine depart from what it should compute? Engines against a reference, value by value."""

from flashu_compile.looking.comparison.compare import compare_layers

__all__ = ["compare_layers"]
