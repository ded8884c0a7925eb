"""`python -m flashu_compile` is the command `flashu-compile`."""

from flashu_compile.cli import app

if __name__ == "__main__":
    app(prog_name="flashu-compile")
