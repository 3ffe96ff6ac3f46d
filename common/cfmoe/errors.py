"""The two exceptions that every part of CFMoE raises, and the translation of operating-system errors into them."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class CFMoEError(Exception):
    """Something that the user can mend. The message is one line: the value, why it is wrong, and the remedy."""


class RuntimeFault(Exception):
    """A fault of CFMoE or of the machine, which no change of the input mends."""


_REMEDIES = {
    errno.ENOSPC: "free some space there or choose another place",
    errno.EDQUOT: "free some space under your quota or choose another place",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose a file system that takes larger files",
    errno.EACCES: "check the permissions of the file and its directories",
    errno.EPERM: "check the permissions of the file and its directories",
    errno.EROFS: "choose a place on a writable file system",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "give the path of a file, not of a directory",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
}


def os_error(error: OSError, path: Path | str, doing: str) -> CFMoEError:
    """The user's form of `error`, met while `doing` ("write", "read", …) `path`: one line with file, reason and remedy."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    # numpy's writers give no number when a file system takes only a part.
    other = "check the path and try again" if error.errno else "free some space there if it is full, and try again"
    remedy = _REMEDIES.get(error.errno or 0, other)
    return CFMoEError(f"cannot {doing} {path}: {reason.lower()}; {remedy}")
