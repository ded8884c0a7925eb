"""Every decision of a build, as data: the parameters of the techniques, what was decided by them, the step plan.

Others use `Recipe` (recipe.py). Imports `system` and what lies flat, and neither torch nor ONNX Runtime, since
serving a bundle reads its recipe. A new parameter of a technique is a field in config.py.
"""
