"""Errors that a user can fix, and files that are opened with care and written whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class UserError(Exception):
    """An error that a user can fix. The message is one line: what is wrong, with which value, and what to do.

    Control characters are escaped and long messages shortened, because a message may quote someone else's file.
    """

    status = 2  # exit status of a script that ends with this error

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


def printable(text: object) -> str:
    """Returns text with control characters escaped, because they could steer a terminal.

    Leaves out the middle of a text of more than 1,500 characters.
    """
    escaped = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))
    return escaped if len(escaped) <= 1500 else f'{escaped[:1000]} … {escaped[-400:]}'


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the class name of the error if the message is empty."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:200])


def reason(error: BaseException) -> str:
    """Returns the message of an error, without the number and the path of an OSError."""
    return getattr(error, 'strerror', None) or first_line(error)


def opened(path: Path) -> BinaryIO:
    """Opens a regular file for reading bytes. Raises OSError, also for a pipe, because a pipe waits for a writer."""
    file = open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, 'it is not a regular file', os.fspath(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. The file or folder written there then replaces `path`.

    If the block ends with an error, `path` stays as it was. A reader sees the old content or the new content, never a
    part. Removes partial files that killed processes left behind. Raises OSError.
    """
    path = Path(path)
    discard_leftovers(path)
    partial = path.with_name(f'{path.name}.{socket.gethostname()}.{os.getpid()}.partial')
    try:
        yield partial
        if not partial.is_dir():
            flush(partial)
        os.replace(partial, path)
    finally:
        remove(partial)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def discard_leftovers(path: Path) -> None:
    """Removes partial files that earlier attempts to write `path` left behind.

    Removes a partial file if its process ran on this host and has ended, or if the file is over an hour old.
    """
    with contextlib.suppress(OSError):
        for left in os.scandir(Path(path).parent):
            found = _PARTIAL.fullmatch(left.name.removeprefix(Path(path).name))
            if left.name.startswith(Path(path).name) and found and _is_abandoned(left, found):
                remove(left.path)


_PARTIAL = re.compile(r'\.(?P<host>.+)\.(?P<process>\d+)\.partial')


def _is_abandoned(entry, found):
    if found['host'] == socket.gethostname() and not _is_running(int(found['process'])):
        return True
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > 3600


def _is_running(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """Removes a file, or a folder with its content. Ignores errors, such as a missing file or a lack of permission."""
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk. Does nothing on file systems without fsync. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
