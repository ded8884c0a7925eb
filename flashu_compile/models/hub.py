"""Repositories on the Hugging Face hub, through its own client."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flashu_compile.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `organisation/name`. A path of two parts has it too: look on disk first."""
    return _HUB_ID.fullmatch(text) is not None


def fetch(repository: str, patterns: Iterable[str], *, instead: str) -> Path:
    """The local snapshot of the files of `repository` that match `patterns`, downloaded unless cached.

    `instead` ends the error message: what to pass if the hub cannot be used.

    Raises:
        CheckpointError: no such repository, no access, or no connection and nothing cached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        reason = "there is no connection to the hub (or offline mode is on) and no cached copy"
        raise CheckpointError(_message(repository, reason, instead)) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(_message(repository, reason.rstrip("."), instead)) from error


def _message(repository: str, reason: str, instead: str) -> str:
    return (
        f"{repository!r} is no local directory and could not be fetched from the Hugging Face hub: {reason}. "
        f"Download it where there is a connection (hf download {repository}) and {instead}."
    )
