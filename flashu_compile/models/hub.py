"""Repositories on the Hugging Face hub, through its own client."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from flashu_compile.errors import CheckpointError
from flashu_compile.system.paths import absolute

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"{_NAME}/{_NAME}(@{_NAME}(/{_NAME})*)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Files of a repository on the hub as they are in one of its commits, on disk."""

    directory: Path
    repository: str
    commit: str

    @property
    def pinned(self) -> str:
        """The hub id that pins this commit."""
        return f"{self.repository}@{self.commit}"


def is_hub_id(text: str) -> bool:
    """Return whether `text` has the form `organisation/name` or `organisation/name@revision`.

    A revision is a branch, a tag or a commit. A path of two parts may have this form too: look on disk first.
    """
    return _HUB_ID.fullmatch(text) is not None


def fetch(hub_id: str, patterns: Iterable[str], *, instead: str) -> Snapshot:
    """Download the files of a repository that match `patterns`, unless cached. `is_hub_id(hub_id)` holds.

    `instead` ends the error message: what to pass if the hub cannot be used.

    Raises:
        CheckpointError: no such repository or revision, no access, or no connection and nothing cached.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    if constants.HF_HUB_CACHE.startswith("~"):
        reason = "no home directory is known to keep it in (set HF_HOME to a folder, or HOME)"
        raise CheckpointError(_message(hub_id, reason, instead))
    try:
        directory = absolute(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(patterns)
            )
        )
    except LocalEntryNotFoundError as error:
        reason = "there is no connection to the hub (or offline mode is on) and no cached copy"
        raise CheckpointError(_message(hub_id, reason, instead)) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(_message(hub_id, reason.rstrip("."), instead)) from error
    return Snapshot(Path(directory), repository, Path(directory).name)  # the client names folders by commit


def _message(hub_id: str, reason: str, instead: str) -> str:
    repository, _, revision = hub_id.partition("@")
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    return (
        f"{hub_id!r} is no local directory and could not be fetched from the Hugging Face hub: {reason}. "
        f"Download it where there is a connection ({command}) and {instead}."
    )
