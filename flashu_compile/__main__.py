"""`python -m flashu_compile` is the command `flashu-compile`."""

from flashu_compile.cli import app

app(prog_name="flashu-compile")
