"""``unstir train``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, Field, create_model

from app.cli.flags import flags_of, read, with_flags
from app.cli.terminal import CommandError, ExistingPath, complain, explain
from model.data import DataError
from model.device import DeviceError, select_device
from model.network.config import ConfigError
from model.training.recipe import DivergedError, Recipe, TrainingError
from model.training.run import train as run
from model.training.state import read_recipe

CARD = {  # fields of the card by option
    "name": "name",
    "description": "description",
    "data_description": "data",
    "licence": "licence",
    "background": "background",
}


def _check_colour(text: str) -> str:
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError("give a colour as #rrggbb, such as '#ffffff'")
    return text


def _check_name(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > 100:
        raise ValueError("give 1 to 100 printable characters")
    return text


Colour = Annotated[str, AfterValidator(_check_colour)]
Name = Annotated[str, AfterValidator(_check_name)]


class TrainOptions(BaseModel):
    data: ExistingPath = Field(
        description="Folder of images (its subfolders are the classes), an .npz, or idx files as MNIST has them."
    )
    out: Path = Field(description="Folder that becomes the checkpoint.")
    resume: bool = Field(False, description="Continue the run in --out, with its recipe.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    classes: tuple[str, ...] = Field(
        (), description="Names of the classes, in the order of their labels; by default as the data has them."
    )
    name: Name = Field("", description="For the card: name of the checkpoint; by default that of the folder.")
    description: str = Field("", description="For the card: what the images show.")
    data_description: str = Field("", description="For the card: where the images come from.")
    licence: str = Field("unknown", description="For the card: licence of data and weights.")
    background: Colour = Field(
        "#000000",
        description="Colour behind images that are transparent or too small, here and when they are uploaded.",
    )


HINTS = get_type_hints(Recipe)
DECLARED: dict[str, Any] = {
    field.name: (
        HINTS[field.name],
        Field(field.default, description=field.metadata["help"], **field.metadata["bounds"]),
    )
    for field in fields(Recipe)
}
RecipeFlags = create_model("RecipeFlags", **DECLARED)


@with_flags(flags_of(TrainOptions), flags_of(RecipeFlags))
def train(**flags: Any) -> int:
    options = read(TrainOptions, flags)
    card = {CARD[name]: getattr(options, name) for name in CARD if name in options.model_fields_set}
    with explain(TrainingError, DataError, ConfigError, DeviceError, flags={*HINTS, "device"}):
        recipe = _recipe(flags, read_recipe(options.out) if options.resume else Recipe())
        device = select_device(options.device)
        try:
            run(options.data, options.out, recipe, device, resume=options.resume, card=card, classes=options.classes)
        except (DivergedError, OSError) as error:  # not the command is wrong, the run failed
            complain(CommandError(str(error)))
            return 1
    return 0


def _recipe(flags: Mapping[str, Any], base: Recipe) -> Recipe:
    typed = read(RecipeFlags, flags)
    return replace(base, **{name: getattr(typed, name) for name in typed.model_fields_set})
