"""``unstir train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, Field, create_model

from app.cli.flags import flags_of, read, with_flags
from app.cli.terminal import ExistingPath, explain
from model.data import DataError
from model.device import DeviceError, select_device
from model.network.config import ConfigError
from model.training.recipe import Recipe, TrainingError
from model.training.run import read_recipe
from model.training.run import train as run


class TrainOptions(BaseModel):
    data: ExistingPath = Field(
        description="Folder of images (its subfolders are the classes), an .npz, or idx files as MNIST has them."
    )
    out: Path = Field(description="Folder that becomes the checkpoint.")
    resume: bool = Field(False, description="Continue the run in --out, with its recipe.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    description: str = Field("", description="For the card: what the images show.")
    data_description: str = Field("", description="For the card: where the images come from.")
    licence: str = Field("unknown", description="For the card: licence of data and weights.")


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
    card = {"description": options.description, "data": options.data_description, "licence": options.licence}
    with explain(TrainingError, DataError, ConfigError, DeviceError, flags={*HINTS, "device"}):
        recipe = _recipe(flags, read_recipe(options.out) if options.resume else Recipe())
        run(options.data, options.out, recipe, select_device(options.device), resume=options.resume, card=card)
    return 0


def _recipe(flags: Mapping[str, Any], base: Recipe) -> Recipe:
    typed = read(RecipeFlags, flags)
    return replace(base, **{name: getattr(typed, name) for name in typed.model_fields_set})
