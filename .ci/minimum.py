"""Print pip constraints that pin what a user needs to the lowest versions pyproject.toml admits.

PyTorch is left out: its lowest version comes with CUDA alone, which is gigabytes.
"""

import pathlib
import re
import tomllib

project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in (*project["dependencies"], *extras["compile"], *extras["evaluate"]):
    name, lowest = re.match(r"([\w-]+)>=([\w.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={lowest}")
