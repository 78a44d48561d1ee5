"""The command line: ``unstir serve``, the stories without a server, ``unstir train`` and ``unstir evaluate``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ValidationError

from app import __version__
from app.api.server import serve
from app.cli.loadtest import command as bench
from app.cli.local import CommandError, add_all
from app.cli.simulation import command as simulate
from app.engine.loading import select_device_for as device_of
from app.settings import SHIPPED, Settings
from model.checkpoint import CheckpointError
from model.data import DataError
from model.device import DeviceError
from model.device import select_device as pick_device
from model.evaluation.run import PARTS, evaluate
from model.evaluation.scope import QUICK, Scope
from model.network.config import ConfigError
from model.training.recipe import Recipe, TrainingError
from model.training.run import recipe_of, train


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="unstir", description="Serve, use, train and evaluate pixel-space diffusion models."
    )
    parser.add_argument("--version", action="version", version=f"unstir {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_serve(commands.add_parser("serve", help="serve a checkpoint over HTTP"))
    add_all(commands)
    bench.add_command(commands)
    simulate.add_command(commands)
    _add_train(commands.add_parser("train", help="train a noise predictor on a folder of images, .npz or idx files"))
    _add_evaluate(commands.add_parser("evaluate", help="measure the images of a checkpoint, by sampler and steps"))
    arguments = vars(parser.parse_args(argv))
    run = arguments.pop("run")
    try:
        status: int = run(arguments)
    except CommandError as error:
        return _complain(str(error))
    return status


def _add_serve(parser: argparse.ArgumentParser) -> None:
    for name, field in Settings.model_fields.items():
        text = f"{field.description} [{_plain(field.default)}; UNSTIR_{name.upper()}]"
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, metavar="VALUE", help=text.replace("%", "%%"))
    parser.set_defaults(run=_serve)


def _serve(arguments: dict[str, Any]) -> int:
    try:
        settings = Settings(**arguments)
    except ValidationError as error:
        return _complain(
            *(
                f"{_flag(str(fault['loc'][0]))} (UNSTIR_{str(fault['loc'][0]).upper()}) = {fault['input']!r}: "
                + fault["msg"].removeprefix("Value error, ")
                for fault in error.errors(include_url=False)
            )
        )
    if not settings.checkpoint.is_dir():
        return _complain(f"--checkpoint (UNSTIR_CHECKPOINT) = {settings.checkpoint}: no such folder")
    try:
        device_of(settings)
    except DeviceError as error:
        name = error.setting
        return _complain(f"{_flag(name)} (UNSTIR_{name.upper()}) = {error.value}: {error.remedy}")
    return serve(settings)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, type=Path, help="folder of images (subfolders are classes), .npz or idx"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder that becomes the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its recipe")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
    parser.add_argument("--description", default="", help="for the card: what the images show")
    parser.add_argument("--data-description", default="", help="for the card: where the images come from")
    parser.add_argument("--licence", default="unknown", help="for the card: licence of data and weights")
    kinds = get_type_hints(Recipe)
    for field in fields(Recipe):
        text = f"{field.metadata['help']} [{_plain(field.default)}]"
        if isinstance(field.default, bool):
            parser.add_argument(_flag(field.name), action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        kind: Any = _integers if isinstance(field.default, tuple) else kinds[field.name]
        kind = {"steps": int, "minutes": float}.get(field.name, kind)
        parser.add_argument(_flag(field.name), type=kind, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    parser.set_defaults(run=_train)


def _train(arguments: dict[str, Any]) -> int:
    facts = {"description": "description", "data": "data_description", "licence": "licence"}
    try:
        given = {field.name: arguments[field.name] for field in fields(Recipe) if field.name in arguments}
        recipe = replace(recipe_of(arguments["out"]) if arguments["resume"] else Recipe(), **given)
        train(
            arguments["data"],
            arguments["out"],
            recipe,
            pick_device(arguments["device"]),
            resume=arguments["resume"],
            card={key: arguments[option] for key, option in facts.items()},
        )
    except (TrainingError, DataError, ConfigError, DeviceError) as error:
        return _complain(str(error))
    return 0


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=SHIPPED / "fashion-mnist-32",
        help="the folder to look at [weights/fashion-mnist-32]",
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help="what it was trained on: .npz, idx files or a folder; images are compared with its held-out ones "
        "(test_images and test_labels of an .npz, t10k files of idx), else with a fifth of it",
    )
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where quality.md and its plots go [quality]")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("evaluation"),
        help="keeps what is done, so that it can be continued [evaluation]",
    )
    parser.add_argument("--quick", action="store_true", help="fewer images and steps: minutes rather than hours")
    parser.add_argument("--images", type=int, help=f"images of each walk [{Scope().images}; quick {QUICK.images}]")
    parser.add_argument("--part", choices=PARTS, help="measure only this [both]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: dict[str, Any]) -> int:
    scope = QUICK if arguments["quick"] else Scope()
    images = scope.images if arguments["images"] is None else arguments["images"]
    if images < 2:
        return _complain(f"--images = {images}: a distance between clouds needs at least 2 images in each")
    checkpoint, data = arguments["checkpoint"], arguments["data"]
    command = f"unstir evaluate --checkpoint weights/{checkpoint.resolve().name} --data {data.name} --images {images}"
    try:
        page = evaluate(
            checkpoint,
            data,
            arguments["out"],
            arguments["work"],
            replace(scope, images=images),
            pick_device(arguments["device"]),
            parts=(arguments["part"],) if arguments["part"] else PARTS,
            command=command + " --quick" * arguments["quick"],
        )
    except (DataError, CheckpointError, DeviceError) as error:
        return _complain(str(error))
    print(page)
    return 0


def _complain(*reasons: str) -> int:
    for reason in reasons:
        print(f"unstir: {reason}", file=sys.stderr)
    return 2


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "unset" if default is None else str(default)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them, as 32,64,128") from None


if __name__ == "__main__":
    sys.exit(main())
