"""Fields that several requests share: files, latents, choices."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    model_validator,
)
from pydantic import WithJsonSchema as Described
from pydantic_core import CoreSchema

from app.engine.jobs import SnapshotKind
from app.errors.wording import choose
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS
from model.images import Fit

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
WHITESPACE = b" \t\r\n\v\f"


def _known_sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(choose(name, list(SAMPLERS)))
    return name


def _known_method(name: str) -> str:
    if name not in INVERSIONS:
        raise ValueError(choose(name, list(INVERSIONS)))
    return name


def _from_base64(value: Any) -> Any:
    """Files of a form are bytes already; JSON has them in base64, which a browser may have made a data URL.

    Base64 may have line breaks and other whitespace in it (RFC 2045, section 6.8).
    """
    if isinstance(value, dict) and "sha256" in value:
        raise ValueError("this names a file by its hash, as a PNG that was made of it does; send the file itself")
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode(value.encode("ascii").translate(None, WHITESPACE), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("send the file itself in a form, as curl -F name=@file does, or its bytes in base64") from None


def _to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


Content = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    PlainSerializer(_to_base64, return_type=str),
    # As generators of OpenAPI 3.0 (format) and of 3.1 (contentEncoding) know it.
    Described({"type": "string", "format": "byte", "contentEncoding": "base64", "description": "A file in base64."}),
]
SamplerName = Annotated[str, AfterValidator(_known_sampler), Field(json_schema_extra={"enum": list(SAMPLERS)})]
MethodName = Annotated[str, AfterValidator(_known_method), Field(json_schema_extra={"enum": list(INVERSIONS)})]
Label = int | str | None
FitField = Annotated[
    Fit,
    Field(
        description="What is done to images of another size: exact refuses them, resize stretches, crop fills the "
        "frame and cuts off the rest, pad shows all of it on the background."
    ),
]
Embed = Literal["request", "request_and_files", "none"]
EmbedField = Annotated[
    Embed,
    Field(
        description="What a PNG, and the request.json of a zip, say of how they were made: request names files that "
        "came with it by their SHA-256; request_and_files has a .npy, and the latent of an image, in it, from which "
        "anybody can draw that image again; none says nothing."
    ),
]
LookField = Annotated[
    SnapshotKind,
    Field(description="x_0 shows the image that the network predicts at each step, x_t the noisy state itself."),
]
STRICT = ConfigDict(
    extra="forbid",
    strict=True,  # "2" is no number and true no label; silent coercion hides mistakes
    allow_inf_nan=False,
)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """What a field that may be null is otherwise."""
    (member,) = (member for member in schema["anyOf"] if member.get("type") != "null")
    return {**member, "description": schema["description"]}


class Latent(BaseModel):
    """An x_T: one of its three forms. A bare number is a seed."""

    model_config = STRICT

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="x_T ~ N(0, I), drawn from this seed.")
    npy: Content | None = Field(
        None, description="A .npy of float32 [C, H, W], or [2, C, H, W] for the pair of `obelm`, in base64."
    )
    image: Content | None = Field(None, description="An image, in base64; it is encoded first, as /invert does.")

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """One form or another, each with a title and its one field required, so that typed clients can tell them."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        forms = {name: _without_null(found) for name, found in schema.pop("properties").items()}
        del schema["type"], schema["additionalProperties"]  # which would know no field of the forms
        schema["oneOf"] = [
            {**forms["seed"], "title": "Seed"},
            *(
                {
                    "type": "object",
                    "title": f"{name.title()}Latent",
                    "properties": {name: form},
                    "required": [name],
                    "additionalProperties": False,
                }
                for name, form in forms.items()
            ),
        ]
        return reference

    @model_validator(mode="before")
    @classmethod
    def _bare_seed(cls, value: Any) -> Any:
        return {"seed": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(form is not None for form in (self.seed, self.npy, self.image)) != 1:
            raise ValueError("give one of seed, npy and image")
        return self
