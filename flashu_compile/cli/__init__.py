"""The command `flashu-compile`: make recipes and bundles, use them, look into them.

Results go to stdout (as one JSON document with `--json`), progress and errors to stderr. Exit code 0 is success, 1 a
problem with what was given or found (one line says which), 2 a usage error. `diff` and `recipe diff` alone differ, as
diff(1) does: 1 says that the bundles or recipes differ, 2 that something is wrong.
"""

# Each module adds its commands to the app when it is imported, so this order is that of the help.
from flashu_compile.cli import compiling, families, using, looking, comparing, measuring, recipes, caching  # isort: skip # noqa: F401
from flashu_compile.cli.base import app

__all__ = ["app"]
