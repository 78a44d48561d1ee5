"""Errors that several wait for: each has its own, with what it says and where it came from."""

from __future__ import annotations

import errno

import pytest
from pydantic import BaseModel, ValidationError

from app.errors import InvalidField, Overloaded
from app.errors.frames import copy_error


def raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [Overloaded("full", retry_after=3), InvalidField("steps", 0, "choose 1"), OSError(errno.ENOSPC, "full", "a")],
    ids=lambda error: type(error).__name__,
)
def test_a_copy_says_the_same(error):
    original = raised(error)
    copied = copy_error(original)
    assert copied is not original
    assert (type(copied), copied.args, str(copied)) == (type(original), original.args, str(original))
    assert vars(copied) == vars(original)
    assert copied.__traceback__ is original.__traceback__


def test_an_error_without_a_constructor_is_quoted():
    class Model(BaseModel):
        steps: int

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"steps": "many"})
    copied = copy_error(caught.value)
    assert str(copied).startswith("ValidationError: 1 validation error for Model")
    assert copied.__traceback__ is caught.value.__traceback__
