"""Inspection of models and bundles: structure of a model, layer-by-layer comparison, differences of bundles.

Front doors: `model_structure` (structure.py), `compare_layers` (comparison/), `diff` (bundle_diff.py). Only
the command line imports this room. Reports are written by builds, so they are in `report`.
"""
