"""The stories on the command line, without a server: each is a request to the same application, in this process."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from app.api.app import create_app
from app.api.responses import formats
from app.engine.loading import select_device_for as device_of
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.settings import SHIPPED, Settings
from model.device import DeviceError
from model.images import ImageError, text_of

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
Arguments = dict[str, Any]
Parts = list[tuple[str, tuple[str | None, str | bytes]]]  # of a form: the field, and its file's name or None for text


class CommandError(Exception):
    """What the user is told, instead of an answer."""


def add_all(commands: Any) -> None:
    """Add every command of this module to the parser's."""
    parser = commands.add_parser("sample", help="draw images")
    _add_fields(parser, SampleRequest, "sample.png")
    parser.set_defaults(run=_sample)
    parser = commands.add_parser("invert", help="encode an image into its latent")
    parser.add_argument("image", type=Path, help="PNG, JPEG, WebP or GIF")
    _add_fields(parser, InvertRequest, "the image's name with .npy", {"image"})
    parser.set_defaults(run=_invert)
    parser = commands.add_parser("interpolate", help="draw what lies between images, latents or seeds")
    parser.add_argument("ends", nargs="+", help="2 ends of a way, or up to 8 to be blended: images, .npy or seeds")
    _add_fields(parser, InterpolateRequest, "interpolate.png", {"a", "b", "latents"})
    parser.set_defaults(run=_interpolate)
    parser = commands.add_parser("replay", help="draw a PNG of ours again, from what it says of itself")
    parser.add_argument("image", type=Path)
    _add_common(parser, "nowhere: only say whether its bytes are the same")
    parser.set_defaults(run=_replay)
    parser = commands.add_parser("call", help="send one HTTP request to a service in this process")
    parser.add_argument("method", help="GET, POST, …")
    parser.add_argument("path", help="/sample, /model, …")
    parser.add_argument("body", nargs="?", help="JSON")
    parser.add_argument("--accept", help="media type of the answer [what --out ends in]")
    _add_common(parser, "standard output")
    parser.set_defaults(run=_call)


def _add_common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("-o", "--out", type=Path, help=f"file to write, of the kind that its name ends in [{out}]")
    for name in ("checkpoint", "device", "threads"):
        text = str(Settings.model_fields[name].description)
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"))


def _add_fields(
    parser: argparse.ArgumentParser, model: type[BaseModel], out: str, elsewhere: Iterable[str] = ()
) -> None:
    for name, field in model.model_fields.items():
        if name in elsewhere:
            continue
        text = str(field.description).partition("\n")[0].replace("%", "%%")
        if name == "latent":
            text = "where the walk begins: a seed, a .npy, or an image, which is encoded first"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    _add_common(parser, out)


def _sample(arguments: Arguments) -> int:
    out = arguments["out"] or Path("sample.png")
    parts = _parts(arguments, SampleRequest, {"latent"})
    if "latent" in arguments:
        parts.append(_end("latent", arguments["latent"]))
    answer = _asked(arguments, "/sample", files=parts, accept=_kind(out))
    _write(out, answer.content)
    seed = f"seed {answer.headers['x-seed']}, " if "x-seed" in answer.headers else ""
    print(f"{out}: {seed}{answer.headers['x-nfe']} evaluations")
    return 0


def _invert(arguments: Arguments) -> int:
    image: Path = arguments["image"]
    out: Path = arguments["out"] or image.with_suffix(".npy")
    parts = [*_parts(arguments, InvertRequest), ("image", (image.name, _bytes(image)))]
    kind = _kind(out)
    derived = kind in (formats.JSON, formats.NPY)
    answer = _asked(arguments, "/invert", files=parts, accept=formats.JSON if derived else kind)
    if not derived:
        _write(out, answer.content)
        print(f"{out}: {answer.headers['x-nfe']} evaluations")
        return 0
    told = answer.json()
    latent = base64.b64decode(told["latent"])
    _write(out, latent if kind == formats.NPY else answer.content)
    print(f"{out}: {told['method']}, {told['steps']} steps, {told['nfe']} evaluations")
    measured = ("psnr", "max_error", "exact", "residual", "norm")
    print("  " + ", ".join(f"{name} {told[name]:.4g}" for name in measured if name in told))
    for warning in told.get("warnings", []):
        print(f"  {warning}")
    if kind == formats.NPY:
        decode = {"latent": str(out), **told["decode"]}
        flags = [f"--{name.replace('_', '-')}={_text(value)}" for name, value in decode.items()]
        named = [f"--checkpoint={arguments['checkpoint']}"] if "checkpoint" in arguments else []
        print("back to the image:\n  " + shlex.join(["unstir", "sample", *flags, *named, "-o", "back.png"]))
    return 0


def _interpolate(arguments: Arguments) -> int:
    out = arguments["out"] or Path("interpolate.png")
    ends: list[str] = arguments["ends"]
    names = ["latents"] * len(ends) if len(ends) != 2 or "weights" in arguments else ["a", "b"]
    parts = _parts(arguments, InterpolateRequest) + [_end(name, end) for name, end in zip(names, ends, strict=True)]
    answer = _asked(arguments, "/interpolate", files=parts, accept=_kind(out))
    _write(out, answer.content)
    print(f"{out}: {answer.headers['x-nfe']} evaluations an image")
    return 0


def _replay(arguments: Arguments) -> int:
    path: Path = arguments["image"]
    content = _bytes(path)
    try:
        facts = json.loads(text_of(content)["unstir"])
        operation, request, sha256 = facts["operation"], facts["request"], facts["sha256"]
    except ImageError as error:
        raise CommandError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError):
        raise CommandError(f"{path}: it does not say how it was made; PNGs that Unstir answers with do") from None
    if "checkpoint" not in arguments:
        cards = {_sha256(folder): folder for folder in (Settings().checkpoint, *sorted(SHIPPED.iterdir()))}
        arguments["checkpoint"] = cards.get(sha256, Settings().checkpoint)
    if _sha256(arguments["checkpoint"]) != sha256:
        named = f"{facts.get('model')} (sha256 {sha256[:12]}…)"
        raise CommandError(f"{path}: it was made by {named}; say where that is with --checkpoint")
    accept = formats.APNG if b"acTL" in content else formats.PNG
    answer = _asked(arguments, operation, json=request, accept=accept)
    if arguments["out"]:
        _write(arguments["out"], answer.content)
    same = answer.content == content
    told = "the same bytes again" if same else "other bytes: another device, dtype, version or number of threads"
    print(f"{path}: {told}")
    return 0 if same else 1


def _call(arguments: Arguments) -> int:
    out = arguments["out"]
    accept = arguments["accept"] or (_kind(out) if out else "*/*")
    body = arguments["body"]
    given = {"content": body.encode(), "headers": {"content-type": "application/json"}} if body else {}
    answer = asyncio.run(_ask(_settings(arguments), arguments["method"].upper(), arguments["path"], accept, **given))
    if out and answer.is_success:
        _write(out, answer.content)
        return 0
    stream = sys.stdout if answer.is_success else sys.stderr
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/") or "json" in kind:
        print(answer.text, file=stream)
    elif sys.stdout.isatty():
        raise CommandError(f"the answer is {kind}; write it to a file with --out")
    else:
        sys.stdout.buffer.write(answer.content)
    return 0 if answer.is_success else 1


def _asked(arguments: Arguments, path: str, *, accept: str, **body: Any) -> httpx.Response:
    """The answer to a POST.

    Raises:
        CommandError: it was refused, with what the service says of it.
    """
    answer = asyncio.run(_ask(_settings(arguments), "POST", path, accept, **body))
    if not answer.is_success:
        raise CommandError(answer.json()["detail"])
    return answer


async def _ask(settings: Settings, method: str, path: str, accept: str, **body: Any) -> httpx.Response:
    app = create_app(settings)
    service = app.state.lifecycle
    headers = {"accept": accept, **body.pop("headers", {})}
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://unstir", timeout=None) as client,
    ):
        while service.loading:
            await asyncio.sleep(0.01)
        if service.failure:
            raise CommandError(service.failure)
        return await client.request(method, path, headers=headers, **body)


def _settings(arguments: Arguments) -> Settings:
    given = {name: arguments[name] for name in ("checkpoint", "device", "threads") if name in arguments}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise CommandError("; ".join(f"--{f['loc'][0]} = {f['input']}: {f['msg']}" for f in faults)) from error
    if not settings.checkpoint.is_dir():
        raise CommandError(f"--checkpoint = {settings.checkpoint}: no such folder")
    try:
        device_of(settings)
    except DeviceError as error:
        raise CommandError(f"--{error}") from error
    return settings


def _parts(arguments: Arguments, model: type[BaseModel], elsewhere: Iterable[str] = ()) -> Parts:
    given = [name for name in model.model_fields if name in arguments and name not in elsewhere]
    return [(name, (None, str(arguments[name]))) for name in given]


def _end(name: str, end: str) -> tuple[str, tuple[str | None, str | bytes]]:
    """A number is a seed, all else a file."""
    return name, (None, end) if end.isdecimal() else (Path(end).name, _bytes(Path(end)))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CommandError(f"--out = {path}: {error.strerror}") from error


def _kind(path: Path) -> str:
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise CommandError(f"--out = {path}: let its name end in one of {', '.join(SUFFIXES)}")
    return kind


def _sha256(folder: Path) -> str:
    try:
        return str(json.loads((Path(folder) / "card.json").read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        return ""


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
