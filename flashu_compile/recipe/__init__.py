"""Every decision of a build, as data: the parameters of the techniques, what was decided by them, the step plan.

Front door: `Recipe` (recipe.py). Imports nothing of the package but errors, arguments, paths and tasks, and
neither torch nor ONNX Runtime, since serving a bundle reads its recipe. A new parameter of a technique is a field
in config.py.
"""
