"""The way from a model to a bundle: capture → decide → passes → emit → check → write.

Front doors: `export`, `calibrate` and `capture_model` (export.py). The only room that imports `models`; of
the others it imports all but `looking` and `cli`. What differs from task to task is in tasks.py.
"""
