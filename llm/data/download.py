"""Files of a data set on the Hugging Face hub in a folder of this machine, fetched when needed or ahead of that.

    <paths.data>/<owner>--<name>/<revision>/   files.json   <the files, by their names>   .parts/ what is under way
    <paths.data>/files/<name>-<hash of its address>/   a single file of the web   source.json: address, size, checksum

A file has its name only once it is complete and its checksum is right. A part left by a broken connection or a killed
process is continued (a single file of the web begins again after a kill). A lock per file lets all processes of a
machine share the folder.
"""

import errno
import fnmatch
import hashlib
import logging
import queue
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError, reason_of
from llm.utils.addresses import without_secrets as shown
from llm.utils.files import read_json, sync, sync_folder, write_json
from llm.utils.format import in_bytes
from llm.utils.shapes import listing, mapping, maybe, text, whole
from llm.utils.source import command

log = logging.getLogger(__name__)
TRIES = 6
FIRST_WAIT = 1.0  # seconds before the second try; each further wait is twice as long, give or take a half
LAST_WAIT = 60.0
READ_SECONDS = 30.0  # a network read without an answer for this long is tried again
NEWS_SECONDS = 10.0  # between lines of progress without a terminal


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; `sha256` only if the hub stores it as a large file, `blob` is git's own checksum."""

    name: str
    size: int
    sha256: str | None
    blob: str


_file = mapping(
    {"name": text, "size": whole(), "sha256": maybe(text), "blob": text}, needs=("name", "size", "sha256", "blob")
)
LISTING = mapping({"commit": text, "files": listing(_file)}, needs=("commit", "files"))  # files.json


class Remote:
    """Base of everything that is fetched: the configuration key that names it, and the folder `root` it goes to."""

    server, advice = "the hub", "Check the network or HF_ENDPOINT"

    def __init__(self, key: str, root: Path) -> None:
        self.key, self.root = key, root

    def lasting_problem(self, error: Exception) -> str | None:
        """Return what the user has to do about an error that waiting does not cure; None for all others."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        if any(isinstance(part, OfflineModeIsEnabled) for part in chain(error)):
            return (
                f"{self}: HF_HUB_OFFLINE is set and not all of it is in {self.root}. Fetch it where there is a "
                f"network: {command('train')} stage=download with the same data settings"
            )
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            return self.unwritable(error)
        status = status_of(error)
        if status is not None and 400 <= status < 500 and status not in (408, 416, 429):
            return f"{self}: {self.server} answers {status} ({first_line(error)})"
        return None

    def unwritable(self, error: OSError) -> str:
        """Return the error line for a folder of fetched data that the system does not let this process write."""
        return f"{self.root}: cannot be written ({reason_of(error, self.root)}); paths.data names another place"

    @contextmanager
    def lock(self, name: str) -> Iterator[Path]:
        """Keep other processes and threads from fetching `name`; yield the path for its parts.

        Raises UserError if the folder cannot be written.
        """
        from filelock import FileLock

        part = self.root / ".parts" / name.replace("/", "--")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(part.with_name(part.name + ".lock"))
            lock.acquire()
        except OSError as error:
            raise UserError(self.unwritable(error)) from error
        try:
            yield part.with_name(part.name + ".part")
        finally:
            lock.release()


class HubRepo(Remote):
    """Revision of a data set on the hub, named by `key`.repo and `key`.revision."""

    def __init__(self, repo: str, revision: str, key: str, root: Path) -> None:
        super().__init__(key, root)
        self.repo, self.revision = repo, revision

    def __str__(self) -> str:
        return f"{self.key}.repo={self.repo}" + (f" at {self.revision}" if self.revision != "main" else "")

    def lasting_problem(self, error: Exception) -> str | None:
        from huggingface_hub import errors

        def is_a(kind: type[Exception]) -> bool:
            return any(isinstance(part, kind) for part in chain(error))

        status = status_of(error)
        if is_a(errors.HFValidationError):
            return f"{self}: write {self.key}.repo=<owner>/<name> as in the data set's address on the hub"
        if is_a(errors.RevisionNotFoundError):
            return f"{self.key}.revision={self.revision}: {self.repo} has no such branch, tag or commit"
        if is_a(errors.GatedRepoError) or status in (401, 403):
            return (
                f"{self}: the hub refuses it ({status}): there is no such data set, or it is private or gated. Correct "
                f"{self.key}.repo, or accept its terms on its page and set HF_TOKEN"
            )
        if status == 404:
            return f"{self}: the hub has no such data set or file (404). Correct {self.key}.repo"
        return super().lasting_problem(error)


class WebFile(Remote):
    """Single file at an address of the web that `key` names; it keeps its name in a folder of its own."""

    advice = "Check the network, or get the file in another way and give its path"

    def __init__(self, url: str, key: str, cache: str | Path) -> None:
        from urllib.parse import unquote, urlsplit

        self.url, parts = url, urlsplit(url)
        name = Path(unquote(parts.path)).name
        if not parts.hostname or not name:
            raise UserError(f"{key}={shown(url)}: write the whole address of a file, https://<server>/<path>")
        digest = hashlib.sha256(url.encode()).hexdigest()[:12]  # files of other addresses may have the same name
        super().__init__(key, Path(cache).expanduser() / "files" / f"{name}-{digest}")
        self.server, self.path = parts.hostname, self.root / name

    def __str__(self) -> str:
        return f"{self.key}={shown(self.url)}"

    def is_here(self) -> bool:
        """Return True if the whole file has been fetched."""
        source = read_json(self.root / "source.json")
        return source is not None and self.path.is_file() and self.path.stat().st_size == source.get("size")

    def fetch(self) -> Path:
        """Return the file's path; fetch the file first if it is missing or incomplete."""
        with self.lock(self.path.name) as part:
            if not self.is_here():
                print(f"{self}: fetching it into {self.root}", flush=True)
                patiently(lambda: self._download(part), self)
                with open(part, "rb") as content:
                    sha256 = hashlib.file_digest(content, "sha256").hexdigest()
                facts = {"url": shown(self.url), "size": part.stat().st_size, "sha256": sha256}
                part.replace(self.path)
                write_json(self.root / "source.json", facts)
        return self.path

    def _download(self, part: Path) -> None:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars("huggingface_hub.http_get")
        with open(part, "wb") as out:  # from the start: nothing tells whether the file behind an address has changed
            http_get(self.url, out, headers={"Accept-Encoding": "identity"})  # so that lengths are those of the file
        sync(part)


class HubFolder(HubRepo):
    """Files of one revision of a data set; `workers` of them are fetched at a time.

    The commit that a branch points to is looked up once and kept in files.json, so that a continued run reads what it
    began with; later starts need no network for files that are there.
    """

    def __init__(self, repo: str, revision: str, cache: str | Path, workers: int, key: str = "data") -> None:
        super().__init__(repo, revision, key, hub_folder(cache, repo, revision))
        self.workers = workers
        self._files: list[HubFile] | None = None
        self._commit = ""
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._futures: dict[str, Future] = {}
        self._threads: list[threading.Thread] = []
        self._mutex = threading.Lock()

    def files(self) -> list[HubFile]:
        """Return all files of the revision in name order, as the hub lists them or files.json remembers."""
        if self._files is None:
            path = self.root / "files.json"
            if not path.exists():
                with self.lock("files.json"):
                    if not path.exists():
                        write_json(path, patiently(self._listing, self))
            found = read_json(path)
            LISTING(found, str(path))
            self._commit, self._files = found["commit"], [HubFile(**file) for file in found["files"]]
        return self._files

    def matching(self, pattern: str) -> list[HubFile]:
        """Return the files whose names match a pattern with `*` and `?`."""
        return [file for file in self.files() if fnmatch.fnmatchcase(file.name, pattern)]

    def path(self, file: HubFile) -> Path:
        """Return the path of a file on this machine, fetched or not."""
        return self.root / file.name

    def is_here(self, file: HubFile) -> bool:
        """Return True if a file has been fetched."""
        try:
            return self.path(file).stat().st_size == file.size
        except FileNotFoundError:
            return False

    def request(self, files: Sequence[HubFile]) -> list[Future]:
        """Have daemon threads fetch `files` in this order; return a future per file, with its path or the error."""
        futures = []
        with self._mutex:
            for file in files:
                future = self._futures.get(file.name)
                if future is None:
                    future = Future()
                    if self.is_here(file):
                        future.set_result(self.path(file))
                    else:
                        self._futures[file.name] = future
                        self._queue.put((file, future))
                futures.append(future)
            while len(self._threads) < min(self.workers, len(self._futures)):
                self._threads.append(threading.Thread(target=self._work, name="fathom-fetch", daemon=True))
                self._threads[-1].start()
        return futures

    def fetch_all(self, files: Sequence[HubFile]) -> None:
        """Fetch `files` and show the progress; raise the first UserError."""
        missing = [file for file in files if not self.is_here(file)]
        if not missing:
            return
        self._check_space(missing)
        futures = self.request(missing)
        begin, total = sum(map(self._done, missing)), sum(file.size for file in missing)
        with progress(f"{self.repo}: ", total, begin) as show:
            while (count := sum(future.done() and not future.exception() for future in futures)) < len(futures):
                for future in futures:
                    if future.done():
                        future.result()  # raises its error
                show(sum(map(self._done, missing)), count, len(futures))
                time.sleep(0.1)
            show(sum(map(self._done, missing)), count, count)

    def fetch(self, file: HubFile) -> Path:
        """Return the file's path; fetch the file first if it is missing, unless another process does."""
        path = self.path(file)
        with self.lock(file.name) as part:
            if not self.is_here(file):
                patiently(lambda: self._download(file, part), self)
                path.parent.mkdir(parents=True, exist_ok=True)
                part.replace(path)
                sync_folder(path.parent)
        return path

    def read(self, file: HubFile, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop` of a file, over the network. Raises OSError if others come."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo, file.name, repo_type="dataset", revision=self._commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        options = {"headers": headers, "follow_redirects": True, "timeout": READ_SECONDS}
        with get_session().stream("GET", url, **options) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and (start, stop) != (0, file.size):
                raise OSError(f"{file.name}: the server sends the whole file instead of a part")
            content = response.read()
        if len(content) != stop - start:
            raise OSError(f"{file.name}: {len(content)} bytes came instead of {stop - start}")
        return content

    def _work(self) -> None:
        """Fetch queued files for ever, as one of the daemon threads."""
        while True:
            file, future = self._queue.get()
            try:
                result, error = self.fetch(file), None
            except Exception as problem:
                result, error = None, problem
            with self._mutex:
                del self._futures[file.name]
            future.set_exception(error) if error is not None else future.set_result(result)

    def _listing(self) -> dict[str, Any]:
        """Return {"commit", "files"} of the revision, as the hub lists them."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        commit = api.dataset_info(self.repo, revision=self.revision).sha
        tree = api.list_repo_tree(self.repo, recursive=True, revision=commit, repo_type="dataset")
        files = [
            HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
        return {"commit": commit, "files": [asdict(file) for file in sorted(files, key=lambda file: file.name)]}

    def _download(self, file: HubFile, part: Path) -> None:
        """Continue `part` until it is the whole file. Delete it and raise OSError if its checksum is wrong."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars

        disable_progress_bars("huggingface_hub.http_get")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # `patiently` tells what matters
        url = hf_hub_url(self.repo, file.name, repo_type="dataset", revision=self._commit)
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with open(part, "ab") as out:
            http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file.size)
        if checksum(part, file) != (file.sha256 or file.blob):
            part.unlink()
            raise OSError(f"{file.name} came with a wrong checksum")
        if file.name.endswith(".parquet"):
            check_footer(part, f"{self}: {file.name}")
        sync(part)

    def _done(self, file: HubFile) -> int:
        """Return the bytes of a file that are on this machine, complete or not."""
        part = self.root / ".parts" / f"{file.name.replace('/', '--')}.part"
        for path in (self.path(file), part, self.path(file)):  # it may be renamed between two looks
            try:
                return path.stat().st_size
            except FileNotFoundError:
                continue
        return 0

    def _check_space(self, missing: Sequence[HubFile]) -> None:
        """Raise UserError if the disk has no room for the missing files."""
        self.root.mkdir(parents=True, exist_ok=True)
        wanted = sum(file.size - self._done(file) for file in missing)
        free = shutil.disk_usage(self.root).free
        if wanted > free:
            raise UserError(
                f"{self}: {in_bytes(wanted)} are to be fetched, but {self.root} has {in_bytes(free)} left: "
                f"choose another paths.data or fewer {self.key}.shards"
            )


def hub_folder(cache: str | Path, repo: str, revision: str) -> Path:
    """Return the folder in which a revision of a data set is kept."""
    return Path(cache).expanduser() / repo.replace("/", "--") / revision.replace("/", "--")


def patiently(action: Callable[[], Any], remote: Remote) -> Any:
    """Return the result of `action`, tried again after broken connections and busy or failing servers.

    Raises UserError for errors that waiting does not cure, and after TRIES tries.
    """
    for tries in range(1, TRIES + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            if problem := remote.lasting_problem(error):
                raise UserError(problem) from error
            text = f"{type(error).__name__}: {first_line(error)}"
            if tries == TRIES:
                raise UserError(
                    f"{remote}: {remote.server} cannot be reached or fails, tried {TRIES} times ({text}). "
                    f"{remote.advice}; what has been fetched stays, and the same command goes on from there."
                ) from error
            wait = min(LAST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1.5)
            wait = max(wait, retry_after(error))
            log.warning("%s: %s; trying again in %.0f s", remote, text, wait)
            time.sleep(wait)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from: libraries wrap the server's answer."""
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an exception carries, if any."""
    responses = (getattr(part, "response", None) for part in chain(error))
    return next((response.status_code for response in responses if response is not None), None)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 200 characters, without secrets in addresses."""
    return shown(str(error).strip().partition("\n")[0])[:200]


def retry_after(error: Exception) -> float:
    """Return the seconds that the server asks to wait, 0 if it does not say."""
    headers = (getattr(getattr(part, "response", None), "headers", {}) for part in chain(error))
    text = next((h["Retry-After"] for h in headers if "Retry-After" in h), "")
    return min(float(text), 10 * LAST_WAIT) if text.isdigit() else 0.0


def checksum(path: Path, file: HubFile) -> str:
    """Return the SHA-256 of a file, or git's checksum for one that the hub stores in git."""
    with open(path, "rb") as content:
        if file.sha256:
            return hashlib.file_digest(content, "sha256").hexdigest()
        return hashlib.file_digest(content, lambda: hashlib.sha1(b"blob %d\0" % file.size)).hexdigest()


def check_footer(path: Path, what: str) -> None:
    """Raise UserError for a file that is no complete parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{what} is no readable parquet file on the hub itself ({error}); leave it out") from error


@contextmanager
def progress(title: str, total: int, begin: int) -> Iterator[Callable[[int, int, int], None]]:
    """Yield show(bytes done, files done, files): a bar in a terminal, else a line now and then."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = ("{task.description}", BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(title, total=total, completed=begin)
            yield lambda done, files, of: bar.update(task, completed=done, description=f"{title}{files}/{of} files")
        return
    start = last = time.monotonic()

    def line(done: int, files: int, of: int) -> None:
        nonlocal last
        if files == of or time.monotonic() - last > NEWS_SECONDS:
            last = time.monotonic()
            speed = (done - begin) / 1e6 / max(last - start, 1e-3)
            print(f"{title}{files}/{of} files, {in_bytes(done)} of {in_bytes(total)}, {speed:,.1f} MB/s", flush=True)

    yield line
