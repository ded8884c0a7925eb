"""The weights of a bundle as this processor's kernels read them, on disk once for all of its engines.

Each session packs weights into a form that its kernels read fastest, and keeps that copy to itself, though engines of
one bundle mostly have the same weights. Here every engine is opened once, and ONNX Runtime saves it with its packed
weights; what engines have in common is stored once, and sessions map it. They compute with the very bytes that they
would have packed themselves.

What is packed depends on the processor and on the version of ONNX Runtime, so it lies in the user's cache, never in the
bundle. Sessions pack each weight again when they are made, and compare: where the stored form is another, they keep
theirs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from flashu_compile import reading
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import MANIFEST, WEIGHTS, EngineSpec, FileEntry, file_entry
from flashu_compile.errors import BundleError, CacheError
from flashu_compile.runtime.external_places import Place, with_places
from flashu_compile.runtime.onnx_file import OnnxFile
from flashu_compile.system.drafts import draft_folder, is_draft, one_at_a_time
from flashu_compile.system.onnxruntime_library import ERRORS, ort
from flashu_compile.system.paths import PACKED, cache_folder
from flashu_compile.system.processor import instructions, processor
from flashu_compile.version import __version__

#: The files of one bundle: their record, the weights of all engines, and a graph for each.
RECORD, STORE = "packed.json", "weights.bin"

#: The file, beside the folders of bundles, that a process locks while it packs.
LOCK = "lock"

#: Bytes of a weight store below which a copy for each engine does no harm.
SMALLEST = 64 << 20
#: How many times the store's bytes engines must read, in sum, for sharing to be worth the disk.
LEAST_READ = 1.5
#: Days after which packed weights that no process has opened are removed.
UNUSED_DAYS = 30
# The final files take some twice the weights, and those of one engine as much again while they are made.
_DISK = 5
# Large ranges are mapped from the beginning of a page, small ones from that of a cache line.
_PAGE, _LARGE, _LINE = 4096, 1 << 16, 64
_CHUNK = 1 << 22
_OWN, _PACKED_FORM = "external", "prepacked"

#: Opens one engine from the bundle, its options changed by the function that is given.
Open = Callable[[EngineSpec, Callable[[ort.SessionOptions], None]], object]

#: What ends the making of packed weights, or opening a session on them, without harm.
FAILURES: tuple[type[Exception], ...] = (OSError, CacheError, *ERRORS)
# A damaged engine, too, ends the making; it is an error only to whoever opens that engine.
_NOT_MADE: tuple[type[Exception], ...] = (*FAILURES, BundleError)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PackedRecord:
    """What is kept for one bundle, and when it holds.

    Attributes:
        bundle: the bundle's folder.
        manifest: the SHA-256 of its manifest.
        files: size and SHA-256 of each file.
        store_written: when the weights were written, in nanoseconds since the epoch.
    """

    bundle: str
    manifest: str
    files: dict[str, FileEntry]
    store_written: int

    def is_current(self) -> bool:
        """Tell whether the bundle is still there and was not built again."""
        try:
            return file_entry(Path(self.bundle) / MANIFEST).sha256 == self.manifest
        except OSError:
            return False


class PackedWeights:
    """The packed weights of a bundle. Raises `CacheError` if a file is not what was written.

    Graphs are always hashed. The store is hashed only if its size or its time has changed, because hashing a large
    store would take longer than the rest of loading.
    """

    def __init__(self, folder: Path, record: PackedRecord) -> None:
        self._folder, self._record = folder, record
        try:
            status, listed = (folder / STORE).stat(), record.files[STORE]
        except (OSError, KeyError) as error:
            raise CacheError(f"{folder} has no weights: {error}.") from error
        if (status.st_size, status.st_mtime_ns) != (listed.bytes, record.store_written):
            self.path(STORE)
        for name in record.files.keys() - {STORE}:
            self.path(name)

    def path(self, name: str) -> Path:
        """Return the path of a file, whose bytes are compared with its hash. Raises `CacheError` if they differ."""
        path, listed = self._folder / name, self._record.files.get(name)
        try:
            if listed is not None and path.stat().st_size == listed.bytes and file_entry(path) == listed:
                return path
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error}.") from error
        raise CacheError(f"{path} is not what was written there.")

    def graph(self, engine: str) -> Path:
        """Return the path of an engine's graph. Raises `CacheError` as `path` does."""
        return self.path(_graph(engine))


def read_packed(options: ort.SessionOptions) -> None:
    """Let a session read a packed graph as it is; it was optimised when it was written."""
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Else the buffers that weights are packed into for comparison stay with the session, for its values.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if _has_common_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")


@functools.cache
def _has_common_arena() -> bool:
    """Make one arena for this process, in which sessions that ask for it keep values; tell whether there is one.

    By itself each session keeps, for its next run, as much memory as its largest run has taken.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(memory, None)
    except ERRORS as error:  # who embeds this may have made one, or another kind
        _log.info("Sessions keep memory for values each for itself: %s", error)
        return False
    return True


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc): all that was packed for comparison."""
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    found: Callable[[int], int] | None = None
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def packed_weights(
    files: BundleFiles, graphs: Callable[[EngineSpec], OnnxFile], open_engine: Open, **depends: object
) -> PackedWeights | None:
    """Return the packed weights of a bundle, made now if there are none; None, which is logged, if none can be kept.

    `graphs` reads the graph of an engine; `depends` are options that packed graphs or weights depend on. Also returns
    None if packing would save little, because the weights are few or the engines have hardly any in common, and if
    there are none yet and the hashes of the bundle are not verified: a later load that does verify them would find what
    was packed from unknown bytes.
    """
    bundle, manifest, above = files.directory, files.manifest, cache_folder(PACKED)
    if (
        above is None
        or WEIGHTS not in manifest.files
        or manifest.files[WEIGHTS].bytes < SMALLEST
        or is_draft(bundle)
    ):
        return None
    digest, stored = file_entry(bundle / MANIFEST).sha256, manifest.files[WEIGHTS].bytes
    folder = above / _key(digest, depends)
    try:
        if (found := _kept(folder)) is not None:
            return found
        if not files.verify_hashes:
            return None
        read = sum(weight.length for spec in manifest.engines for weight in graphs(spec).weights)
        if read < LEAST_READ * stored:
            return None
        above.mkdir(parents=True, exist_ok=True, mode=0o700)
        with one_at_a_time(above / LOCK, _tell_of_waiting):
            if (found := _kept(folder)) is not None:  # another process was faster
                return found
            _check_disk(above, stored)
            _log.info("Packing the weights of %s for this processor, once.", bundle)
            started = time.perf_counter()
            _prepare(folder, PackedRecord(str(bundle), digest, {}, 0), manifest.engines, open_engine)
            _log.info(
                "Packed the weights of %s in %.1f s, into %s.", bundle, time.perf_counter() - started, folder
            )
            return _kept(folder)
    except _NOT_MADE as error:
        _log.warning("Each engine of %s keeps packed weights of its own: %s", bundle, error)
        return None


def _tell_of_waiting() -> None:
    _log.info("Waiting for another load, which packs the weights of a bundle for this processor.")


def read_record(path: Path) -> PackedRecord:
    """Read the record of packed weights. Raises `CacheError` on anything else."""
    return reading.read_json(path, PackedRecord, CacheError)


def _key(manifest: str, depends: Mapping[str, object]) -> str:
    whole = {
        "bundle": manifest,
        "versions": [ort.__version__, __version__],
        "processor": [processor(), instructions()],
        **depends,
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def _kept(folder: Path) -> PackedWeights | None:
    """Return what is in a folder, and note in the record's time that it was used; what is damaged is removed."""
    if not folder.exists():
        return None
    try:
        found = PackedWeights(folder, read_record(folder / RECORD))
        with contextlib.suppress(OSError):  # a cache that may be read but not written
            os.utime(folder / RECORD)
        return found
    except CacheError as error:
        _log.warning("Packed weights are damaged and are made anew: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _check_disk(folder: Path, store_bytes: int) -> None:
    needed, free = _DISK * store_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise CacheError(f"{folder} has {free / 1e9:.1f} GB left, and packing needs {needed / 1e9:.1f} GB.")


def _prepare(folder: Path, record: PackedRecord, engines: Iterable[EngineSpec], open_engine: Open) -> None:
    """Write the files of all engines in a draft, and rename it into place. Raises `OSError`, or what opening raises."""
    _remove_outdated(folder.parent)
    with draft_folder(folder.parent) as draft:
        place = draft / folder.name
        place.mkdir()
        with _Store(place / STORE) as store:
            for spec in engines:
                name = _graph(spec.name)
                saved = draft / name
                open_engine(spec, functools.partial(_save_to, saved))
                beside = saved.with_name(saved.name + "." + _OWN)
                graph = with_places(saved.read_bytes(), functools.partial(store.moved, saved.parent))
                _write(place / name, graph)
                saved.unlink()
                beside.unlink(missing_ok=True)
                give_back_memory()
        files = {path.name: file_entry(path) for path in sorted(place.iterdir())}
        written = (place / STORE).stat().st_mtime_ns
        told = dataclasses.asdict(dataclasses.replace(record, files=files, store_written=written))
        _write(place / RECORD, (json.dumps(told) + "\n").encode())
        try:
            os.rename(place, folder)
        except OSError:
            if not (folder / RECORD).is_file():  # else another process was faster, where there are no locks
                raise


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it outlasts a loss of power, as the store beside it does."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _save_to(path: Path, options: ort.SessionOptions) -> None:
    """Make a session write its graph, and its weights beside it, packed ones after those they are made of."""
    options.log_severity_level = 3  # or it warns that the file is for this processor
    options.optimized_model_filepath = str(path)
    for name, value in {
        "optimized_model_external_initializers_file_name": path.name + "." + _OWN,
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
        "save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(f"session.{name}", value)


def _remove_outdated(above: Path) -> None:
    """Remove what bundles that are gone, or were built again, have left, and what was not used for long.

    Other versions and processors may share the cache, so what this process would not read stays until then.
    """
    for path in above.glob(f"*/{RECORD}"):
        # A record that cannot be read tells nothing of its bundle.
        with contextlib.suppress(OSError, CacheError):
            unused = time.time() - path.stat().st_mtime
            if unused > UNUSED_DAYS * 86400 or not read_record(path).is_current():
                shutil.rmtree(path.parent, ignore_errors=True)


def _graph(engine: str) -> str:
    return f"{engine}.onnx"


class _Store:
    """A file of byte ranges, each content once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._known: dict[bytes, int] = {}

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        # Its time tells later that it is whole, so no loss of power may come between.
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def moved(self, folder: Path, place: Place) -> Place:
        """Take in a weight from the file it lies in, with its packed forms, and return its place here."""
        told = dict(place)
        with (folder / told["location"]).open("rb") as source:
            offset = self._taken(source, int(told.get("offset", "0")), int(told["length"]))
            moved = [("location", STORE), ("offset", str(offset)), ("length", told["length"])]
            for key, form in place:
                if key.startswith(_PACKED_FORM):
                    kernel, *buffers = form.split("|")
                    moved.append((key, "|".join((kernel, *(self._buffer(source, b) for b in buffers)))))
        return moved

    def _buffer(self, source: BinaryIO, told: str) -> str:
        """Take in one buffer of a packed form, which is told as offset, length and checksum."""
        offset, length, checksum = told.split(";")
        return f"{self._taken(source, int(offset), int(length))};{length};{checksum}"

    def _taken(self, source: BinaryIO, offset: int, length: int) -> int:
        """Return where these bytes of the source lie here, written now if they do not yet."""
        digest = hashlib.sha256()
        for chunk in _chunks(source, offset, length):
            digest.update(chunk)
        known = self._known.get(digest.digest())
        if known is None:
            alignment = _PAGE if length >= _LARGE else _LINE
            self._file.write(bytes(-self._file.tell() % alignment))
            known = self._known[digest.digest()] = self._file.tell()
            for chunk in _chunks(source, offset, length):
                self._file.write(chunk)
        return known


def _chunks(source: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    source.seek(offset)
    while length:
        chunk = source.read(min(length, _CHUNK))
        if not chunk:
            raise OSError("a file of weights that was just written ends too early")
        length -= len(chunk)
        yield chunk
