"""Flags derived from a pydantic model, in which name, type, choices, default, range and text stand once.

The parser only collects what was typed; the model validates it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from app.cli.terminal import describe, flag, shown

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=BaseModel)
Schema = Mapping[str, Any]
METAVARS = {"integer": "<int>", "number": "<float>", "array": "<a,b,...>", "path": "<path>", "boolean": None}


def with_flags(*groups: Sequence[inspect.Parameter]) -> Callable[[F], F]:
    """Put flags in the place of a command's ``**keywords``, which then holds those that were typed, or None."""

    def decorate(command: F) -> F:
        declared = inspect.signature(command, eval_str=True)
        own = [each for each in declared.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *(each for group in groups for each in group)]
        command.__signature__ = declared.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def flags_of(
    model: type[BaseModel], only: Collection[str] | None = None, without: Collection[str] = (), environment: str = ""
) -> list[inspect.Parameter]:
    """A flag for each field of a model.

    Args:
        only, without: names of fields.
        environment: prefix of the variables that set the same fields, to be named in the help.
    """
    names = [name for name in only or model.model_fields if name not in without]
    properties = model.model_json_schema()["properties"]
    return [_flag(name, model, properties[name], environment) for name in names]


def _flag(name: str, model: type[BaseModel], declared: Schema, environment: str) -> inspect.Parameter:
    schema = _without_null(declared)
    kind, choices = schema.get("type"), schema.get("enum", [])
    field = model.model_fields[name]
    facts = ["" if field.is_required() else _default(name, field.default), _range(schema)]
    facts.append(f"{environment}{name.upper()}" if environment else "")
    brackets = "; ".join(filter(None, facts))

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    option = typer.Option(
        f"{flag(name)}/{flag(f'no_{name}')}" if kind == "boolean" else flag(name),
        help=_text(declared.get("description", ""), model) + (f"  [{brackets}]" if brackets else ""),
        metavar=f"<{'|'.join(choices)}>" if choices else METAVARS.get(schema.get("format", kind), "<text>"),
        autocompletion=complete if choices else None,
        show_default=False,
    )
    typed: Any = bool if kind == "boolean" else str
    default = inspect.Parameter.empty if field.is_required() else None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[typed | None, option]
    )


def _without_null(schema: Schema) -> Schema:
    """The one thing that an optional field may be besides null; of a union nothing is said."""
    members = [member for member in schema.get("anyOf", [schema]) if member.get("type") != "null"]
    return members[0] if len(members) == 1 else {}


def _default(name: str, default: object) -> str:
    if default in (None, ""):
        return ""
    if isinstance(default, bool):
        return f"default: {name if default else 'no-' + name}".replace("_", "-")
    return f"default: {shown(default)}"


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{shown(low)} to {shown(high)}"
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    bounds = {"from": low, "up to": high, "above": above, "below": below}
    return " and ".join(f"{word} {shown(bound)}" for word, bound in bounds.items() if bound is not None)


def _text(description: str, model: type[BaseModel]) -> str:
    """The first paragraph, with fields named as flags. Later ones explain choices and are for documents."""
    paragraph = description.partition("\n\n")[0]
    return re.sub(r"`([^`]+)`", lambda match: flag(match[1]) if match[1] in model.model_fields else match[1], paragraph)


def read(model: type[M], flags: Mapping[str, Any], name: Callable[[str], str] = flag) -> M:
    """The model of the flags that were typed.

    Args:
        name: how the user knows a field.

    Raises:
        CommandError: with each flag, its value and the remedy.
    """
    try:
        return model.model_validate(given(model, flags), strict=False)
    except ValidationError as error:
        raise describe(error, model, name) from error


def given(model: type[BaseModel], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's fields that were typed; a list is ``1,2,3``, or JSON where an item has a comma in it."""
    properties = model.model_json_schema()["properties"]
    values = {name: value for name, value in flags.items() if value is not None and name in properties}
    lists = [name for name, value in values.items() if _is_list(properties[name]) and isinstance(value, str)]
    return values | {name: _items(values[name]) for name in lists}


def _is_list(schema: Schema) -> bool:
    return _without_null(schema).get("type") == "array"


def _items(text: str) -> list[Any]:
    if text.startswith("["):
        try:
            return list(json.loads(text))
        except ValueError:
            pass  # the model says what is wrong with it
    return text.split(",")


def as_flags(values: Mapping[str, object]) -> list[str]:
    """Fields as they are typed, before a shell's quotes."""
    return [
        flag(name if value else f"no_{name}") if isinstance(value, bool) else f"{flag(name)}={value}"
        for name, value in values.items()
    ]
