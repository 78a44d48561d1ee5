"""A card that is not there: its tensors say that they are on a CUDA device, and are computed by the CPU.

It is stricter than a card: where the host would have to wait for it, or tensors of both are mixed, an error says so;
and what is copied to the host is NaN until an event that was recorded after it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
READ = {  # what the host must know before it can go on
    aten._local_scalar_dense,
    aten.item,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.repeat_interleave,
}
DEVICE = torch.device("cuda")


class Objection(Exception):
    """The host would wait for the card, or tensors of both are mixed."""


def insist(condition: object, otherwise: str) -> None:
    if not condition:
        raise Objection(otherwise)


class OnCard(Tensor):
    """Says that it is on the card; ``x`` is what the CPU computes with."""

    x: Tensor

    @staticmethod
    def __new__(cls, x: Tensor) -> OnCard:
        made: OnCard = Tensor._make_wrapper_subclass(
            cls,
            x.shape,
            strides=x.stride(),
            storage_offset=x.storage_offset(),
            dtype=x.dtype,
            device="meta",  # for torch's own eyes: it would look for a card otherwise
        )
        made.x = x
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the card that is pretended")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def __repr__(self) -> str:
        return f"OnCard({tuple(self.shape)})"


class Event:
    """As torch.cuda.Event; from one that is recorded to the next it is a millisecond."""

    recorded = 0

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._copies: list[Callable[[], object]] = []
        self._number: int | None = None
        self._timed, self._blocking = enable_timing, blocking

    def record(self) -> None:
        Event.recorded += 1
        self._number = Event.recorded
        self._copies = list(Card.copies)

    @torch.inference_mode()
    def synchronize(self) -> None:
        insist(self._number is not None, "an event that was never recorded")
        insist(self._blocking, "a thread that spins while it waits")
        for copy in self._copies:
            if copy in Card.copies:
                Card.copies.remove(copy)
                copy()

    def elapsed_time(self, other: Event) -> float:
        if self._number is None or other._number is None:
            raise Objection("an event that was never recorded")
        insist(self._timed and other._timed, "an event without a time")
        return float(other._number - self._number)


class Card:
    """The card, while it is entered. Only the thread that enters it sees it."""

    copies: list[Callable[[], object]] = []  # noqa: RUF012 - there is one card

    def __init__(self, monkeypatch) -> None:
        Card.copies.clear()
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(Tensor, "pin_memory", lambda x: _pinned(x.clone()))

    def __enter__(self) -> Card:
        self._modes = ExitStack()
        self._modes.enter_context(_Operations())
        self._modes.enter_context(_Factories())
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    @staticmethod
    def holds(module: nn.Module) -> nn.Module:
        """Puts the weights there."""
        for part in module.modules():
            for name, weight in part._parameters.items():
                part._parameters[name] = None if weight is None else OnCard(weight.data)  # type: ignore[assignment]
        return module


def _pinned(x: Tensor) -> Tensor:
    x.pinned = True  # type: ignore[attr-defined]
    return x


class _Factories(TorchFunctionMode):
    """What names the device, before torch looks for one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            wanted = [each for each in (*args[1:], kwargs.get("device")) if isinstance(each, torch.device)]
            if wanted and wanted[0].type == "cuda" and not isinstance(args[0], OnCard):
                insist(kwargs.get("non_blocking"), "a copy that is not asynchronous")
                insist(getattr(args[0], "pinned", False), "a copy from memory that is not pinned")
                return OnCard(args[0].clone())
            back = wanted and wanted[0].type == "cpu" and isinstance(args[0], OnCard)
            insist(not back, "a copy home that is not asynchronous")
        elif func is Tensor.cpu:
            insist(not isinstance(args[0], OnCard), "a copy home that is not asynchronous")
        elif torch.device(kwargs.get("device") or "cpu").type == "cuda":
            made = func(*args, **{**kwargs, "device": "cpu"})
            return OnCard(made)
        if kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """What is done with tensors, here or there, never both."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, OnCard)]
        if not there:
            if torch.device(kwargs.get("device") or "cpu").type == "cuda":  # zeros_like and the like, by their origin
                return OnCard(func(*args, **{**kwargs, "device": torch.device("cpu")}))
            return func(*args, **kwargs)
        insist(func.overloadpacket not in READ, f"{func} reads from the card")
        if func.overloadpacket is aten.copy_ and len(there) == 1:
            return self._copied(*args, **kwargs)
        here = [each for each in tensors if not isinstance(each, OnCard) and each.dim()]
        insist(not here, f"{func} of tensors that are on the card and others that are not")
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        found = func(*tree_map(inside, args), **tree_map(inside, kwargs))
        if func._schema.name.endswith("_") or "out" in kwargs:
            return kwargs.get("out", args[0])
        return tree_map(lambda each: OnCard(each) if isinstance(each, Tensor) else each, found)

    @staticmethod
    def _copied(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        insist(not isinstance(to, OnCard), "copy_ from the host")
        insist(non_blocking, "a copy home that is not asynchronous")
        insist(getattr(to, "pinned", False), "a copy home to memory that is not pinned")
        arriving = source.x.clone()  # type: ignore[attr-defined]
        to.fill_(float("nan"))
        Card.copies.append(lambda: to.copy_(arriving))
        return to


def inside(each: Any) -> Any:
    """What the CPU computes with."""
    return each.x if isinstance(each, OnCard) else each
