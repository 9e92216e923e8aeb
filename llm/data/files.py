"""Data files: how they are found, what they are by name and content, and how they are opened.

`list_files` is the only place that lists files, `open_bytes` the only one that opens them. A file is a Path or an
object with the same `name`, `open("rb")` and `stat()`: a member of a zip archive, or a file in a store.
"""

import bz2
import glob
import gzip
import io
import lzma
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llm.data.stores import StoredFile, is_address, listed
from llm.errors import UserError, reason_of
from llm.utils.addresses import without_secrets as shown

CODE = (
    "py c h cc cpp hpp cu java js jsx ts tsx go rs rb php cs swift kt scala r jl lua pl sh sql hs ml ex clj f90 m tex "
    "html css"
)
SUFFIXES = {
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    **dict.fromkeys((".md", ".markdown"), "md"),
    **{f".{suffix}": "code" for suffix in CODE.split()},
}
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
KNOWN = "parquet, arrow, jsonl, json, csv, tsv, txt, md or source code (plain, .gz, .zst, .bz2, .xz or in a .zip)"
PLAIN_TEXT = ("txt", "md", "code")
# A folder is read as its first class here that it holds. Several kinds of the first class are an error; files of a
# later class are left out and said.
CLASSES = (("parquet", "jsonl", "txt"), ("arrow", "json", "csv", "tsv"), ("md",), ("code",))
MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
MAGIC_KINDS = {b"PAR1": "parquet", b"ARROW1": "arrow", b"PK\x03\x04": "zip"}


class Format(NamedTuple):
    """Format of a file: its kind, its compression ("" for none), and one line where its name says something else."""

    kind: str
    compression: str
    note: str = ""


class Listed(NamedTuple):
    """Files behind one entry of the configuration, each with its name below the folder.

    kind: "file", "folder" or "pattern".
    """

    kind: str
    files: list[tuple[Any, str]]


class Found(NamedTuple):
    """Data files in name order, one line on what is left out ("" for nothing), and each name below the folder.

    alone: whether there is one file only, and the configuration names it.
    """

    files: list
    left_out: str
    names: list[str]
    alone: bool


@dataclass(frozen=True)
class ZipMember:
    """File inside a zip archive, with the methods of a path that the readers call. size: bytes, decompressed."""

    archive: Path | StoredFile
    member: str
    size: int = field(compare=False)

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"

    as_posix = __str__

    def resolve(self) -> str:
        """Return the one name of the member: below the archive's resolved path."""
        return f"{self.archive.resolve()}/{self.member}"

    def stat(self) -> os.stat_result:
        """Return the size and times of the archive."""
        return self.archive.stat()

    def open(self, mode: str = "rb") -> BinaryIO:
        """Return a reader of the member's bytes."""
        return open_zip(self.archive).open(self.member)


def open_zip(path: Path | StoredFile) -> zipfile.ZipFile:
    """Open a zip archive for reading."""
    return zipfile.ZipFile(path) if isinstance(path, Path) else path.as_zip


def zip_members(path: Path | StoredFile) -> list[ZipMember]:
    """Return the files in a zip archive, data or not, hidden ones not.

    Raises UserError if the archive cannot be read or is encrypted.
    """
    try:
        infos = [info for info in open_zip(path).infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as zip ({error}). Fetch the file again.") from error
    infos = [info for info in infos if not any(p.startswith((".", "__MACOSX")) for p in info.filename.split("/"))]
    if locked := next((info.filename for info in infos if info.flag_bits & 1), None):
        raise UserError(f"{path}: {locked} is encrypted. Unpack the archive.")
    return [ZipMember(path, info.filename, info.file_size) for info in infos]


def split_suffix(name: str) -> tuple[str, str]:
    """Return the suffix of a name in small letters and its compression: ("jsonl", "gz"), ("jsonl", ""), ("", "")."""
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    compression = parts.pop() if len(parts) > 2 and parts[-1] in COMPRESSIONS else ""
    return (parts[-1] if len(parts) > 1 else ""), compression


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name, one of the values of `SUFFIXES`; None for any other file."""
    return SUFFIXES.get(f".{split_suffix(name)[0]}")


def format_of(path) -> Format:
    """Return the format of a file by its name and its first bytes. The first bytes win where they are certain.

    Raises UserError for a file that cannot be read or whose content no reader knows.
    """
    kind, named = kind_of(path.name), split_suffix(path.name)[1]
    if not isinstance(path, Path | ZipMember | StoredFile):  # far away: a look inside costs a request
        return Format(kind, named)
    head = path.head if isinstance(path, StoredFile) else _head(path)
    compression = next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")
    if named and not compression:  # the decompressor names the damage
        return Format(kind, named)
    note = f"{path} is compressed by {compression}, whatever its name says" if compression != named else ""
    if not compression:
        found = next((name for magic, name in MAGIC_KINDS.items() if head.startswith(magic)), None)
        if found == "zip":
            raise UserError(f"{path}: is a zip archive by its content. Name it .zip.")
        if found and found != kind:
            return Format(found, "", f"{path} is {found} by its content and read so")
    return Format(kind, compression, note)


def _head(path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(8)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error, path)}).") from error


def open_bytes(path) -> BinaryIO:
    """Open a data file for reading bytes, decompressed on the fly."""
    compression = format_of(path).compression
    if compression == "zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(path.open("rb"), compression="zstd"))
    if not compression:
        return path.open("rb")
    opener = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[compression]
    return opener(path if isinstance(path, Path) else path.open("rb"), "rb")


def find_data_files(paths: str | Path | Sequence, key: str) -> Found:
    """Return the data files of a file name, folder, glob or list of them, in name order.

    Folders are read with their subfolders and linked folders; hidden files are not. Raises UserError if there is no
    file, or if several kinds of data stand side by side: a README must not be trained on.
    """
    if not paths or not str(paths):
        raise UserError(f"{key}={paths} is not set: name a file, a folder or a pattern of {KNOWN} files")
    entries = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict = {}
    named: set = set()  # files that are named by themselves: always read
    left: Counter = Counter()
    folders = False
    for entry in entries:
        here = list_files(entry, key)
        if not here.files and here.kind == "pattern":
            raise UserError(
                f"{key}={shown(entry)}: no such file or folder, and no file matches it as a glob. Correct {key}."
            )
        folders = folders or here.kind == "folder"
        named.update(path for path, _ in here.files if here.kind == "file")
        for path, name in _expanded(here.files, left, here.kind == "file"):
            found.setdefault(path, name)
    files = sorted(found, key=lambda path: path.as_posix())
    if not files:
        said = f" ({_left_out(left)})" if left else ""
        raise UserError(f"{key}={shown(paths)}: holds no {KNOWN} file{said}. Convert the text to one of these.")
    kept = [path for path in files if path in named or kind_of(path.name) in _first_class(files)]
    rest = [path for path in files if path not in set(kept)]
    if folders:
        larger = [path for path in rest if kind_of(path.name) in CLASSES[1]]
        what = kept if _size(larger) <= _size(kept) else files
        check_one_kind(
            what,
            f"{key}={shown(paths)}: the folder",
            f"{key}='{shown(entries[0]).rstrip('/')}/**/*%s'",
        )
    left.update(_suffix(path.name) for path in rest)
    return Found(kept, _left_out(left), [found[path] for path in kept], len(kept) == 1 and kept[0] in named)


def check_one_kind(files: Sequence, what: str, fix: str) -> None:
    """Raise UserError for files of several kinds; `fix` has a %s for the suffix of the larger kind."""
    kinds: dict[str, list] = {}
    for file in files:
        kinds.setdefault(kind_of(file.name), []).append(file)
    if len(kinds) < 2:
        return
    counts = " and ".join(f"{len(of)} {kind}" for kind, of in sorted(kinds.items()))
    if any(isinstance(file, ZipMember) for file in files):
        raise UserError(f"{what} mixes {counts} files, some of them in a .zip. Unpack it, and name those to read.")
    suffixes = {_suffix(file.name) for file in max(kinds.values(), key=_size)}
    suffix = suffixes.pop() if len(suffixes) == 1 else f".{split_suffix(max(kinds.values(), key=_size)[0].name)[0]}*"
    raise UserError(f"{what} mixes {counts} files. Name those to read, such as {fix % suffix}.")


def size_of(file: Any) -> int:
    """Return the bytes of a file, of a member of an archive those of its content."""
    return file.size if hasattr(file, "size") else file.stat().st_size


def _size(files: Sequence) -> int:
    return sum(map(size_of, files))


def _first_class(files: Sequence) -> tuple[str, ...]:
    """Return the first of `CLASSES` that one of the files belongs to."""
    kinds = {kind_of(path.name) for path in files}
    return next(of for of in CLASSES if kinds & set(of))


def list_files(entry: object, key: str) -> Listed:
    """Return the files that a path, folder, glob or address names, data or not; broken links too, hidden files not.

    A folder is listed with its subfolders and linked folders. Nothing there is a pattern without files; at an address
    it is a UserError that names `key`, the place in the configuration.
    """
    if is_address(entry):
        return Listed(*listed(str(entry), key))
    try:
        root = Path(str(entry)).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise UserError(f"{key}={entry}: {error}") from None
    if root.is_dir():
        return Listed("folder", sorted(_below(root)))
    if root.exists():
        return Listed("file", [(root, root.name)])
    fixed = Path(*_until_pattern(root.parts))
    matches = [path for path in map(Path, sorted(glob.glob(str(root), recursive=True))) if not path.is_dir()]
    return Listed("pattern", [(path, path.relative_to(fixed).as_posix()) for path in matches])


def _until_pattern(parts: Sequence[str]) -> list[str]:
    """Return the leading parts of a path that hold no wildcard."""
    return list(parts[: next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)])


def _below(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of a folder and of linked folders; a folder that a link leads back into is read once."""
    seen = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name)
                yield path, path.relative_to(root).as_posix()


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); allow it, or name the files that can be")


def _expanded(files: Sequence[tuple[Path, str]], left: Counter, alone: bool) -> Iterator[tuple]:
    """Yield the data files among those listed, the members of zip archives among them; count the others in `left`.

    alone: the user names this one file, so the name of an archive says nothing of its members.
    """
    for path, name in files:
        if isinstance(path, Path) and path.is_symlink() and not path.exists():
            left["broken link"] += 1
        elif path.name.lower().endswith(".zip"):
            for member in zip_members(path):
                if kind := kind_of(member.name):  # of code the first folder counts, of others the archive's name too
                    is_tree = "/" in member.member and (alone or kind == "code")
                    yield member, member.member if is_tree else f"{name}/{member.member}"
                else:
                    left[_suffix(member.name)] += 1
        elif kind_of(path.name) and path.is_file():
            yield path, name
        else:
            left[_suffix(path.name)] += 1


def _suffix(name: str) -> str:
    """Return the suffix of a name with its compression, such as ".jsonl.gz"; "" where there is none."""
    suffix, compression = split_suffix(name)
    return f".{suffix}.{compression}" if suffix and compression else f".{suffix}" if suffix else ""


def _left_out(left: Counter) -> str:
    """Return "left out: 30 .md files, 1 broken link"; "" for nothing."""

    def said(what: str, count: int) -> str:
        if what == "broken link":
            return f"{count} broken link{'s' * (count > 1)}"
        return f"{count} {what or 'nameless'} file{'s' * (count > 1)}"

    return f"left out: {', '.join(said(*item) for item in sorted(left.items()))}" if left else ""
