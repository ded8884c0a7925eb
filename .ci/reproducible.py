"""The build backend of setuptools, which gives the same bytes for the same sources, whenever and wherever it runs."""

import gzip
import os
import tarfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_TIME = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "1577836800"))  # 2020-01-01; wheels take it from there


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """Build the source archive, with one time, owner and order for all files."""
    name = build_meta.build_sdist(sdist_directory, config_settings)
    path = Path(sdist_directory, name)
    draft = path.with_suffix(".draft")
    with (
        tarfile.open(path) as source,
        draft.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=_TIME) as packed,
        # The other format has headers with the times that the files had.
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as target,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            target.addfile(_plain(member), source.extractfile(member) if member.isfile() else None)
    draft.replace(path)
    return name


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    executable = member.isdir() or member.mode & 0o100
    return member.replace(
        mtime=_TIME, mode=0o755 if executable else 0o644, uid=0, gid=0, uname="", gname="", deep=False
    )
