"""The tree of errors.

    UnstirError
    ├── BadInput                 the request must change
    │   ├── InvalidHTTP          400
    │   ├── InvalidJSON          400
    │   ├── InvalidForm          400
    │   ├── InvalidField         422
    │   ├── InvalidHeader        400
    │   ├── ForeignOrigin        403
    │   ├── NotFound             404
    │   ├── NoSuchJob            404
    │   ├── MethodNotAllowed     405
    │   ├── NotAcceptable        406
    │   ├── SlowRequest          408
    │   ├── NotDone              409
    │   ├── KeyReused            409
    │   ├── Cancelled            410
    │   ├── BodyTooLarge         413
    │   ├── ImageTooLarge        413
    │   └── UnsupportedMedia     415
    ├── TryLater                 the request is fine, the moment is not; has Retry-After
    │   ├── Overloaded           429
    │   ├── TooManyConnections   503
    │   ├── Starting             503
    │   └── Draining             503
    ├── TooLate                  504
    ├── Failed                   the service could not do it
    │   ├── EngineDead           503
    │   ├── DeviceMemory         503
    │   ├── NotFinite            500
    │   ├── StepFailed           500
    │   └── Internal             500
    └── ClientGone               499, only in metrics and logs

Each is sent as RFC 9457 problem details. ``detail`` names the thing, its value and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

from app.errors.wording import word_fault

MAX_FAULTS = 20  # listed in one response, which must not be larger than the body that it is about


class UnstirError(Exception):
    """The root of the tree.

    Attributes:
        code: stable name, for programs.
        status: HTTP status.
        title: in a few words.
        meaning: what it means and what to do, for the documentation.
        headers: of the response.
        fields: for several faults at once, (field, value, remedy) of each; :mod:`app.errors.wording` has values for
            what is missing, or not echoed.
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


class InvalidHTTP(BadInput):
    code, status, title = "invalid_http", 400, "Invalid HTTP"
    meaning = "The request is not HTTP as RFC 9112 has it, or ambiguous; the connection is closed."

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.headers["Connection"] = "close"


class InvalidJSON(BadInput):
    code, status, title = "invalid_json", 400, "Invalid JSON"
    meaning = "The body is not valid JSON; the detail says where."


class InvalidForm(BadInput):
    code, status, title = "invalid_form", 400, "Invalid form"
    meaning = "The body is no valid form, multipart or urlencoded; the detail says why."


class InvalidField(BadInput):
    code, status, title = "invalid_field", 422, "Invalid field"
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
        parts = [word_fault(*fault) for fault in self.fields[:MAX_FAULTS]]
        more = len(self.fields) - len(parts)
        return "; ".join([*parts, f"and {more} more faults"] if more else parts)


class InvalidHeader(BadInput):
    code, status, title = "invalid_header", 400, "Invalid header"
    meaning = "`X-Request-Timeout-Ms` or `Idempotency-Key` cannot be read; the detail names it."


class ForeignOrigin(BadInput):
    code, status, title = "foreign_origin", 403, "Foreign origin"
    meaning = (
        "A page of another site sent the request; `UNSTIR_CORS_ORIGINS` names the sites that may "
        "([operations.md](operations.md#browsers-and-proxies))."
    )


class NotFound(BadInput):
    code, status, title = "not_found", 404, "Not found"
    meaning = "There is no such path; `/docs` lists those that exist."


class NoSuchJob(BadInput):
    code, status, title = "no_such_job", 404, "No such job"
    meaning = (
        "The id is unknown: the job has expired after `UNSTIR_JOB_SECONDS`, was evicted, or belongs to another process."
    )


class MethodNotAllowed(BadInput):
    code, status, title = "method_not_allowed", 405, "Method not allowed"
    meaning = "The path exists, but takes another method; the `Allow` header names it."


class NotAcceptable(BadInput):
    code, status, title = "not_acceptable", 406, "Not acceptable"
    meaning = "`Accept` names no format that this request can have; the detail lists those that it can."


class SlowRequest(BadInput):
    code, status, title = "slow_request", 408, "The request did not arrive in time"
    meaning = (
        "Headers must arrive within `UNSTIR_HEADER_SECONDS`, the body within `UNSTIR_BODY_SECONDS`; the connection is "
        "closed."
    )

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.headers["Connection"] = "close"


class NotDone(BadInput):
    code, status, title = "not_done", 409, "The job is not done"
    meaning = "The job is waiting or running; `GET /jobs/{id}` shows its progress, `Retry-After` when to ask again."

    def __init__(self, detail: str, retry_after: float = 1) -> None:
        super().__init__(detail)
        self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class KeyReused(BadInput):
    code, status, title = "key_reused", 409, "Idempotency key reused"
    meaning = "This `Idempotency-Key` was sent with another request before; use a new key for each new request."


class Cancelled(BadInput):
    code, status, title = "cancelled", 410, "The job was cancelled"
    meaning = "`DELETE /jobs/{id}` cancelled it before it was done."


class BodyTooLarge(BadInput):
    code, status, title = "body_too_large", 413, "The body is too large"
    meaning = "The body exceeds `UNSTIR_MAX_BODY_BYTES`; the rest of it was not read."


class ImageTooLarge(BadInput):
    code, status, title = "image_too_large", 413, "The image is too large"
    meaning = "An uploaded image has more than `UNSTIR_MAX_PIXELS`, judged by its header; it was not decoded."


class UnsupportedMedia(BadInput):
    code, status, title = "unsupported_media_type", 415, "Unsupported media type"
    meaning = (
        "Send `application/json`, `multipart/form-data` or `application/x-www-form-urlencoded`; `/invert` also takes a "
        "bare `image/*`."
    )


class TryLater(UnstirError):
    """Nothing is wrong with the request; ask again after ``Retry-After`` seconds."""

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class Overloaded(TryLater):
    code, status, title = "overloaded", 429, "The queue is full"
    meaning = (
        "More work waits than `UNSTIR_MAX_QUEUE_SECONDS`; after `Retry-After` seconds the same request is admitted, or "
        "if the detail says that no place can be kept, may be."
    )


class TooManyConnections(TryLater):
    code, status, title = "too_many_connections", 503, "All connections are taken"
    meaning = "`UNSTIR_MAX_CONNECTIONS` are open, and none is idle; the connection is closed."


class Starting(TryLater):
    code, status, title = "starting", 503, "The service is starting"
    meaning = "The network is being loaded and warmed up; `/readyz` says when it is ready."


class Draining(TryLater):
    code, status, title = "draining", 503, "The service is stopping"
    meaning = "The process finishes accepted work and takes nothing new; ask another replica."


class TooLate(UnstirError):
    code, status, title = "too_late", 504, "The deadline cannot be met"
    meaning = "The time of `X-Request-Timeout-Ms` or `UNSTIR_MAX_REQUEST_SECONDS` is over, or is known to be too short."


class Failed(UnstirError):
    """The request was fine and the service could not do it."""


class EngineDead(Failed):
    code, status, title = "engine_dead", 503, "The engine has failed"
    meaning = (
        "The device has failed and every waiting request gets this error; `/readyz` says why; restart the process."
    )

    def __init__(self, detail: str, retry_after: float = 10) -> None:  # about what a restart takes
        super().__init__(detail)
        self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class DeviceMemory(Failed):
    """The device is too small for the width that was promised."""

    code, status, title = "device_memory", 503, "The device ran out of memory"
    meaning = (
        "`reproducible` needs forwards of `UNSTIR_REPRODUCIBLE_WIDTH` rows, `guidance` those of 2, and the device has "
        "no room for them; or there was none for what this request keeps."
    )


class NotFinite(Failed):
    code, status, title = "not_finite", 500, "The result is not finite"
    meaning = "The network returned NaN or infinity for this request; another seed or more steps may help."


class StepFailed(Failed):
    code, status, title = "step_failed", 500, "A step failed"
    meaning = (
        "The network cannot compute a step of this very request, while the device still works; others are not "
        "affected. The log has the reason."
    )


class Internal(Failed):
    code, status, title = "internal", 500, "Internal error"
    meaning = "A bug in Unstir; the log has the traceback under the same request id."


class ClientGone(UnstirError):
    code, status, title = "client_gone", 499, "The client disconnected"
    meaning = "Never sent: metrics and logs count requests under it whose client disconnected."


REJECTIONS = (Overloaded, Starting, Draining, TooLate, BodyTooLarge, ImageTooLarge)  # for lack of capacity or time


def catalogue() -> list[type[UnstirError]]:
    """Every error that can be sent, in the order of the tree."""

    def leaves(kind: type[UnstirError]) -> list[type[UnstirError]]:
        below = kind.__subclasses__()
        return [leaf for child in below for leaf in leaves(child)] if below else [kind]

    return leaves(UnstirError)
