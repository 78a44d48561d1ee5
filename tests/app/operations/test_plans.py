"""Plans: refused by their number of evaluations, compiled in threads after all that is cheap, and kept by bytes."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc

import pytest

from app.operations import plans as module
from app.operations.plans import MAX_BYTES, MAX_EVALUATIONS, Plans
from model.diffusion import samplers
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS
from model.diffusion.schedule import NoiseSchedule
from tests.app.api.test_bad_input import assert_problem
from tests.engines import SCHEDULE

pytestmark = pytest.mark.anyio
PNG = b"\x89PNG\r\n\x1a\n"


def service(client):
    return client._transport.app.state.lifecycle.get_service()


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        pytest.param({"steps": 1000, "refinements": 50}, "refinements", 50, id="both"),
        pytest.param({"steps": 1000, "refinements": 10}, "refinements", 10, id="just-too-many"),
    ],
)
async def test_too_many_evaluations_are_refused_before_anything_is_compiled(client, fields, field, value):
    before = list(service(client).plans._kept)
    response = await client.post("/invert", params=fields, content=PNG, headers={"content-type": "image/png"})
    assert_problem(response, 422, "invalid_field", field)
    [fault] = response.json()["errors"]
    assert (fault["field"], fault["value"]) == (field, value)
    assert f"at most {MAX_EVALUATIONS}; ask for fewer steps or refinements" in fault["remedy"]
    assert list(service(client).plans._kept) == before


def test_every_sampler_at_all_steps_is_admitted():
    assert all(a * 4000 + b <= MAX_EVALUATIONS for a, b in (sampler.evaluations for sampler in SAMPLERS.values()))
    assert INVERSIONS["fixed_point"].nfe(1000) == 4000
    assert INVERSIONS["fixed_point"].nfe(196, 50) <= MAX_EVALUATIONS


@pytest.mark.parametrize("inversion", INVERSIONS.values(), ids=lambda inversion: inversion.name)
@pytest.mark.parametrize("refinements", [1, 2, 3, 7])
def test_evaluations_are_known_before_the_plan_is(inversion, refinements):
    options = {"refinements": refinements} if inversion.options else {}
    assert inversion.compile(SCHEDULE, 12, **options).nfe == inversion.nfe(12, **options)
    pair = {"paired": True} if inversion.slots == 2 else {}
    assert SAMPLERS[inversion.sampler].compile(SCHEDULE, 12, **pair).nfe == inversion.decode_nfe(12)


async def test_what_is_no_image_is_refused_before_its_plan_is_compiled(client):
    response = await client.post("/invert?steps=777", content=PNG, headers={"content-type": "image/png"})
    assert_problem(response, 422, "invalid_field", "image")
    assert not any(steps == 777 for _, _, steps, _ in service(client).plans._kept)


async def test_plans_are_compiled_once_and_in_a_thread_of_their_own():
    calls = []
    gate = threading.Event()

    def compile_slowly(schedule: NoiseSchedule, steps: int, **options):
        calls.append(threading.current_thread())
        assert gate.wait(5)
        return samplers.ddim(schedule, steps, **options)

    plans = Plans()
    wanted = [asyncio.create_task(plans.compile(compile_slowly, SCHEDULE, 20, spacing="trailing")) for _ in range(4)]
    while len(calls) < module.COMPILERS:
        await asyncio.sleep(0.001)  # the event loop turns meanwhile
    gate.set()
    found = await asyncio.gather(*wanted)
    assert all(plan.nfe == 20 for plan in found)
    assert len(calls) <= module.COMPILERS
    assert threading.current_thread() not in calls
    assert await plans.compile(compile_slowly, SCHEDULE, 20, spacing="trailing") is found[-1]


async def test_plans_are_kept_by_bytes_and_the_latest_used_stay():
    plans = Plans(max_bytes=100_000)
    small = await plans.compile(samplers.ddim, SCHEDULE, 10)
    for steps in range(20, 60):
        await plans.compile(samplers.ddim, SCHEDULE, steps)
        assert await plans.compile(samplers.ddim, SCHEDULE, 10) is small
        assert 0 < plans.nbytes <= 100_000
    large = await plans.compile(samplers.ddim, SCHEDULE, 1000)
    assert large.nbytes > 100_000
    assert plans.nbytes == 0  # more than may be kept


def test_the_bytes_of_a_plan_are_about_those_that_it_takes():
    for compile_plan, options in ((INVERSIONS["fixed_point"].compile, {"refinements": 9}), (samplers.ddim, {})):
        tracemalloc.start()
        plan = compile_plan(SCHEDULE, 40, spacing="trailing", **options)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 0.5 * taken < plan.nbytes < 2 * taken


def test_the_largest_plan_takes_a_fraction_of_what_is_kept():
    plan = INVERSIONS["fixed_point"].compile(SCHEDULE, 40, refinements=249, spacing="trailing")
    assert plan.nfe == MAX_EVALUATIONS
    assert plan.nbytes < MAX_BYTES / 4
    assert len({id(step) for step in plan.steps}) == 4 * 40  # what is repeated is kept once
