"""``unstir evaluate``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.cli.flags import flags_of, read, with_flags
from app.cli.terminal import CommandError, ExistingPath, complain, explain
from app.settings import SHIPPED
from model.checkpoint import CheckpointError
from model.data import DataError
from model.device import DeviceError, select_device
from model.diffusion.schedule import ScheduleError
from model.evaluation.run import PARTS
from model.evaluation.run import evaluate as run
from model.evaluation.scope import QUICK, Scope

FULL = Scope()


class EvaluateOptions(BaseModel):
    checkpoint: ExistingPath = Field(SHIPPED / "fashion-mnist-32", description="Folder of the network.")
    data: ExistingPath = Field(
        description="What it was trained on: an .npz, idx files or a folder. Images are compared with its held-out "
        "ones (test_images and test_labels of an .npz, t10k files of idx), else with a fifth of it."
    )
    out: Path = Field(Path("quality"), description="Folder for quality.md and its plots.")
    work: Path = Field(Path("evaluation"), description="Folder that keeps what is done, so that it can be continued.")
    quick: bool = Field(False, description="Fewer images and steps: minutes rather than hours.")
    images: int | None = Field(
        None, ge=2, description=f"Images of each sampler; by default {FULL.images}, or {QUICK.images} with --quick."
    )
    part: Literal[PARTS] | None = Field(None, description="Measure only this; by default both.")  # type: ignore[valid-type]
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")


@with_flags(flags_of(EvaluateOptions))
def evaluate(**flags: Any) -> int:
    options = read(EvaluateOptions, flags)
    scope = QUICK if options.quick else FULL
    scope = replace(scope, images=options.images or scope.images)
    command = ["unstir", "evaluate", "--checkpoint", f"weights/{options.checkpoint.resolve().name}"]
    command += ["--data", options.data.name, "--images", str(scope.images), *["--quick"] * options.quick]
    with explain(CheckpointError, status=1), explain(DataError, ScheduleError, DeviceError, flags={"device"}):
        try:
            page = run(
                options.checkpoint,
                options.data,
                options.out,
                options.work,
                scope,
                select_device(options.device),
                parts=(options.part,) if options.part else PARTS,
                command=shlex.join(command),
            )
        except OSError as error:  # not the command is wrong: a folder cannot be written to, or a disk is full
            complain(CommandError(str(error)))
            return 1
    print(page)
    return 0
