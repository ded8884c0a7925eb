"""Print pip constraints that pin what a user needs to the lowest versions pyproject.toml admits.

PyTorch is left out: its lowest version comes with CUDA alone, which is gigabytes.
"""

import pathlib
import re
import tomllib

project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in (
    *project["dependencies"],
    *(requirement for extra in ("gpu", "compile", "evaluate") for requirement in extras[extra]),
):
    found = re.match(r"([\w-]+)>=([\w.]+)", requirement)  # None for an extra within an extra
    if found and found[1] != "torch":
        print(f"{found[1]}=={found[2]}")
