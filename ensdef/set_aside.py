"""Files that are not as they were written: put out of the way under another name, never deleted, never used.

Only who has claimed the work whose result a file is may set it aside (see ``claims``), after another look at it. So no
file is taken from a process that is writing it: such a process has the claim itself; and as files appear whole, under
their final names, by a rename, there is nothing half-written under such a name but what a crash of the machine, a full
disk or a hand left there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TypeVar

from ensdef.errors import UsageError

T = TypeVar("T")
#: How messages of refusal go on with what a user would have to do.
_REMEDIES = ("; delete ", "; train ")


def set_aside(path: Path, reason: str, tell: Callable[[str], None]) -> Path:
    """Rename a damaged file or folder to ``<path>.damaged-<n>``.

    Args:
        reason: what is wrong with it; a remedy that it ends with is left out.
        tell: is told what, why, and where it lies now.
    Raises:
        OSError: it is not there, or the folder cannot be written.
    """
    for remedy in _REMEDIES:
        reason = reason.partition(remedy)[0]
    for number in count(1):
        target = path.with_name(f"{path.name}.damaged-{number}")
        if not target.exists():
            os.rename(path, target)
            break
    tell(f"set aside and made again: {reason.removeprefix(f'{path}: ')}; what was {path} is {target.name} now")
    return target


def whole(find: Callable[[], T | None], path: Path, tell: Callable[[str], None] | None = None) -> T | None:
    """What ``find`` finds; None: nothing is there, or ``find`` refuses it as damaged.

    Args:
        path: the file that ``find`` reads.
        tell: given by who has claimed the work: what is damaged is set aside then, and this is told of it.
    """
    try:
        return find()
    except UsageError as error:
        if tell is not None and path.exists():
            set_aside(path, str(error), tell)
        return None
