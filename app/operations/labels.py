"""Labels: from a class by name or index to what the network is given."""

from __future__ import annotations

from collections.abc import Sequence

from app.engine.loading import LoadedModel
from app.errors import InvalidField
from app.errors.wording import MISSING, Unquoted, suggest
from app.operations.fields import Label

MAX_NAMES = 20  # of classes in a message


def resolve_label(model: LoadedModel, label: Label, field: str = "label") -> tuple[int | None, str | None]:
    """The class index (None for a network without classes), and the name that it goes by.

    An integer is an index. A string is a name, and if none is so called, an index in decimal digits. The name that is
    returned stands for the same class wherever it is sent again.

    Raises:
        InvalidField: naming ``field``.
    """
    card = model.checkpoint.card
    if model.checkpoint.net.config.num_class_embeds is None:
        if label is not None:
            raise InvalidField(field, label, "this checkpoint has no classes; leave it out")
        return None, None
    if label is None:
        if card.null_class is None:
            remedy = f"this checkpoint has no null class; choose one of {_names(card.classes)}"
            raise InvalidField(field, MISSING, remedy)
        return card.null_class, None
    indices = {name.casefold(): index for index, name in enumerate(card.classes)}
    index = indices.get(label.casefold()) if isinstance(label, str) else label
    if index is None and isinstance(label, str) and label.isascii() and label.isdecimal() and len(label) < 10:
        index = int(label)
    count = len(card.classes)
    if index is None or not 0 <= index < count:
        remedy = f"{suggest(label, card.classes)}choose one of {_names(card.classes)}, or an index of 0 to {count - 1}"
        raise InvalidField(field, label, remedy)
    return index, card.classes[index]


def resolve_labels(
    model: LoadedModel, label: Label, labels: Sequence[Label] | None, count: int
) -> tuple[list[int | None], list[str | None]]:
    """Index and name of the class of each of ``count`` latents: ``label`` for all, or ``labels`` one by one.

    Raises:
        InvalidField: both are given, or ``labels`` are not as many.
    """
    if labels is None:
        index, name = resolve_label(model, label)
        return [index] * count, [name] * count
    if label is not None:
        raise InvalidField("label", label, "labels are given already; leave one of them out")
    if len(labels) != count:
        raise InvalidField("labels", Unquoted(len(labels)), f"give one for each of the {count} latents")
    resolved = [resolve_label(model, each, f"labels.{i}") for i, each in enumerate(labels)]
    return [index for index, _ in resolved], [name for _, name in resolved]


def mix_labels(
    model: LoadedModel, indices: Sequence[int | None], weights: Sequence[float]
) -> int | tuple[float, ...] | None:
    """The class of a blend: an index where its latents agree, else the weight of each class embedding."""
    present = {index for index, weight in zip(indices, weights, strict=True) if weight > 0}
    if len(present) == 1:
        return present.pop()
    shares = [0.0] * (model.checkpoint.net.config.num_class_embeds or 0)
    for index, weight in zip(indices, weights, strict=True):
        shares[index or 0] += weight
    return tuple(shares)


def check_guidance(model: LoadedModel, guidance: float, indices: Sequence[int | None]) -> None:
    """Guidance weighs a label against the null class.

    Raises:
        InvalidField: there is no label, or no null class.
    """
    if guidance == 1:
        return
    null = model.checkpoint.card.null_class
    if null is None:
        raise InvalidField("guidance", guidance, "this checkpoint has no null class to guide away from; use 1")
    if null in indices:
        raise InvalidField("guidance", guidance, "it weighs a label against none; give a label, or leave guidance at 1")


def _names(classes: tuple[str, ...]) -> str:
    shown = classes if len(classes) <= MAX_NAMES else (*classes[:MAX_NAMES], f"... ({len(classes)} in GET /model)")
    return ", ".join(shown)
