"""Files that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nnxp._errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

LONGEST = 255  # bytes in a name, on most file systems


def warn_of_leftover(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def path_of(path: object) -> str:
    """The name of a file, as text; OptionError for what is none."""
    if isinstance(path, str | bytes | os.PathLike):
        name = os.fsdecode(path)
        if name and "\0" not in name:
            return name
    raise OptionError(f"a file has a name, a str or a Path, not {path!r:.60}")


@contextmanager
def written_beside(
    path: str | os.PathLike[str], say: Callable[[str], object] = warn_of_leftover
) -> Iterator[Path]:
    """A path to write to in place of `path`: renamed over it if the block ends well, else removed.

    The file to write to lies in the same folder, is called `<name>.part` and starts empty; the
    block may replace it by another. A symlink stays one: what it points to is replaced. A file that
    is replaced passes its permissions on; a new one has those that the umask leaves.

    A `.part` that was left by a process that was killed is replaced, and `say` hears of it. One
    that another process or thread is writing is left alone: this one is called `<name>.2.part`.

    On Windows a file can be renamed only if nobody has it open or mapped: let go of the maps of it
    before the block ends.

    Before the block is entered it raises FileNotFoundError if there is no such folder,
    IsADirectoryError for a folder, PermissionError for what may not be written, and OSError for
    a pipe or a device.
    """
    from pathlib import Path  # not for every import of nnxp

    target = Path(os.path.realpath(path_of(path)))
    inherited = mode_of(target)
    beside, claim, created = _claimed(target, say)
    try:
        yield beside
        if not _is_at(claim, beside):  # the block has put another file there
            claim = _claimed_again(beside, claim)
        with suppress(PermissionError):  # some mounted file systems have no permissions to set
            os.chmod(beside, created if inherited is None else inherited)
        _sync(beside)
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            if not _is_at(claim, beside):
                claim = _claimed_again(beside, claim)
            os.unlink(beside)
        raise
    finally:
        if claim is not None:
            os.close(claim)


def mode_of(target: Path) -> int | None:
    """The permissions of the file there, None if there is none; OSError if it has to stay."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if target.parent.is_dir():
            return None
        raise FileNotFoundError(
            errno.ENOENT, "there is no such folder to write to", str(target.parent)
        ) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder stands where to write", str(target))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file, so it cannot be replaced", str(target))
    if not os.access(target, os.W_OK):
        # Renaming asks for no permission on the file itself, but its owner said: not this one.
        raise PermissionError(errno.EACCES, "this file may not be written to", str(target))
    return mode & 0o777


def _claimed(target: Path, say: Callable[[str], object]) -> tuple[Path, int | None, int]:
    """An empty file beside the target that nobody else writes to, its claim, and its permissions.

    The claim is a lock on the open file: the system lets go of it when the process ends, however
    that happens, so a file without one was left. Windows lets nobody remove a file that is open,
    and needs no lock, nor would it rename a file that we hold open.
    """
    number = 1
    while True:
        end = ".part" if number == 1 else f".{number}.part"
        kept = os.fsencode(target.name)[: LONGEST - len(end)]
        beside = target.with_name(kept.decode(errors="ignore") + end)
        try:
            handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            left = _removed(beside)
            if left:  # bytes; an empty one is no loss, and may be of a writer that just began
                say(f"{beside} was left by a run that did not end; it is replaced")
            number += left is None
            continue
        except PermissionError as error:
            raise PermissionError(
                error.errno, "this folder may not be written to", str(target.parent)
            ) from None
        created = os.fstat(handle).st_mode & 0o777
        if not _lock(handle):
            os.close(handle)
            number += 1
        elif os.name == "nt":
            os.close(handle)
            return beside, None, created
        elif _is_at(handle, beside):
            return beside, handle, created
        else:  # somebody took it for a file that was left, before it was locked
            os.close(handle)


def _removed(beside: Path) -> int | None:
    """Remove a file that was left, and tell its size; None if it cannot be, as it is written to."""
    try:
        handle = os.open(beside, os.O_RDWR)
    except OSError:  # it is gone, a folder, or another user's
        return None
    try:
        if not _lock(handle) or not _is_at(handle, beside):
            return None
        size = os.fstat(handle).st_size
        if os.name == "nt":
            os.close(handle)
            handle = -1
        os.unlink(beside)
        return size
    except PermissionError:
        return None
    finally:
        if handle >= 0:
            os.close(handle)


def _claimed_again(beside: Path, claim: int | None) -> int | None:
    """The claim on the file that the block has put in place of the one it was given."""
    if claim is None:
        return None
    handle = os.open(beside, os.O_RDWR)
    if not _lock(handle) or not _is_at(handle, beside):
        os.close(handle)
        raise OSError(errno.EBUSY, "another process writes there at the same time", str(beside))
    os.close(claim)
    return handle


def _lock(handle: int) -> bool:
    """Lock an open file for as long as it is open; False if another has locked it."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _is_at(handle: int | None, path: Path) -> bool:
    """Whether the open file is the one that stands at the path."""
    if handle is None:
        return True
    try:
        at, held = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (at.st_dev, at.st_ino) == (held.st_dev, held.st_ino)


def _sync(path: Path) -> None:
    """Wait until the bytes are on the disk: a rename may otherwise outlive them in a power cut."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
