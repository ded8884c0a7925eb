"""Adapters: how a family of models is found, read and captured. Show-o2 is in showo2/, with its own network.

Front door: `load_model` (loading.py). Imports program and bundle; imported by the compiler alone.
"""
