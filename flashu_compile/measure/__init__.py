"""What is measured on programs and engines: calibration, what layers lose in int8, what a lossy recipe costs.

Front doors: `calibrate_t2i` and `calibrate_mmu` (calibration.py), `picture_cost` and `answer_cost` (cost.py). Imports
program, passes' analyses, recipe, bundle, report's samples, and the loops of runtime.
"""
