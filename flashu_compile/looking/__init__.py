"""Inspection of models and bundles: structure, layer-by-layer comparison, differences of bundles, what they cost.

Front doors: `model_structure` (structure.py), `compare_layers` (comparison/), `diff` (bundle_diff.py), `benchmark`
(benchmark.py), `evaluate` (evaluate.py). Only the command line imports this room. Reports are written by builds, so
they are in `report`.
"""
