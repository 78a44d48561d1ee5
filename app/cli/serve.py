"""``unstir serve``, and the settings as flags, which the commands without a server take, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.cli.flags import flags_of, given, with_flags
from app.cli.terminal import CommandError, describe, fault, flag
from app.settings import Settings

PREFIX = str(Settings.model_config["env_prefix"])


@with_flags(flags_of(Settings, environment=PREFIX))
def serve(**flags: Any) -> int:
    settings = read_settings(flags)
    from app.api import server  # noqa: PLC0415 - torch takes seconds, and neither help nor a wrong flag needs it

    return server.serve(settings)


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """The settings of the environment and the flags, if they can be served here.

    Raises:
        CommandError: a value that cannot be, no such checkpoint, no such device.
    """
    try:
        settings = Settings(**given(Settings, flags))  # the constructor reads the environment, validation would not
    except ValidationError as error:
        raise describe(error, Settings, setting_name) from error
    if not settings.checkpoint.is_dir():
        remedy = "no such folder"
        if settings.checkpoint.exists():
            from model.checkpoint import describe_part  # noqa: PLC0415 - as above

            remedy = describe_part(settings.checkpoint)
        raise CommandError(fault(setting_name("checkpoint"), settings.checkpoint, remedy))
    from app.engine.loading import select_device_for  # noqa: PLC0415 - as above
    from model.device import DeviceError  # noqa: PLC0415 - as above

    try:
        select_device_for(settings)
    except DeviceError as error:
        raise CommandError(fault(setting_name(error.setting), error.value, error.remedy)) from error
    return settings


def setting_name(name: str) -> str:
    """Both names of a setting."""
    return f"{flag(name)} ({PREFIX}{name.upper()})"
