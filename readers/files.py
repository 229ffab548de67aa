"""Shared by all readers: opening files that may be damaged or hostile, the budget for their claims, downloads.

A reader takes the folder of the data sets and a split, 'train' or 'test'. It returns images uint8 [N, H, W, C] and
labels int32 [N]. It raises a DataError for a file that is missing or damaged.
"""

import contextlib
import hashlib
import http.client
import os
import queue
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

import errors


class DataError(errors.UserError):
    """A data set that is missing, damaged or of no use."""


class OfficialFile(NamedTuple):
    """A file at its official address, with its published SHA-256 and size in bytes."""

    url: str
    sha256: str
    num_bytes: int


# Opening.


def opened(path: Path) -> BinaryIO:
    """Opens a file to read its bytes. Raises DataError, also for a folder, device or pipe, which could hang."""
    try:
        return errors.opened(path)
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror or error}') from error
    except ValueError as error:  # NUL in the path
        raise DataError(f'{path} is no path: {error}') from error


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, with or without a byte-order mark. Raises DataError."""
    with opened(path) as file:
        require_within_budget(path, os.fstat(file.fileno()).st_size)
        try:
            return file.read().decode('utf-8-sig')
        except UnicodeDecodeError as error:
            raise DataError(f'{path} is damaged: {error}') from error


@contextlib.contextmanager
def one_error(path: Path, official: OfficialFile | None = None) -> Iterator[None]:
    """Turns whatever a parser raises on a damaged file into a DataError that names the file."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:  # a parser of damaged bytes can raise anything
        raise DataError(damaged(path, errors.first_line(error), official)) from error


def is_litter(name: str) -> bool:
    """Returns whether a file is one that macOS leaves beside others."""
    return name == '.DS_Store' or name.startswith('._')


# The budget.


def budget(num_bytes: int) -> int:
    """Returns how many bytes of memory or disk a file of `num_bytes` may stand for: at least its own size."""
    return max(min(max(1 << 26, 64 * num_bytes), 1 << 32), num_bytes)


def require_within_budget(path: Path, claimed: int, num_bytes: int | None = None) -> None:
    """Raises a DataError if a file claims to stand for more bytes than its budget. To be called before they are taken.

    Args:
        path: The file, for the message.
        claimed: What the file claims, in bytes.
        num_bytes: The size of the file, if it is not that of `path`.
    """
    held = budget(os.stat(path).st_size if num_bytes is None else num_bytes)
    if claimed > held:
        raise DataError(f'{path} is damaged: it promises {claimed} bytes, more than the {held} that it may stand for')


_CHUNK = 1 << 18


class Limited:
    """A stream that can be read up to a limit. Raises DataError beyond, before it takes memory."""

    def __init__(self, file: BinaryIO, limit: int, where: object) -> None:
        self._file, self.left, self._limit, self._where = file, limit, limit, where

    def _require(self, num_bytes):
        if num_bytes > self.left:
            raise DataError(f'{self._where} is damaged (it goes on beyond {self._limit} bytes)')

    def read(self, num_bytes: int) -> bytes:
        """Returns the next bytes, fewer at the end."""
        self._require(num_bytes)
        payload = self._file.read(num_bytes)
        self.left -= len(payload)
        return payload

    def read_exactly(self, num_bytes: int) -> bytes:
        """Returns the next bytes. Raises EOFError if there are fewer."""
        payload = self.read(num_bytes)
        if len(payload) < num_bytes:
            raise EOFError('it ends too early')
        return payload

    def skip(self, num_bytes: int) -> None:
        """Reads on without keeping the bytes. Raises EOFError if there are fewer."""
        self._require(num_bytes)
        for start in range(0, num_bytes, _CHUNK):
            self.read_exactly(min(_CHUNK, num_bytes - start))

    def skip_rest(self) -> None:
        """Reads to the end, where a compressed stream has its checksum."""
        while payload := self._file.read(_CHUNK):
            self._require(len(payload))
            self.left -= len(payload)


@contextlib.contextmanager
def opened_zip(path: Path, official: OfficialFile | None = None) -> Iterator[zipfile.ZipFile]:
    """Opens a zip file whose members are within the budget together. Raises DataError, also for what its users raise.

    An OSError of its users, such as a full disk, is passed on.
    """
    with opened(path) as file:
        try:
            members = zipfile.ZipFile(file)
            require_within_budget(path, sum(max(0, member.file_size) for member in members.infolist()))
            for member in members.infolist():
                if member.header_offset < 0:
                    raise ValueError('a member starts before the file')
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # bzip2 raises an OSError
                    raise ValueError(f'{member.filename} is compressed by method {member.compress_type}')
            yield members
        except (errors.UserError, OSError):
            raise
        except Exception as error:  # a damaged zip can raise anything
            raise DataError(damaged(path, errors.first_line(error), official)) from error


# Messages.


def damaged(path: Path, reason: object, official: OfficialFile | None = None) -> str:
    """Returns the line on a damaged file, with its checksum beside the published one, where that is known."""
    message = f'{path} is damaged ({reason})'
    if official is None or Path(path).name != official.url.rsplit('/', 1)[1]:
        return message
    with opened(path) as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return f'{message}: its SHA-256 is {sha256}, the published one {official.sha256}; delete it to download it again'


def checked_labels(labels: np.ndarray, num_classes: int, where: object) -> np.ndarray:
    """Returns labels as int32 [N]. Raises DataError if there are none, or if some are not in [0, num_classes)."""
    if not len(labels):
        raise DataError(f'{where} holds no images')
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f'{where} has labels from {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}')
    return labels.astype(np.int32)


# Downloads.


def download(official: OfficialFile, path: Path) -> None:
    """Fetches a file to `path` with a progress bar. It appears there whole and checked, or not at all.

    Raises a DataError that says which file to put where, for instance if there is no answer within 10 seconds.
    """
    new_folders = []
    try:
        new_folders = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with errors.replacing(path) as unfinished:
            sha256 = _fetch(official, unfinished)
            if sha256 != official.sha256:
                raise DataError(f'what {official.url} sent has the SHA-256 {sha256}, not {official.sha256}: not kept')
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        raise DataError(
            f'{path} is missing and could not be fetched ({reason}): download {official.url} and put it there'
        ) from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # it is missing, or a file is in it
                folder.rmdir()


def _fetch(official, path):
    from tqdm import tqdm

    sha256 = hashlib.sha256()
    with (
        _open_url(official.url) as response,
        open(path, 'wb') as file,
        tqdm(None, path.name, official.num_bytes, unit='B', unit_scale=True, disable=None) as progress,
    ):
        left = official.num_bytes + 1  # a longer answer is another file, and need not end
        while left and (chunk := response.read(min(1 << 20, left))):
            file.write(chunk)
            sha256.update(chunk)
            progress.update(len(chunk))
            left -= len(chunk)
    return sha256.hexdigest()


def _open_url(url, seconds=10):
    """urlopen within `seconds`: its own timeout holds for every address of a host and not for looking them up."""
    answers = queue.SimpleQueue()

    def connect():
        try:
            answers.put(urllib.request.urlopen(url, timeout=seconds))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f'no answer in {seconds} seconds') from None
    if isinstance(answer, Exception):
        raise answer
    return answer
