"""What errors keep alive: the frames that they came through, with the bodies and tensors in them."""

from __future__ import annotations

import traceback
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def forget_frames(error: BaseException | None) -> None:
    """Clear the local variables of the frames that an error came through; where it came from can still be printed.

    An error that is kept, or is part of a cycle of references, would keep bodies and tensors with it.
    """
    seen: set[int] = set()
    pending = [error]
    while pending:
        error = pending.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            pending += [error.__cause__, error.__context__]


def copy_error(error: E) -> E:
    """The same error for one of several who wait for what has failed, with the traceback that it has so far.

    Were it raised for all, its traceback would have the frames of all; and :func:`forget_frames`, called by one, would
    end the coroutines of the others, as clearing the frame of one that is suspended does.
    """
    copied = error.__class__.__new__(error.__class__, *error.args)  # their constructors take something else
    copied.__dict__.update(error.__dict__)
    return copied.with_traceback(error.__traceback__)
