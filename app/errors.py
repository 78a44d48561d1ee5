"""The tree of errors.

    UnstirError
    ├── BadInput                 the request must change
    │   ├── InvalidJSON          400
    │   ├── InvalidForm          400
    │   ├── InvalidField         422
    │   ├── InvalidHeader        400
    │   ├── NotFound             404
    │   ├── NoSuchJob            404
    │   ├── MethodNotAllowed     405
    │   ├── NotAcceptable        406
    │   ├── NotDone              409
    │   ├── KeyReused            409
    │   ├── Cancelled            410
    │   ├── BodyTooLarge         413
    │   ├── ImageTooLarge      413
    │   └── UnsupportedMedia     415
    ├── TryLater                 the request is fine, the moment is not; carries Retry-After
    │   ├── Overloaded           429
    │   ├── Starting             503
    │   └── Draining             503
    ├── TooLate                  504
    ├── Failed                   we could not do it
    │   ├── EngineDead           503
    │   ├── DeviceMemory         503
    │   ├── NotFinite            500
    │   └── Internal             500
    └── ClientGone               499, only ever seen in metrics and logs

Each is answered as RFC 9457 problem details. ``detail`` names the thing, its value and the remedy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import ClassVar

MAX_FIELDS = 20  # of one answer; a body of nothing but faults should not be answered by a larger one


class UnstirError(Exception):
    """The root; what a client is told.

    Attributes:
        code: stable name of the kind of problem, for programs.
        status: HTTP status.
        title: the kind of problem in a few words.
        meaning: what it means and what to do, for the README.
        headers: to be sent along.
        fields: for several faults at once, (field, value, remedy) of each.
    """

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    meaning: ClassVar[str]

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers: dict[str, str] = {}
        self.fields: list[tuple[str, object, str]] = []


class BadInput(UnstirError):
    """The request must change before it can succeed."""


class InvalidJSON(BadInput):
    """The body does not parse."""

    code, status, title = "invalid_json", 400, "The body is not valid JSON"
    meaning = "The body does not parse as JSON; the detail says where."


class InvalidForm(BadInput):
    """The form does not parse."""

    code, status, title = "invalid_form", 400, "The body is not a valid form"
    meaning = "The body does not parse as multipart/form-data; the detail says why."


class InvalidField(BadInput):
    """One or more fields have values that cannot be."""

    code, status, title = "invalid_field", 422, "A field has an impossible value"
    meaning = "A field is unknown, of the wrong type or out of range; `errors` lists each with its remedy."

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__("")
        self.fields = [(field, value, remedy)]
        self.detail = self._describe()

    @classmethod
    def many(cls, fields: Iterable[tuple[str, object, str]]) -> InvalidField:
        """All faults of one request together; at least one."""
        first, *rest = fields
        error = cls(*first)
        error.fields += rest
        error.detail = error._describe()
        return error

    def _describe(self) -> str:
        told = [f"{field} = {_short(value)}: {remedy}" for field, value, remedy in self.fields[:MAX_FIELDS]]
        more = len(self.fields) - len(told)
        return "; ".join([*told, f"and {more} more faults"] if more else told)


class InvalidHeader(BadInput):
    """A header that cannot be."""

    code, status, title = "invalid_header", 400, "A header has an impossible value"
    meaning = "`X-Request-Timeout-Ms`, `Priority` or `Idempotency-Key` cannot be read; the detail names it."


class NotFound(BadInput):
    """No such path."""

    code, status, title = "not_found", 404, "Nothing lives at this path"
    meaning = "The path is unknown; `/docs` lists those that exist."


class NoSuchJob(BadInput):
    """No such job here, or no longer."""

    code, status, title = "no_such_job", 404, "There is no such job"
    meaning = "The id is unknown: the job was forgotten after `UNSTIR_JOB_SECONDS`, or another process has it."


class MethodNotAllowed(BadInput):
    """The path exists, but not with this verb."""

    code, status, title = "method_not_allowed", 405, "This path does not take that method"
    meaning = "The path exists, but takes another method; the `Allow` header names it."


class NotAcceptable(BadInput):
    """None of the wanted formats is produced."""

    code, status, title = "not_acceptable", 406, "None of the formats asked for can be made"
    meaning = "`Accept` asks for formats that this operation does not make; the detail lists those that it does."


class NotDone(BadInput):
    """The result is not there yet."""

    code, status, title = "not_done", 409, "The job is not done yet"
    meaning = "The result was asked for while the job waits or runs; `GET /jobs/{id}` says how it fares."

    def __init__(self, detail: str, retry_after: float = 1) -> None:
        super().__init__(detail)
        self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class KeyReused(BadInput):
    """The same key for another request."""

    code, status, title = "key_reused", 409, "The idempotency key belongs to another request"
    meaning = "An `Idempotency-Key` came again with another body or to another path; take a new key for a new request."


class Cancelled(BadInput):
    """Somebody cancelled the job."""

    code, status, title = "cancelled", 410, "The job was cancelled"
    meaning = "`DELETE /jobs/{id}` ended it before it was done."


class BodyTooLarge(BadInput):
    """More bytes than this server takes."""

    code, status, title = "body_too_large", 413, "The body is too large"
    meaning = "The body exceeds `UNSTIR_MAX_BODY_BYTES`; it was not read to its end."


class ImageTooLarge(BadInput):
    """More pixels than this server takes."""

    code, status, title = "image_too_large", 413, "The image has too many pixels"
    meaning = "An uploaded image has more than `UNSTIR_MAX_PIXELS`, by its header; it was not decoded."


class UnsupportedMedia(BadInput):
    """The body is of a type that is not read here."""

    code, status, title = "unsupported_media_type", 415, "The body is of a type that is not read here"
    meaning = "Send `application/json` or `multipart/form-data`; to `/invert` a bare `image/*`, too."


class TryLater(UnstirError):
    """Nothing is wrong with the request; ask again after ``Retry-After`` seconds."""

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class Overloaded(TryLater):
    """The queue is full."""

    code, status, title = "overloaded", 429, "The queue is full"
    meaning = (
        "More work waits than `UNSTIR_MAX_QUEUE_SECONDS` allows; in `Retry-After` seconds there is a place for you."
    )


class Starting(TryLater):
    """The network is still being loaded."""

    code, status, title = "starting", 503, "The service is starting"
    meaning = "The network is being loaded and warmed up; `/readyz` says when it is ready."


class Draining(TryLater):
    """The process was told to stop."""

    code, status, title = "draining", 503, "The service is stopping"
    meaning = "The process finishes what it has accepted and takes nothing new; ask another replica."


class TooLate(UnstirError):
    """The deadline has passed, or will have."""

    code, status, title = "too_late", 504, "The deadline cannot be met"
    meaning = "The time of `X-Request-Timeout-Ms` or `UNSTIR_MAX_REQUEST_SECONDS` is over, or known to be too short."


class Failed(UnstirError):
    """The request was fine and the service could not do it."""


class EngineDead(Failed):
    """The device thread has ended."""

    code, status, title = "engine_dead", 503, "The engine has failed"
    meaning = (
        "The device failed; every waiting request is answered so, `/readyz` says why, the process must be restarted."
    )

    def __init__(self, detail: str, retry_after: float = 10) -> None:  # about what a restart takes
        super().__init__(detail)
        self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class DeviceMemory(Failed):
    """The device is too small for the width that was promised."""

    code, status, title = "device_memory", 503, "The device ran out of memory"
    meaning = (
        "`reproducible` needs forwards of `UNSTIR_REPRODUCIBLE_WIDTH` rows, `guidance` those of 2, and the device has "
        "no room for them."
    )


class NotFinite(Failed):
    """The walk ended in NaN or infinity."""

    code, status, title = "not_finite", 500, "The walk left the real numbers"
    meaning = "The network gave NaN or infinity for this request alone; another seed or more steps may help."


class Internal(Failed):
    """A defect of ours."""

    code, status, title = "internal", 500, "This is a bug"
    meaning = "A defect in Unstir; the log has the traceback under the same request id."


class ClientGone(UnstirError):
    """The client hung up; nobody reads this answer."""

    code, status, title = "client_gone", 499, "The client hung up"
    meaning = "Never sent: the label under which metrics and logs count requests whose client hung up."


def catalogue() -> list[type[UnstirError]]:
    """Every error that can be answered, in the order of the tree."""

    def leaves(kind: type[UnstirError]) -> list[type[UnstirError]]:
        below = kind.__subclasses__()
        return [leaf for child in below for leaf in leaves(child)] if below else [kind]

    return leaves(UnstirError)


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
