"""Opens files that may be damaged or hostile, limits what a file may claim to hold, and downloads files.

A reader takes the folder of the data sets and a split, 'train' or 'test'. It returns images uint8 [N, H, W, C] and
labels int32 [N]. It raises a DataError if a file is missing or damaged.
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
    """A data set is missing, damaged or unusable."""


class OfficialFile(NamedTuple):
    """A file at its official address, with its published SHA-256 and size in bytes."""

    url: str
    sha256: str
    num_bytes: int


# Opening.


def opened(path: Path) -> BinaryIO:
    """Opens a file to read its bytes.

    Raises a DataError if the file cannot be read, or is a folder, device or pipe, which could hang.
    """
    try:
        return errors.opened(path)
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror or error}') from error
    except ValueError as error:  # NUL in the path
        raise DataError(f'{path} is not a valid path: {error}') from error


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
    """Returns whether macOS leaves files of this name beside others."""
    return name == '.DS_Store' or name.startswith('._')


# The budget: how many bytes a file may claim to hold.


def budget(num_bytes: int) -> int:
    """Returns how many bytes of memory or disk the content of a file of `num_bytes` bytes may take.

    The budget is 64 times the file's size, but at least 64 MiB and at most 4 GiB. It is never below the file's size.
    """
    return max(min(max(1 << 26, 64 * num_bytes), 1 << 32), num_bytes)


def require_within_budget(path: Path, claimed: int, num_bytes: int | None = None) -> None:
    """Raises a DataError if a file claims to hold more bytes than its budget. Call this before allocating them.

    Args:
        path: the file, for the message.
        claimed: how many bytes the file claims to hold.
        num_bytes: the size of the file. None means the size of `path`.
    """
    num_bytes = os.stat(path).st_size if num_bytes is None else num_bytes
    held = budget(num_bytes)
    if held < claimed <= 64 * num_bytes:
        raise DataError(
            f'{path} holds {claimed} bytes: compressed files are read up to 4 GiB, uncompressed files up to any size'
        )
    if claimed > held:
        raise DataError(
            f'{path} is damaged: it claims to hold {claimed} bytes, but at most {held} are allowed for its size'
        )


_CHUNK = 1 << 18


class Limited:
    """A stream that can be read up to a limit in bytes. Reading further raises a DataError and takes no memory."""

    def __init__(self, file: BinaryIO, limit: int, where: object) -> None:
        self._file, self.left, self._limit, self._where = file, limit, limit, where

    def require(self, num_bytes: int) -> None:
        """Raises a DataError if the next `num_bytes` bytes exceed the limit."""
        if num_bytes > self.left:
            raise DataError(f'{self._where} is damaged (it exceeds {self._limit} bytes)')

    def read(self, num_bytes: int) -> bytes:
        """Returns the next `num_bytes` bytes, or fewer at the end of the file."""
        self.require(num_bytes)
        payload = self._file.read(num_bytes)
        self.left -= len(payload)
        return payload

    def read_exactly(self, num_bytes: int) -> bytes:
        """Returns the next `num_bytes` bytes. Raises EOFError if the file ends before."""
        payload = self.read(num_bytes)
        if len(payload) < num_bytes:
            raise EOFError('it ends too early')
        return payload

    def skip(self, num_bytes: int) -> None:
        """Skips `num_bytes` bytes. Raises EOFError if the file ends before."""
        self.require(num_bytes)
        for start in range(0, num_bytes, _CHUNK):
            self.read_exactly(min(_CHUNK, num_bytes - start))

    def skip_rest(self) -> None:
        """Skips to the end, where a compressed stream compares its checksum."""
        while payload := self._file.read(_CHUNK):
            self.require(len(payload))
            self.left -= len(payload)


@contextlib.contextmanager
def opened_zip(path: Path, official: OfficialFile | None = None) -> Iterator[zipfile.ZipFile]:
    """Opens a zip file. Raises a DataError if it is damaged, or if its members together exceed the budget.

    An exception in the with block also becomes a DataError, because reading a damaged member can raise anything. An
    OSError in the block, for instance because the disk is full, stays an OSError.
    """
    with opened(path) as file:
        try:
            members = zipfile.ZipFile(file)
            require_within_budget(path, sum(max(0, member.file_size) for member in members.infolist()))
            for member in members.infolist():
                if member.header_offset < 0:
                    raise ValueError('a member has a negative offset')
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # bzip2 raises OSErrors
                    raise ValueError(f'{member.filename} is neither stored nor deflated: method {member.compress_type}')
            yield members
        except (errors.UserError, OSError):
            raise
        except Exception as error:  # a damaged zip can raise anything
            raise DataError(damaged(path, errors.first_line(error), official)) from error


# Messages.


def damaged(path: Path, reason: object, official: OfficialFile | None = None) -> str:
    """Returns the message for a damaged file.

    Args:
        path: the file.
        reason: what is wrong.
        official: the official file, if there is one. If `path` has its name, the message compares the checksums.
    """
    message = f'{path} is damaged ({reason})'
    if official is None or Path(path).name != official.url.rsplit('/', 1)[1]:
        return message
    with opened(path) as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return f'{message}: its SHA-256 is {sha256}, not the published {official.sha256}; delete it to download it again'


def checked_labels(labels: np.ndarray, num_classes: int, where: object, first: int = 0) -> np.ndarray:
    """Returns labels as int32 [N], from 0 to num_classes − 1.

    Args:
        labels: whole numbers [N], from `first` to `first` + num_classes − 1.
        num_classes: the number of classes.
        where: the file, for the message.
        first: the label of class 0, 0 or 1.

    Raises:
        DataError: there are no labels, or some are out of range.
    """
    if not len(labels):
        raise DataError(f'{where} holds no images')
    last = first + num_classes - 1
    if not first <= labels.min() <= labels.max() <= last:
        raise DataError(f'{where} has labels from {labels.min()} to {labels.max()}, not {first} to {last}')
    return labels.astype(np.int32) - np.int32(first)


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenates arrays along the first axis, and empties the list.

    Frees each part once it is copied. The peak is little more than one copy of all parts, because np.empty takes memory
    only as it is written to.
    """
    if len(parts) == 1:
        return parts.pop()
    array = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    end = 0
    while parts:
        part = parts.pop(0)
        array[end : end + len(part)] = part
        end += len(part)
    return array


# Downloads.


def download(official: OfficialFile, path: Path) -> None:
    """Downloads a file to `path` with a progress bar. The file appears only when it is complete and its SHA-256 right.

    Raises a DataError if the download fails, for instance if no answer comes within 10 seconds. The message says which
    file to put where.
    """
    new_folders = []
    try:
        new_folders = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with errors.replacing(path) as unfinished:
            sha256 = _fetch(official, unfinished)
            if sha256 != official.sha256:
                raise DataError(f'{official.url} has the SHA-256 {sha256}, not {official.sha256}: it was not kept')
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        raise DataError(
            f'{path} is missing and could not be downloaded ({reason}): download {official.url} and put it there'
        ) from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # the folder was not made, or is not empty
                folder.rmdir()


def _fetch(official, path):
    from tqdm import tqdm

    sha256 = hashlib.sha256()
    with (
        _open_url(official.url) as response,
        open(path, 'wb') as file,
        tqdm(None, path.name, official.num_bytes, unit='B', unit_scale=True, disable=None) as progress,
    ):
        left = official.num_bytes + 1  # stops one byte later, because a wrong file might never end
        while left and (chunk := response.read(min(1 << 20, left))):
            file.write(chunk)
            sha256.update(chunk)
            progress.update(len(chunk))
            left -= len(chunk)
    return sha256.hexdigest()


def _open_url(url, seconds=10):
    """Returns what urlopen returns, or raises a TimeoutError after `seconds`.

    The timeout of urlopen applies to each address of a host separately, and not to the DNS lookup.
    """
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
