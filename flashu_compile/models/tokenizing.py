"""Tokenizers by whatever a user has for them, and whether a bundle can hold one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flashu_compile import arguments
from flashu_compile.bundle.prompts import read_tokenizer
from flashu_compile.errors import CheckpointError
from flashu_compile.models import hub, weights
from flashu_compile.system.paths import absolute

FILE = "tokenizer.json"

_LARGEST_ID = 2**24


def read(path: Path) -> Tokenizer:
    """Read a tokenizer in the tokenizers format, from a file or a directory that holds `tokenizer.json`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = path / FILE if path.is_dir() else path
    return read_tokenizer(path, CheckpointError)


def resolve(tokenizer: Any) -> Tokenizer:
    """Resolve a tokenizer given by a user: of the tokenizers library, of transformers, a path, or a hub id.

    Raises:
        CheckpointError: it cannot be found or read, or is of another kind.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, (str, Path)):
        path = absolute(tokenizer)
        if not path.exists() and hub.is_hub_id(str(tokenizer)):
            path = hub.fetch(str(tokenizer), [FILE], instead="pass the path of its tokenizer.json").directory
        return read(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a "fast" tokenizer of transformers
    if isinstance(backend, Tokenizer):
        return backend
    raise CheckpointError(
        f"A {type(tokenizer).__name__} is no tokenizer of the tokenizers library; pass a "
        "tokenizers.Tokenizer, a fast tokenizer of transformers, or the path of a tokenizer.json."
    )


def check_kept(tokenizer: Tokenizer) -> Tokenizer:
    """Return `tokenizer` as it is once a bundle has stored it, in a file that is read back.

    Raises `CheckpointError` if it has another vocabulary then, or cannot be stored.
    """
    read_back = written_and_read(tokenizer)
    if read_back.get_vocab(with_added_tokens=True) != tokenizer.get_vocab(with_added_tokens=True):
        raise CheckpointError(
            "The tokenizer has another vocabulary after it is written to a file and read back; pass the path of the "
            "tokenizer.json that it was made from."
        )
    return read_back


def written_and_read(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of `tokenizer`, made by writing it. Raises `CheckpointError` if it cannot be written."""
    if (highest := _highest(tokenizer)) > _LARGEST_ID:  # writing takes time for every id that no token has
        raise CheckpointError(
            f"The tokenizer has ids up to {highest:,}; one that works has none above {_LARGEST_ID:,}."
        )
    try:
        return Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(
            f"The tokenizer cannot be written to a file and read back ({error}); a bundle needs one made of the "
            "tokenizers library's own parts."
        ) from error


def check_size(tokenizer: Tokenizer, rows: int) -> None:
    """Raise `CheckpointError` if the tokenizer has ids beyond the `rows` of the embedding table."""
    highest = _highest(tokenizer)
    if highest >= rows:
        raise CheckpointError(
            f"The tokenizer has ids up to {highest}, the model embeds {rows}; they do not belong together."
        )


def _highest(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def named_tokens(tokenizer: Any, names: tuple[str, ...]) -> list[str]:
    """Return the tokens that stand around a picture, by their names in a tokenizer of transformers.

    Raises `CheckpointError` if it does not name one of them.
    """
    tokens = {name: getattr(tokenizer, name, None) for name in names}
    if absent := [name for name, token in tokens.items() if not isinstance(token, str)]:
        raise CheckpointError(f"The tokenizer does not name its {absent[0]}, which stands around a picture.")
    return list(map(str, tokens.values()))


def picture_token(network: Any, tokenizer: Any) -> str:
    """Return the token that stands for a picture. Raises `CheckpointError` if the tokenizer has none."""
    number = network.config.image_token_id
    known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(tokenizer)
    token = tokenizer.convert_ids_to_tokens(number) if known else None
    if not isinstance(token, str):
        raise CheckpointError(
            f"The tokenizer has no token {number}, which stands for a picture in the model."
        )
    return token


def take_chat_template(tokenizer: Any, directory: Path | None) -> None:
    """Give a directory's tokenizer the chat template that an older processor left in a file of its own.

    Raises `CheckpointError` if the file holds none.
    """
    path = None if directory is None else directory / "chat_template.json"
    if path is not None and path.is_file():
        found = weights.read_config(path).get("chat_template", tokenizer.chat_template)
        if not isinstance(found, str):
            raise CheckpointError(f"{path} has no chat template that is a text.")
        tokenizer.chat_template = found


def processor_flag(given: Any, name: str) -> bool:
    """Tell a setting of a processor of pictures and texts, or of the one that a directory holds; False if it has none.

    Raises `CheckpointError` if it is neither true nor false.
    """
    if given is None or isinstance(given, str | Path):
        path = None if given is None else absolute(given) / "processor_config.json"
        told = weights.read_config(path).get(name) if path is not None and path.is_file() else None
    else:
        told = getattr(given, name, None)
    return False if told is None else arguments.flag(name, told, CheckpointError)
