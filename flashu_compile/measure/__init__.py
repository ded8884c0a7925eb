"""Measurements on programs and engines: calibration, errors of layers in int8, the cost of a lossy recipe.

Front doors: `calibrate_t2i` and `calibrate_mmu` (calibration.py), `picture_cost` and `answer_cost` (cost.py).
Imports program, passes' analyses, recipe, bundle, report's pictures, and the loops of runtime.
"""
