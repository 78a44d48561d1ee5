"""Words of messages: names that were probably meant."""

from __future__ import annotations

import pytest

from app.errors.wording import MAX_KNOWN, MAX_NAME, closest


@pytest.mark.parametrize(
    ("name", "found"),
    [("stpes", "steps"), ("STEPS", "steps"), ("ddmi", "ddim"), ("nothing like it", None), (5, None)],
)
def test_the_name_that_was_meant(name, found):
    assert closest(name, ["steps", "ddpm", "ddim", "eta"]) == found


def test_what_would_take_long_is_not_compared():
    known = [f"class {i}" for i in range(MAX_KNOWN)]
    assert closest("clas 7", known) == "class 7"
    assert closest("clas 7", [*known, "one more"]) is None
    assert closest("x" * (MAX_NAME + 1), ["x" * MAX_NAME]) is None
