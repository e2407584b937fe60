"""Files that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to in place of `path`: renamed over it if the block ends well, else removed.

    The file to write to lies in the same folder, has the same suffix and starts empty; the block
    may replace it by another. A symlink stays one: what it points to is replaced. A file that is
    replaced passes its permissions on; a new one has those that the umask leaves.

    Before the block is entered it raises FileNotFoundError if there is no such folder,
    IsADirectoryError for a folder, PermissionError for what may not be written, and OSError for
    a pipe or a device.
    """
    from pathlib import Path  # not for every import of nnxp

    target = Path(os.path.realpath(path))
    inherited = _mode_of(target)
    beside = target.with_name(f".nnxp-{os.urandom(6).hex()}{target.suffix}")
    created = _created(beside)
    try:
        yield beside
        with suppress(PermissionError):  # some mounted file systems have no permissions to set
            os.chmod(beside, created if inherited is None else inherited)
        _settle(beside)
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _mode_of(target: Path) -> int | None:
    """The permissions of the file there, None if there is none; OSError if it has to stay."""
    try:
        found = target.stat().st_mode
    except FileNotFoundError:
        if target.parent.is_dir():
            return None
        raise FileNotFoundError(
            errno.ENOENT, "there is no such folder to write to", str(target.parent)
        ) from None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, "a folder stands where to write", str(target))
    if not stat.S_ISREG(found):
        raise OSError(errno.EINVAL, "not a regular file, so it cannot be replaced", str(target))
    if not os.access(target, os.W_OK):
        # Renaming asks for no permission on the file itself, but its owner said: not this one.
        raise PermissionError(errno.EACCES, "this file may not be written to", str(target))
    return found & 0o777


def _created(path: Path) -> int:
    """Make an empty file where none was; its permissions, which the umask has chosen."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except PermissionError as error:
        raise PermissionError(
            error.errno, "this folder may not be written to", str(path.parent)
        ) from None
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _settle(path: Path) -> None:
    """Wait until the bytes are on the disk: a rename may otherwise outlive them in a power cut."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
