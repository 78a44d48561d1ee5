"""The calls of the README through a client that openapi-python-client made: checked by mypy, then run.

``python calls.py URL IMAGE``; the image is a PNG of the served network's size.
"""

from __future__ import annotations

import base64
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from unstir_client import Client
from unstir_client.api.images import interpolate, invert, sample
from unstir_client.api.jobs import cancel_job, get_job, get_job_result
from unstir_client.api.service import get_model, get_readiness
from unstir_client.models import (
    Embed,
    Fit,
    ImageLatent,
    InterpolateForm,
    InterpolateRequest,
    InterpolateResponse,
    InvertForm,
    InvertMethod,
    InvertRequest,
    InvertResponse,
    JobStatus,
    ModelInfo,
    NpyLatent,
    Problem,
    SampleForm,
    Sampler,
    SampleRequest,
    SampleResponse,
    SeedLatent,
    Status,
)
from unstir_client.types import UNSET, File

T = TypeVar("T")
url, place = sys.argv[1], Path(sys.argv[2])
content = place.read_bytes()
client = Client(base_url=url, headers={"Accept": "application/json"}, raise_on_unexpected_status=True)


def the(kind: type[T], answer: object) -> T:
    assert isinstance(answer, kind), answer
    return answer


def file() -> File:
    return File(payload=BytesIO(content), file_name="head.png", mime_type="image/png")


# The service.
assert the(Status, get_readiness.sync(client=client)).status == "ready"
model = the(ModelInfo, get_model.sync(client=client))
label = model.classes[-1]
assert {each.name for each in model.samplers} == {each.value for each in Sampler}

# Sample: JSON, a form, and the same request as a PNG.
request = SampleRequest(label=label, seed=7, steps=4)
first = the(SampleResponse, sample.sync(client=client, body=request))
assert (first.seeds, first.sampler, first.steps, first.label) == ([7], Sampler.DDIM, 4, label)
assert first.eta == 0
assert first.trajectory is UNSET
assert base64.b64decode(first.images[0]).startswith(b"\x89PNG")
form = SampleForm(label=label, seed=7, steps=4, sampler=Sampler.DDPM, reproducible=True)
assert the(SampleResponse, sample.sync(client=client, body=form)).sampler is Sampler.DDPM
assert the(SampleResponse, sample.sync(client=client)).steps == 50
png = client.get_httpx_client().post("/sample", json=request.to_dict(), headers={"Accept": "image/png"})
assert png.headers["content-type"] == "image/png"
assert png.content.startswith(b"\x89PNG")
described = sample.sync_detailed(client=client, body=request, priority="u=1", x_request_timeout_ms=60_000)
assert (described.status_code, described.headers["x-nfe"]) == (200, "4")

# Invert: by file, and in base64; the latent is sampled again.
by_file = InvertForm(image=file(), steps=4, label=label, embed=Embed.NONE)
code = the(InvertResponse, invert.sync(client=client, body=by_file))
assert (code.method, code.decode.sampler) == (InvertMethod.FIXED_POINT, Sampler.DDIM)
assert isinstance(code.psnr, float)
in_base64 = InvertRequest(image=base64.b64encode(content).decode(), steps=4, label=label, fit=Fit.RESIZE)
assert the(InvertResponse, invert.sync(client=client, body=in_base64)).nfe == code.nfe
again = SampleRequest(
    latent=NpyLatent(npy=code.latent),
    sampler=code.decode.sampler,
    steps=code.decode.steps,
    spacing=code.decode.spacing,
    clip=code.decode.clip,
    label=label,
    reproducible=code.decode.reproducible,
    embed=Embed.NONE,
)
assert the(SampleResponse, sample.sync(client=client, body=again)).images == [code.reconstruction]

# Interpolate: seeds, files, both, weights and a grid.
ends = InterpolateRequest(a=7, b=SeedLatent(seed=8), frames=3, steps=2)
assert len(the(InterpolateResponse, interpolate.sync(client=client, body=ends)).images) == 3
files = InterpolateForm(a=file(), b=file(), frames=2, steps=2)
assert len(the(InterpolateResponse, interpolate.sync(client=client, body=files)).latents) == 2
blend = InterpolateForm(latents=[file(), 5, file()], weights=[0.5, 0.25, 0.25], steps=2)
assert the(InterpolateResponse, interpolate.sync(client=client, body=blend)).weights == [[0.5, 0.25, 0.25]]
corners = InterpolateRequest(latents=[1, SeedLatent(seed=2), NpyLatent(npy=first.latents[0]), 4], grid=[2, 3], steps=2)
assert the(InterpolateResponse, interpolate.sync(client=client, body=corners)).grid == [2, 3]
mixed = InterpolateRequest(a=ImageLatent(image=base64.b64encode(content).decode()), b=3, frames=2, steps=2)
assert the(InterpolateResponse, interpolate.sync(client=client, body=mixed)).encode_nfe

# A job to its end, another that is cancelled, and a problem.
accepted = sample.sync_detailed(client=client, body=request, prefer="respond-async", idempotency_key="calls-of-python")
job = the(JobStatus, accepted.parsed)
assert accepted.headers["location"] == f"/jobs/{job.id}"
while job.state in ("waiting", "running"):
    time.sleep(0.02)
    job = the(JobStatus, get_job.sync(job.id, client=client))
assert (job.state, job.error) == ("done", UNSET)
assert the(SampleResponse, get_job_result.sync(job.id, client=client)).seeds == [7]
long = the(JobStatus, sample.sync(client=client, body=SampleRequest(sampler=Sampler.DDPM, n=8), prefer="respond-async"))
assert the(JobStatus, cancel_job.sync(long.id, client=client)).state == "cancelled"
problem = the(Problem, sample.sync(client=client, body=SampleRequest(steps=0)))
assert (problem.status, problem.code) == (422, "invalid_field")
assert isinstance(problem.errors, list)
assert (problem.errors[0].field, problem.errors[0].value) == ("steps", 0)
print("done")
