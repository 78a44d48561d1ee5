"""The command ``unstir``: its subcommands, and its exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from app import __version__
from app.cli.terminal import CommandError, accept_any_encoding, complain

COMMANDS = {
    "serve": ("app.cli.serve", "Serve a checkpoint over HTTP."),
    "sample": ("app.cli.local", "Sample images."),
    "invert": ("app.cli.local", "Encode an image into its latent."),
    "interpolate": ("app.cli.local", "Sample images between images, latents or seeds."),
    "replay": ("app.cli.local", "Sample a PNG again from the request in it, and compare the bytes."),
    "call": ("app.cli.local", "Send one HTTP request to a service in this process."),
    "train": ("app.cli.train", "Train a network on a folder of images, an .npz or idx files."),
    "evaluate": ("app.cli.evaluate", "Measure the images of a checkpoint, by sampler and steps."),
    "loadtest": ("app.cli.loadtest.command", "Measure a running server under load."),
    "simulate": ("app.cli.simulation.command", "Compare scheduling policies on simulated traffic."),
}
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


class LazyGroup(TyperGroup):
    """Imports a subcommand when it is called: most of them need torch, which takes seconds, and their list does not."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in COMMANDS else placeholder, rest


def _load(name: str) -> Any:
    module, help_text = COMMANDS[name]
    only = typer.Typer(add_completion=False, **PLAIN)
    only.command(name, help=help_text)(getattr(import_module(module), name))
    return get_command(only)


app = typer.Typer(
    cls=LazyGroup,
    help="Serve, use, train and evaluate pixel-space diffusion models.",
    context_settings={"max_content_width": 120},
    **PLAIN,
)
for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"unstir {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    accept_any_encoding()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = get_command(app).main(arguments or ["--help"], prog_name="unstir", standalone_mode=False)
    except CommandError as error:
        return complain(error)
    except typer.TyperException as error:
        return complain(_unparsed(error))
    return int(status or 0) if arguments else 2


def _unparsed(error: typer.TyperException) -> CommandError:
    """What the parser refused, with the flag first where there is one."""
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    what = error.format_message()
    if isinstance(error, typer.BadParameter) and parameter is not None and error.message:
        what = f"{parameter.opts[0]}: {error.message}"
    return CommandError(what, f"see {context.command_path} --help" if context else "see unstir --help")
