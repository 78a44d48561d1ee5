"""``unstir sample``, ``invert``, ``interpolate``, ``replay`` and ``call``: the endpoints, without a server."""

from __future__ import annotations

import base64
import inspect
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from pydantic import BaseModel

from app.api.responses import formats
from app.cli import in_process, replaying
from app.cli.flags import as_flags, flags_of, given, read, with_flags
from app.cli.serve import read_settings
from app.cli.terminal import CommandError, fault, flag, program
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.settings import SHIPPED, Settings
from model.checkpoint import sha256_on_card

SUFFIXES = {
    ".png": formats.PNG,
    ".webp": formats.WEBP,
    ".jpg": formats.JPEG,
    ".jpeg": formats.JPEG,
    ".gif": formats.GIF,
    ".apng": formats.APNG,
    ".json": formats.JSON,
    ".npy": formats.NPY,
    ".zip": formats.ZIP,
}
STDOUT = Path("-")
URL = inspect.Parameter(
    "url",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(help="Address of a running service to ask instead of loading a network: http://localhost:8000."),
    ],
)
SERVICE = [URL, *flags_of(Settings, only=("checkpoint", "device", "threads"))]
ARGUMENTS = {"image": "IMAGE", "latents": "LATENTS", "a": "LATENTS", "b": "LATENTS"}  # fields that are not flags
Part = tuple[str, tuple[str | None, str | bytes]]  # of a form: the field, and its file's name or None for text

OUT = typer.Option(
    "--out", "-o", help=f"File to write, in the format of its suffix: {', '.join(SUFFIXES)}; - is standard output."
)
Out = Annotated[Path, OUT]
OptionalOut = Annotated[Path | None, OUT]


@with_flags(flags_of(SampleRequest, without={"latent"}), SERVICE)
def sample(
    latent: Annotated[
        str | None,
        typer.Option(
            metavar="<seed|file>", help="Starting latent: a seed, a .npy file, or an image, which is inverted first."
        ),
    ] = None,
    out: Out = Path("sample.png"),
    **flags: Any,
) -> int:
    accept = _format(out, ".png")
    parts = _text_parts(SampleRequest, flags)
    if latent is not None:
        parts.append(_latent_part("latent", latent))
    answer = in_process.post(_service(flags), "/sample", accept, name=_name, files=parts)
    _write(out, answer.content)
    seed = f"seed {answer.headers['x-seed']}, " if "x-seed" in answer.headers else ""
    print(f"{out}: {seed}{answer.headers['x-nfe']} evaluations", file=_messages(out))
    return 0


@with_flags(flags_of(InvertRequest, without={"image"}), SERVICE)
def invert(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG, WebP, GIF, HEIC or AVIF.")],
    out: OptionalOut = None,
    **flags: Any,
) -> int:
    out = out or image.with_suffix(".npy")
    accept = _format(out, ".npy")
    parts = [*_text_parts(InvertRequest, flags, image=b""), ("image", (image.name, _read(image)))]
    measured = accept in (formats.NPY, formats.JSON)
    answer = in_process.post(_service(flags), "/invert", formats.JSON if measured else accept, name=_name, files=parts)
    if not measured:
        _write(out, answer.content)
        print(f"{out}: {answer.headers['x-nfe']} evaluations", file=_messages(out))
        return 0
    found = answer.json()
    _write(out, base64.b64decode(found["latent"]) if accept == formats.NPY else answer.content)
    lines = [f"{out}: {found['method']}, {found['steps']} steps, {found['nfe']} evaluations"]
    names = [name for name in ("psnr", "max_error", "exact", "residual", "norm") if name in found]
    lines.append("  " + ", ".join(f"{name} {found[name]:.4g}" for name in names))
    lines += [f"  {warning}" for warning in found.get("warnings", [])]
    if accept == formats.NPY and out != STDOUT:
        service = {name: flags[name] for name in ("url", "checkpoint") if flags[name]}
        decoding = as_flags({"latent": out, **found["decode"], **service})
        lines += ["back to the image:", "  " + shlex.join([*program(), "sample", *decoding, "-o", "back.png"])]
    print("\n".join(lines), file=_messages(out))
    return 0


@with_flags(flags_of(InterpolateRequest, without={"a", "b", "latents"}), SERVICE)
def interpolate(
    latents: Annotated[list[str], typer.Argument(help="Seeds, .npy files or images: 2, or up to 8 to be blended.")],
    out: Out = Path("interpolate.png"),
    **flags: Any,
) -> int:
    accept = _format(out, ".png")
    pair = len(latents) == 2 and flags["weights"] is None
    names = ["a", "b"] if pair else ["latents"] * len(latents)
    counted = {"a": 0, "b": 0} if pair else {"latents": [0] * len(latents)}
    parts = _text_parts(InterpolateRequest, flags, **counted)
    parts += [_latent_part(name, latent) for name, latent in zip(names, latents, strict=True)]
    answer = in_process.post(_service(flags), "/interpolate", accept, name=_name, files=parts)
    _write(out, answer.content)
    print(f"{out}: {answer.headers['x-nfe']} evaluations per image", file=_messages(out))
    return 0


@with_flags(SERVICE)
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG that Unstir made.")],
    file: Annotated[
        list[Path] | None,
        typer.Option(help="A file that it was made of, if it was made of any; several times for several."),
    ] = None,
    out: OptionalOut = None,
    **flags: Any,
) -> int:
    content = _read(image)
    made = replaying.read(image, content)
    if flags["url"] is None:
        flags["checkpoint"] = flags["checkpoint"] or _checkpoint_of(made.sha256)
    service = _service(flags)
    if _served_sha256(service) != made.sha256:
        named = f"{made.facts.get('model')} (sha256 {made.sha256[:12]}...)"
        raise CommandError(f"{image}: it was made by {named}; say where that is with --checkpoint or --url")
    request, size = replaying.put_files(image, made.request, {path: _read(path) for path in file or ()})
    if isinstance(service, Settings):
        service = service.model_copy(update={"max_body_bytes": service.max_body_bytes + size})
    answer = in_process.post(service, made.operation, made.accept, name=_name, json=request)
    if out:
        _write(out, answer.content)
    difference = replaying.describe_difference(content, answer.content)
    print(f"{image}: {f'other bytes: {difference}' if difference else 'the same bytes again'}", file=_messages(out))
    return 1 if difference else 0


@with_flags(SERVICE)
def call(
    method: Annotated[str, typer.Argument(help="GET, POST, ...")],
    path: Annotated[str, typer.Argument(help="/sample, /model, ...")],
    body: Annotated[str | None, typer.Argument(help="JSON.")] = None,
    accept: Annotated[str | None, typer.Option(help="Media type of the answer, by default that of --out.")] = None,
    out: OptionalOut = None,
    **flags: Any,
) -> int:
    headers = {"accept": accept or (_format(out, "") if out and out != STDOUT else "*/*")}
    content = {"content": body.encode()} if body else {}
    if body:
        headers["content-type"] = "application/json"
    answer = in_process.request(_service(flags), method.upper(), path, headers, **content)
    if out and out != STDOUT and answer.is_success:
        _write(out, answer.content)
        return 0
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/") or "json" in kind:
        print(answer.text, file=sys.stdout if answer.is_success else sys.stderr)
    elif sys.stdout.isatty() and not out:
        raise CommandError(f"the answer is {kind}; write it to a file with --out")
    else:
        sys.stdout.buffer.write(answer.content)
    return 0 if answer.is_success else 1


def _service(flags: dict[str, Any]) -> Settings | str:
    """Settings of a service in this process, or the address of one that runs.

    Raises:
        CommandError: both were typed.
    """
    if flags["url"] is None:
        return read_settings(flags)
    for name in ("checkpoint", "device", "threads"):
        if flags[name] is not None:
            raise CommandError(fault(flag(name), flags[name], "the server at --url has its own; leave one of them out"))
    return str(flags["url"])


def _text_parts(model: type[BaseModel], flags: dict[str, Any], **arguments: Any) -> list[Part]:
    """The flags as parts of a form, validated before the network is loaded.

    Args:
        arguments: stand for those fields that are not flags.
    """
    read(model, flags | arguments, _name)
    fields = given(model, flags)
    return [(name, (None, value if isinstance(value, str) else json.dumps(value))) for name, value in fields.items()]


def _latent_part(name: str, latent: str) -> Part:
    """A number is a seed, all else a file."""
    return name, (None, latent) if latent.isdecimal() else (Path(latent).name, _read(Path(latent)))


def _name(field: str) -> str:
    """How the user knows a field of a request, or of what is nested in it."""
    outermost = field.partition(".")[0]
    return ARGUMENTS.get(outermost, flag(outermost))


def _format(out: Path, default: str) -> str:
    """The media type that a file's name asks for."""
    suffix = default if out == STDOUT else out.suffix.lower()
    if suffix not in SUFFIXES:
        raise CommandError(fault("--out", out, f"choose a suffix of {', '.join(SUFFIXES)}"))
    return SUFFIXES[suffix]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error


def _write(out: Path, content: bytes) -> None:
    if out == STDOUT:
        sys.stdout.buffer.write(content)
        return
    try:
        out.write_bytes(content)
    except OSError as error:
        raise CommandError(fault("--out", out, str(error.strerror))) from error


def _messages(out: Path | None) -> TextIO:
    """Where messages go: not between the bytes of a file."""
    return sys.stderr if out == STDOUT else sys.stdout


def _checkpoint_of(sha256: str) -> str | None:
    """That of the settings, or one of those that ship; None if neither has these weights."""
    if sha256_on_card(read_settings({}).checkpoint) == sha256:
        return None
    return next((str(folder) for folder in sorted(SHIPPED.iterdir()) if sha256_on_card(folder) == sha256), None)


def _served_sha256(service: Settings | str) -> str:
    if isinstance(service, Settings):
        return sha256_on_card(service.checkpoint)
    try:
        return str(in_process.request(service, "GET", "/model", {}).json()["sha256"])
    except (ValueError, KeyError):
        return ""
