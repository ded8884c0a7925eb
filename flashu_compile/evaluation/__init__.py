"""What a bundle costs and what it keeps: timing of sides in turn, data and their splits, scores, and the gate.

Front doors: `measure` (timing.py) and `judge` (judging.py). Imports the runtime, bundle and recipe; no torch. What the
sides are is found in `looking`, since the exact bundle and the eager model are the compiler's.
"""
