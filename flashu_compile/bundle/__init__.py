"""The format that the build side and the run side share: manifest, files, signatures, and what is data of a bundle.

Front doors: `Manifest` and `read_manifest` (manifest.py), `BundleFiles` (files.py). Also the rules that both sides
must follow alike: prompt templates, picture preprocessing, initial noise, sizes of dynamic dimensions, precisions.
Imports no other room, and neither torch nor ONNX Runtime. A new field of the manifest is a field of a dataclass in
manifest.py.
"""
