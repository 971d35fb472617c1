"""HTTP downloads that can be resumed, with SHA-256 checks and progress bars."""

import contextlib
import hashlib
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import requests
import urllib3
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from tensorflow_datasets.core.download.checksums import UrlInfo

from imp_jax.errors import UserError, one_line
from imp_jax.runtime.signals import run_on_exit

_FIRST_ANSWER_TIMEOUT_S = 6  # for name resolution, connecting and the headers of the response
_STALL_TIMEOUT_S = 20
_RETRY_WAITS_S = (1, 3, 10)  # waits between successive attempts that receive no new bytes
_LINE_EVERY_S = 30  # interval of the lines that replace the progress bar if stderr is not a terminal
_BLOCK_BYTES = 2**16
_MIB = 2**20


class _FailedError(Exception):
    """A failure after which another attempt may succeed."""


class _RefusedError(Exception):
    """A response that is not the file; another attempt would not help."""


def fetch(url_infos: Mapping[str, UrlInfo], folder: Path, manual: Path) -> dict[str, Path]:
    """Find the files of a data set on this machine, or download them.

    Args:
      url_infos: size, sha256 and name of the file at each URL, as registered in TFDS.
      folder: the folder for downloads, which has the name of the data set. It also keeps partial downloads, as
        `NAME.part`; the next call resumes them.
      manual: the folder for files that users have downloaded by hand. Its subfolder with the name of the data
        set is searched first.

    Returns:
      For each URL, the path of a file with the registered sha256.

    Raises:
      UserError: a file cannot be downloaded, or a file in the subfolder of `manual` has another content.
      OSError: `folder` cannot be written.
    """
    paths = {url: _find(url, info, folder, manual) for url, info in url_infos.items()}
    missing = [url for url, path in paths.items() if path is None]
    with progress_bar(DownloadColumn(binary_units=True), _SpeedColumn()) as progress:
        for number, url in enumerate(missing):
            paths[url] = path = folder / url_infos[url].filename
            try:
                _download(url, url_infos[url], path, progress)
            except (_FailedError, _RefusedError) as error:
                received = _size(_part(path)) / _MIB
                resume = f"run the same command again to resume at {received:.1f} MiB, or " if received else ""
                others = ", ".join(missing[number + 1 :])
                by_hand = f"it and {others} by hand and put them" if others else "it by hand and put it"
                name_is_taken = any((manual / url_infos[url].filename).exists() for url in missing)
                target = manual / folder.name if name_is_taken else manual
                raise UserError(
                    f"cannot download {url}: {error}; {resume}download {by_hand} into {target}"
                ) from error
    return paths


@contextlib.contextmanager
def progress_bar(*columns: ProgressColumn) -> Iterator[Progress]:
    """Show a progress bar for each task, with `columns` and the remaining time, if stderr is a terminal."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # `data.prepare` discards TFDS's messages on stdout
        disable=not sys.stderr.isatty(),
    )
    with run_on_exit(progress.stop):  # shows the cursor again
        progress.start()
        yield progress


class _SpeedColumn(ProgressColumn):
    """Column with the speed in MiB/s; the column of rich shows MB/s."""

    def render(self, task: Task) -> Text:
        return Text(_speed(task))


class _Meter:
    """Progress of a download: a bar on a terminal, otherwise a line every 30 s. Sizes are in bytes."""

    def __init__(self, progress: Progress, name: str, total: int):
        self._progress = progress
        progress.add_task(name, total=total)
        self._task = progress.tasks[-1]
        self._last_line_s = time.monotonic()

    def start_from(self, size: int) -> None:
        self._progress.update(self._task.id, completed=size)

    def advance(self, size: int) -> None:
        self._progress.advance(self._task.id, size)
        if self._progress.disable and time.monotonic() > self._last_line_s + _LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            task = self._task
            time_left = f", {task.time_remaining / 60:.0f} min left" if task.time_remaining else ""
            sizes = f"{task.completed / _MIB:.1f} of {task.total / _MIB:.1f} MiB"
            self.print(f"{task.description}: {sizes}, {_speed(task)}{time_left}")

    def print(self, line: str) -> None:
        """Print a line, above any progress bars."""
        if self._progress.disable:
            print(line, flush=True)
        else:
            self._progress.print(line, markup=False, highlight=False, soft_wrap=True)


def _speed(task):
    return f"{(task.speed or 0) / _MIB:.2f} MiB/s"


def _find(url, info, folder, manual):
    """Return the path of the file of `url` on this machine, or None."""
    downloaded = folder / info.filename
    if downloaded.is_file():
        if not _difference(downloaded, info):
            return downloaded
        downloaded.unlink()
    if (path := manual / folder.name / info.filename).is_file():
        if difference := _difference(path, info):
            raise UserError(f"{path} is not the file of {url}: {difference}; replace or remove it")
        return path
    if (path := manual / info.filename).is_file():
        if not (difference := _difference(path, info)):
            return path
        # it may be of another set: the files of MNIST and Fashion-MNIST have the same names
        print(f"{path} is not used, because it is not the file of {url}: {difference}", file=sys.stderr)
    return None


def _difference(path, info):
    """Describe how a file differs from the registered one; return "" if it does not."""
    if (size := path.stat().st_size) != info.size:
        return f"it has {size:,} bytes and should have {int(info.size):,}"
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if checksum == info.checksum else f"its sha256 is {checksum} and should be {info.checksum}"


def _download(url, info, path, progress):
    """Download the file of `url` to `path`, in several attempts if necessary."""
    part, total = _part(path), int(info.size)
    start = farthest = resumed_at = _size(part)
    meter = _Meter(progress, path.name, total)
    resumed = f", resumed at {start / _MIB:.1f} MiB" if resumed_at else ""
    meter.print(f"downloading {url} ({total / _MIB:.1f} MiB{resumed})")
    waits_s = None  # no retries until the server has responded once
    while start < total:
        try:
            timeout_s = _FIRST_ANSWER_TIMEOUT_S if waits_s is None else _STALL_TIMEOUT_S
            with _request(url, start, total, timeout_s) as response:
                if waits_s is None:
                    waits_s = [*_RETRY_WAITS_S]
                _write(response, part, total, meter)
            reason = "the connection was lost"
        except _FailedError as error:
            reason = str(error)
        start = _size(part)
        if start > farthest:
            farthest, waits_s = start, [*_RETRY_WAITS_S]
        elif waits_s:
            time.sleep(waits_s.pop(0))
        else:
            raise _FailedError(reason)
    if difference := _difference(part, info):
        part.unlink()
        if resumed_at:  # the part of an earlier call may belong to another version of the file
            return _download(url, info, path, progress)
        raise _RefusedError(f"the received file is not the right one, and was removed: {difference}")
    return part.replace(path)


def _part(path):
    return path.with_name(f"{path.name}.part")


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _write(response, part, total, meter):
    """Append the body of a response to `part`, or replace `part` if the server sends the whole file."""
    start = _size(part) if response.status_code == requests.codes.partial_content else 0
    meter.start_from(start)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab" if start else "wb") as file:
        for block in _blocks(response, total - start):
            file.write(block)
            meter.advance(len(block))


def _blocks(response, size):
    """Yield at most `size` bytes of the body of a response, as they arrive."""
    try:
        while size and (block := response.raw.read1(min(size, _BLOCK_BYTES), decode_content=False)):
            yield block
            size -= len(block)
    except urllib3.exceptions.ReadTimeoutError as error:
        raise _FailedError(f"nothing was received for {_STALL_TIMEOUT_S} s") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _FailedError("the connection was lost") from error


def _request(url, start, total, timeout_s):
    """Request a file of `total` bytes, starting at byte `start`. The server may send the whole file instead."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    results = queue.SimpleQueue()

    def get():
        try:
            results.put(requests.get(url, headers=headers, stream=True, timeout=(timeout_s, _STALL_TIMEOUT_S)))
        except Exception as error:  # raised below, in the calling thread
            results.put(error)

    # in a thread, because name resolution has no timeout and cannot be interrupted
    threading.Thread(target=get, daemon=True).start()
    try:
        result = results.get(timeout=timeout_s)
    except queue.Empty:
        result = requests.Timeout()
    if isinstance(result, requests.Timeout):
        raise _FailedError(f"no answer within {timeout_s} s") from result
    if isinstance(result, requests.RequestException):
        raise _FailedError(_root_cause(result)) from result
    if isinstance(result, Exception):
        raise result
    try:
        _require_file(result, start, total)
    except Exception:
        result.close()
        raise
    return result


def _require_file(response, start, total):
    """Refuse a response that is not a file of `total` bytes, starting at byte `start` or 0."""
    status, headers = response.status_code, response.headers
    if status not in (requests.codes.ok, requests.codes.partial_content):
        temporary = status >= 500 or status in (
            requests.codes.request_timeout,
            requests.codes.too_many_requests,
        )
        raise (_FailedError if temporary else _RefusedError)(f"the server answers {status} {response.reason}")
    if headers.get("Content-Type", "").startswith("text/html"):
        raise _RefusedError("the server sends a web page instead of the file")
    if status == requests.codes.ok:
        size = headers.get("Content-Length", str(total))
        if size != str(total):
            raise _RefusedError(f"the server offers a file of {int(size):,} bytes instead of {total:,}")
    elif not (content_range := headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
        raise _RefusedError(
            f"the server sends {content_range or 'an unknown part'} instead of the bytes from {start} on"
        )


def _root_cause(error):
    """Describe the first error of a chain; the errors that requests adds only repeat it and the URL."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return one_line(error)
