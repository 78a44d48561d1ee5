"""The weights' file against the network's config."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint.facts import ANEW, FETCH, LFS, CheckpointError
from model.network.unet import UNet
from model.output import counted

WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Attention layers had other names before diffusers 0.15.
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def hash_weights(weights: Path) -> str:
    """sha256 of the file.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    if not weights.is_file():
        raise CheckpointError(weights, "is missing; other formats must first be converted to safetensors")
    try:
        with weights.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(weights, f"cannot be read: {error.strerror}") from error


def read_weights(weights: Path, net: UNet) -> dict[str, Tensor]:
    """The float32 tensors of ``net``, which has only shapes yet.

    Raises:
        CheckpointError: the file is corrupt, or its tensors are not those of the config, not finite or no floats.
    """
    try:
        state = {_modern_name(key): value for key, value in load_file(weights).items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = FETCH if _starts_with(weights, LFS) else f"{str(error).rstrip('.')}; {ANEW.partition(', or ')[2]}"
        raise CheckpointError(weights, f"is no readable safetensors file: {remedy}") from error
    wanted = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    if missing := sorted(wanted.keys() - state.keys()):
        raise CheckpointError(weights, f"lacks {counted(len(missing), 'tensor')} of the config, such as {missing[0]}")
    if extra := sorted(state.keys() - wanted.keys()):
        raise CheckpointError(weights, f"has {counted(len(extra), 'tensor')} beyond the config, such as {extra[0]}")
    for key, value in state.items():
        if tuple(value.shape) != wanted[key]:
            raise CheckpointError(weights, f"{key} is {list(value.shape)}, in the config {list(wanted[key])}")
        if value.dtype not in DTYPES:
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(weights, f"{key} is {kind}; quantised weights must first be converted to float32")
        state[key] = value.float()
        if not state[key].isfinite().all():
            raise CheckpointError(weights, f"{key} is not finite in float32")
    return state


def _starts_with(file: Path, begin: bytes) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(begin)) == begin
    except OSError:
        return False


def _modern_name(key: str) -> str:
    head, dot, tail = key.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{_LEGACY[last]}{dot}{tail}" if "attentions" in key and last in _LEGACY else key
