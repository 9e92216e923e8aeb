"""Files at addresses of object stores and of the web: s3://, gs://, hf://, https:// and all else that fsspec knows.

A file is read in blocks where it lies, and nothing of it is stored. Credentials and servers are those of the packages
behind fsspec (docs/data.md); what stands in an address behind `?` or before `@` is never shown.
"""

import glob
import hashlib
import io
import re
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from llm.data.blocks import opened
from llm.data.download import chain, first_line, patiently
from llm.errors import BadData, UserError
from llm.utils.addresses import without_secrets as shown
from llm.utils.source import pip_install

SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://")  # two letters at least: C:// is a drive
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # scheme -> extra of pyproject.toml
WEB = ("http", "https")
UNPACKED = {"headers": {"Accept-Encoding": "identity"}}  # a server that packs a file counts other bytes than those sent
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}  # botocore's
NO_CREDENTIALS |= {"DefaultCredentialsError"}  # google.auth's
BROKEN = {"ConnectionError", "ClientConnectionError", "TimeoutError"}  # fsspec says "not found" for these as well
WRONG = (FileNotFoundError, NotADirectoryError, IsADirectoryError, NotImplementedError, ValueError)


def is_address(entry: object) -> bool:
    """Return whether an entry of the configuration is an address, and no path of this machine."""
    return SCHEME.match(str(entry)) is not None


class Store:
    """Place behind an address that the key `key` of the configuration names.

    Raises UserError for an address of a kind that fsspec does not know, or whose package is not installed.
    """

    advice = "Check the network and the address"

    def __init__(self, address: str, key: str) -> None:
        from fsspec.core import url_to_fs

        self.address, self.key = address, key
        self.scheme = SCHEME.match(address)["scheme"].lower()
        self.server = urlsplit(address).hostname if self.scheme in WEB else f"the store of {self.scheme}://"
        try:
            self.fs, self.path = url_to_fs(address, **(UNPACKED if self.scheme in WEB else {}))
        except ImportError as error:
            extra = pip_install(EXTRAS[self.scheme]) if self.scheme in EXTRAS else first_line(error)
            raise UserError(f"{self}: {self.scheme}:// needs a package of its own: {extra}") from error
        except ValueError as error:
            raise UserError(f"{self}: {first_line(error)}") from error

    def __str__(self) -> str:
        return f"{self.key}={shown(self.address)}"

    def lasting_problem(self, error: Exception) -> str | None:
        """Return what the user has to do about an error that waiting does not cure; None for all others."""
        names = {kind.__name__ for part in chain(error) for kind in type(part).__mro__}
        status = _status(error)
        if names & NO_CREDENTIALS:
            return f"{self}: there are no credentials for {self.server}. Set those of the store (docs/data.md)"
        if "PermissionError" in names or status in (401, 403):
            return f"{self}: {self.server} refuses access ({first_line(error)}). Check the credentials (docs/data.md)"
        if status == 404 or ("FileNotFoundError" in names and status is None and not names & BROKEN):
            return f"{self}: there is no such file, folder or bucket. Correct {self.key}"
        if (isinstance(error, WRONG) and status is None and not names & BROKEN) or "ParamValidationError" in names:
            return f"{self}: {first_line(error)}. Correct {self.key}"
        if status is not None and 400 <= status < 500 and status not in (408, 416, 429):
            return f"{self}: {self.server} answers {status} ({first_line(error)})"
        return None

    def ask(self, action) -> Any:
        """Return the result of `action(fs)`, patiently."""
        return patiently(lambda: action(self.fs), self)

    def read(self, file: "StoredFile", start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop` of a file. Raises OSError if others come."""
        content = self.fs.cat_file(file.path, start=start, end=stop)
        if len(content) > stop - start:
            raise UserError(
                f"{file}: the server sends the whole file instead of a part. Fetch the file and name its path"
            )
        if len(content) != stop - start:
            if file.fresh().size != file.size:
                raise BadData(f"{file}: has changed since it was listed. Restore the file that the run started with.")
            raise OSError(f"{file}: {len(content)} bytes came instead of {stop - start}")
        return content

    def file(self, path: str, info: dict) -> "StoredFile":
        """Return the file that the store lists at `path`. Raises UserError if the server does not tell the size."""
        if info.get("size") is None:
            raise UserError(f"{self}: the server does not tell the file's size. Fetch the file and name its path")
        keys = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime", "created")
        version = next((str(info[key]) for key in keys if info.get(key)), "")
        return StoredFile(self.fs.unstrip_protocol(path), int(info["size"]), version, path, self)


def _status(error: Exception) -> int | None:
    """Return the HTTP status behind an error of fsspec, if any: aiohttp, botocore and httpx each keep it elsewhere."""
    for part in chain(error):
        response = getattr(part, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if (status := getattr(part, "status", None) or getattr(response, "status_code", None)) is not None:
            return status
    return None


@dataclass(frozen=True)
class StoredFile:
    """File in a store, with the methods of a path that the readers call. size: bytes; version: changes with content."""

    address: str
    size: int
    version: str
    path: str = field(compare=False)
    store: Store = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Return the last part of the address."""
        return self.path.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return shown(self.address)

    def as_posix(self) -> str:
        return self.address

    resolve = as_posix

    def is_file(self) -> bool:
        return True

    def stat(self) -> SimpleNamespace:
        """Return the size in bytes as `st_size`, and a number that changes with the version as `st_mtime_ns`."""
        digest = hashlib.sha256(self.version.encode()).digest()
        return SimpleNamespace(st_size=self.size, st_mtime_ns=int.from_bytes(digest[:8]) >> 1)

    @cached_property
    def head(self) -> bytes:
        """Return the first 8 bytes."""
        return patiently(lambda: self.store.read(self, 0, min(8, self.size)), self.store) if self.size else b""

    def end(self, count: int) -> bytes:
        """Return the last `count` bytes, of a shorter file all, without a block of it."""
        start = max(0, self.size - count)
        return patiently(lambda: self.store.read(self, start, self.size), self.store) if self.size else b""

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BufferedReader:
        """Return a reader of the file's bytes."""
        return opened(self.store, self)

    @cached_property
    def as_zip(self) -> zipfile.ZipFile:
        """Return the file as a zip archive, opened once: its members then share the blocks that are read."""
        return zipfile.ZipFile(self.open())

    def fresh(self) -> "StoredFile":
        """Return the file as the store has it now."""
        self.store.fs.invalidate_cache()
        return self.store.file(self.path, self.store.ask(lambda fs: fs.info(self.path)))


def listed(address: str, key: str) -> tuple[str, list[tuple[StoredFile, str]]]:
    """Return what an address names, "file", "folder" or "pattern", and its files with their names below the folder.

    The order is that of the same files on disk. Hidden files are left out. Raises UserError, naming `key`, for what the
    store does not have or does not give.
    """
    store = Store(address, key)
    store.fs.invalidate_cache()  # a process may run several stages
    if store.scheme in WEB:
        if store.path.partition("?")[0].endswith("/"):
            raise UserError(
                f"{store}: a server of the web lists no folder. Name the files, as in {key}=[{shown(address)}a.txt]"
            )
        return _alone(store, store.ask(lambda fs: fs.info(store.path)))
    if glob.has_magic(store.path) and not store.ask(lambda fs: fs.exists(store.path)):
        found = store.ask(lambda fs: fs.glob(store.path, detail=True))
        folder = store.path[: re.search(r"[*?\[]", store.path).start()].rpartition("/")[0]
        return "pattern", _below(store, sorted(found.items()), folder)
    info = store.ask(lambda fs: fs.info(store.path))
    if info["type"] != "directory":
        return _alone(store, info)
    found = store.ask(lambda fs: fs.find(store.path, detail=True))
    in_order = sorted(found.items(), key=lambda item: item[0].split("/"))
    return "folder", _below(store, in_order, store.path.rstrip("/"))


def _alone(store: Store, info: dict) -> tuple[str, list[tuple[StoredFile, str]]]:
    """Return the listing of a single file."""
    file = store.file(store.path, info)
    return "file", [(file, file.name)]


def _below(store: Store, found: list[tuple[str, dict]], folder: str) -> list[tuple[StoredFile, str]]:
    """Return the files of a listing that are not hidden, with their names below `folder`."""
    named = [(path, info, path.removeprefix(folder).lstrip("/")) for path, info in found if info["type"] == "file"]
    return [
        (store.file(path, info), name)
        for path, info, name in named
        if not any(part.startswith(".") for part in name.split("/"))
    ]


def find(address: str, key: str) -> StoredFile | None:
    """Return the file at an address as it is now, None where there is none."""
    store = Store(address, key)
    store.fs.invalidate_cache()
    info = store.ask(lambda fs: fs.info(store.path) if fs.exists(store.path) else None)
    return None if info is None or info["type"] != "file" else store.file(store.path, info)


def upload(local: Path, address: str, key: str) -> None:
    """Store a file of this machine at an address, whole or not at all. Raises UserError if the store refuses it."""
    store = Store(address, key)
    store.ask(lambda fs: fs.makedirs(fs._parent(store.path), exist_ok=True))
    store.ask(lambda fs: fs.put_file(str(local), store.path))
