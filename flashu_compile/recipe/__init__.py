"""Every decision of a build, as data: the parameters of the techniques, what was decided by them, the step plan.

Others use `Recipe` (recipe.py). Imports no other folder of the package, and neither torch nor ONNX Runtime, since
serving a bundle reads its recipe. A new parameter of a technique is a field
in config.py.
"""
