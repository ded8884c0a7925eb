"""Emitters, one per file: they turn Programs into a backend's engines, and engines into a bundle on disk.

Front doors: `find_backend` (backends/) and `write_bundle` (bundle.py). Imports passes, program, operators,
recipe, bundle, and runtime, which runs every engine before it is written. For a new backend copy
backends/torch.py, and its other half in `flashu_compile/runtime/backends/`.
"""
