"""What every operation's result can show, and what it says of how it was made."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from app import __version__
from app.api.responses.schemas import Timing
from app.operations.context import Usage
from app.operations.resolve import ResolvedRequest
from model.checkpoint import Card
from model.diffusion.plan import Plan

NO_TRAJECTORY = "an animation shows a trajectory; ask for one of some frames, or for image/png"


class OperationResult(ABC):
    """What an operation has to show, as plain data. Its methods encode, so call them off the event loop."""

    @property
    @abstractmethod
    def usage(self) -> Usage: ...

    @property
    @abstractmethod
    def image_count(self) -> int:
        """How many images were asked for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that its tensors take."""

    @property
    @abstractmethod
    def headers(self) -> dict[str, str]:
        """Of the response in any format."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of a file that holds it, without suffix."""

    @abstractmethod
    def still(self) -> tuple[np.ndarray, int | None]:
        """uint8 [n, H, W, C], and the columns to lay them out in; raises NotAcceptable with the reason."""

    @abstractmethod
    def animation(self) -> np.ndarray:
        """The frames, uint8 [k, H, W, C]; raises NotAcceptable with the reason."""

    @property
    @abstractmethod
    def array(self) -> Tensor:
        """float32, unrounded."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """Text chunks of the still image and the APNG: the request that gives it again."""

    @abstractmethod
    def body(self, timing: Timing) -> BaseModel:
        """The JSON form."""

    def files(self) -> dict[str, bytes]:
        """Names and contents of the archive."""
        return {}


def join_name(*parts: object) -> str:
    """A file's name of these parts, in ASCII; None is left out."""
    text = "-".join(str(part) for part in parts if part is not None)
    return re.sub(r"[^A-Za-z0-9.]+", "-", unicodedata.normalize("NFKD", text)).strip("-.")[:100]


def describe_plan(resolved: ResolvedRequest[Any], card: Card) -> dict[str, Any]:
    """NFE and plan, and the network that executed it: fields of :class:`SamplingResponse`."""
    return {"nfe": resolved.nfe, "plan": resolved.plan.digest, "model": card.name, "sha256": card.sha256}


def embed_request(operation: str, request: BaseModel, nfe: int, plan: Plan, card: Card) -> dict[str, str]:
    """The PNG text chunk ``unstir``: the request, and the network that answered it."""
    facts = {
        "operation": operation,
        "request": request.model_dump(mode="json", exclude_none=True),
        "nfe": nfe,
        "plan": plan.digest,
        "model": card.name,
        "sha256": card.sha256,
        "version": __version__,
    }
    return {"unstir": json.dumps(facts, ensure_ascii=False)}


def to_request_json(operation: str, request: BaseModel) -> bytes:
    """The archive's ``request.json``."""
    content = {"operation": operation, "request": request.model_dump(mode="json", exclude_none=True)}
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
