"""Shared code of the commands: the app, how errors are reported, and the arguments common to all."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from flashu_compile.arguments import LARGEST_THREADS
from flashu_compile.cli.logs import logged_on_stderr
from flashu_compile.cli.streams import accept_any_text
from flashu_compile.cli.terminal import say, visible
from flashu_compile.errors import FlashuError, MissingDependencyError


@contextmanager
def told_in_one_line(exit_code: int) -> Iterator[None]:
    """Turn every error made on purpose, or by the file system, into one line on stderr and `exit_code`."""
    try:
        yield
    except FlashuError as error:
        message = str(error)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        message = str(error)
    else:
        return
    say(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(exit_code)


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `SystemExit`, with the exit code that shells use, so that drafts are removed.

    What the process was told to ignore (`nohup`) stays ignored. Repeated signals are ignored too: a terminal
    that closes sends SIGHUP more than once, which must not end the clean-up.
    """
    kinds = [kind for kind in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if kind is not None]
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        kinds = []
    taken = [kind for kind in kinds if signal.getsignal(kind) == signal.SIG_DFL]

    def end(number: int, frame: object) -> NoReturn:
        for kind in taken:
            signal.signal(kind, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for kind in taken:
        signal.signal(kind, end)
    try:
        yield
    finally:
        for kind in taken:
            signal.signal(kind, signal.SIG_DFL)


# Click's, which Typer keeps where its version pleases.
_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _visible_usage_errors() -> Iterator[None]:
    """Escape what usage errors quote of arguments, which may be names of files."""
    try:
        yield
    except _UsageError as error:
        error.message = "\n".join(map(visible, error.message.split("\n")))
        raise


class _Commands(TyperGroup):
    """A group of commands that reports errors in one line and escapes what it quotes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        accept_any_text()
        return super().main(*args, **kwargs)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _visible_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with logged_on_stderr(), unwound_by_signals(), told_in_one_line(1), _visible_usage_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each command has its own help with examples: [bold]flashu-compile generate --help[/]",
)


# The panels of the help, in order.
COMPILING, USING, LOOKING = "Compile a model", "Use a bundle", "Look and check"


def examples(*commands: str) -> str:
    """Return an epilog with one command per paragraph, as Typer's help keeps no other line breaks."""
    return "\n\n".join(["Examples:", *(f"flashu-compile {command}" for command in commands)])


Bundle = Annotated[Path, typer.Argument(metavar="DIR", help="A bundle made by [bold]build[/].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Provider = Annotated[
    str,
    typer.Option(
        help="What runs the engines: cpu, cuda, tensorrt, or a provider's name in ONNX Runtime. "
        "It is used or the command fails; [bold]doctor[/] tells which work here."
    ),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="An option of the provider, by its name in ONNX Runtime: device_id=1, enable_cuda_graph=true, "
        "trt_engine_cache_path=engines, or library=PATH of a plug-in. Repeatable.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=LARGEST_THREADS, help="Threads an engine computes with.", show_default="one per core"
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help="fast: each engine keeps weights as it computes best; low: all engines share one map of them."
    ),
]
RunBackend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="What runs the engines, if not what they were built for: openvino, or auto for the faster one here, which "
        "is measured once.",
        show_default="the bundle's",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run a bundle whose engines are code or have unusual operators. Give it only if you know who built it.",
    ),
]
Digest = Annotated[
    str | None,
    typer.Option(
        metavar="SHA256",
        help="The digest that [bold]build[/] printed: fail if this is another bundle, whole as it may be.",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(help="The VAE of a checkpoint that does not bring its own: folder, file or hub id."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="The tokenizer of a checkpoint that does not bring its own: folder, file or hub id."),
]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the result, and errors.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Log every stage on stderr, what is decided on the way, and in the end where the time went.",
    ),
]
LlmConfig = Annotated[
    str | None,
    typer.Option(
        "--llm-config",
        help="The language model's config.json, where sizes alone do not tell its attention heads: folder or file.",
    ),
]
Resolution = Annotated[
    str | None,
    typer.Option(
        metavar="SIDE|WxH|NAME",
        help="The size of the pictures that it draws, in pixels: 512, or 768x512 (width first); or that of a published "
        "checkpoint by its name, such as show-o2-1.5B-HQ.",
        show_default="what the checkpoint says",
    ),
]


def provider_options(given: list[str] | None) -> dict[str, object]:
    """Parse `NAME=VALUE` texts as a mapping; of several for one name the last holds."""
    for text in given or ():
        if not text.partition("=")[0].strip() or "=" not in text:
            raise typer.BadParameter(f"--provider-option takes NAME=VALUE, not {text!r}.")
    pairs = (text.partition("=") for text in given or ())
    return {name.strip(): value for name, _, value in pairs}


def _version(wanted: bool) -> None:
    if wanted:
        import flashu_compile

        say(f"flashu-compile {flashu_compile.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile a unified multimodal model into a bundle of inference engines, and use the bundle.

    A bundle is a folder. [bold]build[/] makes one from a checkpoint and a recipe, which [bold]calibrate[/]
    completes. [bold]generate[/], [bold]ask[/], [bold]verify[/], [bold]inspect[/], [bold]diff[/], [bold]recipe[/],
    and [bold]benchmark[/] and [bold]evaluate[/] against another bundle run without PyTorch; what looks at a model
    needs the extra [bold]flashu-compile\\[compile][/].
    """


def quiet_onnxruntime() -> None:
    """Silence ONNX Runtime's own log, since our errors say the same in one line. What needs it says if it is absent."""
    with suppress(MissingDependencyError):
        from flashu_compile.system.onnxruntime_library import ort

        ort.set_default_logger_severity(4)
