"""What errors keep alive: the frames that they came through, with the bodies and tensors in them."""

from __future__ import annotations

import traceback


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


def copy_error(error: Exception) -> Exception:
    """The same error for one of several who wait for what has failed, with the traceback that it has so far.

    Were it raised for all, its traceback would have the frames of all; and :func:`forget_frames`, called by one, would
    end the coroutines of the others, as clearing the frame of one that is suspended does.
    """
    try:
        # As pickle would, but for the constructor: those of the tree take something else.
        reduced = error.__reduce__()
        copied = error.__class__.__new__(error.__class__, *(reduced[1] if isinstance(reduced, tuple) else error.args))
    except TypeError:  # a class without a constructor, as pydantic's
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    copied.__dict__.update(error.__dict__)
    return copied.with_traceback(error.__traceback__)
