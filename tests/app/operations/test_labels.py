"""Labels: names, indices, and what a checkpoint without a card knows of them."""

from __future__ import annotations

import json

import pytest

from app.api.app import create_app
from model import images
from tests.conftest import save_tiny, serving

pytestmark = pytest.mark.anyio
JSON = {"accept": "application/json"}
NUMERALS = ("1", "10", "2")  # folders of these names, in their order


@pytest.fixture
async def numerals(tmp_path, settings):
    folder = save_tiny(tmp_path / "numerals", NUMERALS)
    async with serving(create_app(settings.model_copy(update={"checkpoint": folder}))) as client:
        yield client


@pytest.fixture
async def nameless(tmp_path, settings):
    folder = save_tiny(tmp_path / "nameless")
    (folder / "card.json").unlink()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    infinite = json.loads(scheduler.read_text()) | {"lambda_min_clipped": float("-inf")}  # as diffusers writes it
    scheduler.write_text(json.dumps(infinite))
    async with serving(create_app(settings.model_copy(update={"checkpoint": folder}))) as client:
        yield client


async def test_an_integer_is_an_index_and_text_a_name_first(numerals):
    for label, name in ((0, "1"), (1, "10"), (2, "2"), ("1", "1"), ("10", "10"), ("2", "2"), ("0", "1")):
        body = {"label": label, "steps": 2, "seed": 1}
        answer = await numerals.post("/sample", json=body, headers=JSON)
        assert answer.json()["label"] == name
        if isinstance(label, str):
            form = await numerals.post("/sample", data=body, headers=JSON)
            assert form.json()["label"] == name
        png = (await numerals.post("/sample", json=body)).content
        request = json.loads(images.text_of(png)["unstir"])["request"]
        assert (await numerals.post("/sample", json=request)).content == png  # as replay does
    assert (await numerals.post("/sample", json={"label": "3", "steps": 2})).status_code == 422


async def test_without_a_card_classes_go_by_number_and_there_is_no_guidance(nameless):
    described = (await nameless.get("/model")).json()
    assert (described["classes"], described["guidance"]) == (["0", "1", "2", "3"], False)
    assert (await nameless.post("/sample", json={"label": "3", "steps": 2})).status_code == 200
    for body, field, words in (
        ({}, "label", "this checkpoint has no null class; choose one of 0, 1, 2, 3"),
        ({"label": 4}, "label", "choose one of 0, 1, 2, 3, or an index of 0 to 3"),
        ({"label": 1, "guidance": 2}, "guidance", "no null class to guide away from; use 1"),
    ):
        answer = await nameless.post("/sample", json=body | {"steps": 2})
        (fault,) = answer.json()["errors"]
        assert (answer.status_code, fault["field"]) == (422, field)
        assert words in fault["remedy"]
