"""``model_index.json`` and the folders beside it: parts without which the network's output is no image."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint.facts import LAYOUT, CheckpointError, Facts
from model.checkpoint.scheduler import judge_class

INDEX = "model_index.json"
PARTS = ("unet", "scheduler")
# Parts that turn latents or sound into the result, or text and images into what the network is conditioned on.
_LATENTS = ("vae", "vqvae", "movq", "decoder", "prior")
_SOUND = ("mel", "vocoder")
_CONDITIONS = ("text_encoder", "text_encoder_2", "tokenizer", "bert", "image_encoder", "transformer")
LATENT_DIFFUSION = "latent diffusion (such as Stable Diffusion) is not supported, only diffusion in pixel space"
_LATENT_PIPELINES = ("LDM", "LatentDiffusion", "StableDiffusion", "VQDiffusion", "AudioDiffusion", "DiT", "Kandinsky")


def find_parts(path: Path) -> tuple[Path, Path]:
    """The folders of the network and of the scheduler.

    Raises:
        CheckpointError: there is no checkpoint; with the folder that is probably meant.
    """
    if not path.exists():
        raise CheckpointError(path, f"no such folder; {LAYOUT}")
    if not path.is_dir() or (path.name in PARTS and _is_checkpoint(path.resolve().parent)):
        raise CheckpointError(path, describe_part(path))
    if (path / "unet").is_dir():
        return path / "unet", path / "scheduler"
    if not (path / "config.json").is_file():
        if (path / INDEX).is_file():
            raise CheckpointError(path, f"has no folder unet; {LAYOUT}")
        raise CheckpointError(path, f"is no checkpoint; {_describe_contents(path)}")
    return path, path


def describe_part(path: Path) -> str:
    """What a file or folder of a checkpoint is, and which folder is meant."""
    what = "is a part of a checkpoint" if path.is_dir() else "is a file"
    above = [folder for folder in (path.parent, path.parent.parent) if _is_checkpoint(folder)]
    return f"{what}; give the checkpoint's folder, {above[-1]}" if above else f"{what}; {LAYOUT}"


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "unet").is_dir() or (folder / "config.json").is_file()


def _describe_contents(folder: Path) -> str:
    """What is in a folder instead of a checkpoint."""
    if (folder / "state.pt").is_file():
        return "it holds a run of unstir train without a checkpoint yet; continue that with --resume"
    try:
        found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and _is_checkpoint(entry))
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if found:
        return f"give one of those in it, such as {found[0]}"
    return f"neither unet/ nor config.json is in it; {LAYOUT}"


def check_pipeline(folder: Path) -> None:
    """Refuse a pipeline with other parts than a network and a scheduler.

    Raises:
        CheckpointError: naming the part, or the class of the pipeline.
    """
    for part in (*_LATENTS, *_SOUND, *_CONDITIONS):
        if (folder / part).is_dir():
            raise CheckpointError(folder / part, _reason(part))
    if not (folder / INDEX).is_file():
        return
    facts = Facts.read(folder / INDEX)
    for key, value in facts.content.items():
        if key not in PARTS and not key.startswith("_") and isinstance(value, list) and any(value):
            raise facts.fault(key, _reason(key))
    scheduler = facts.content.get("scheduler")
    if isinstance(scheduler, list) and any(scheduler) and (reason := judge_class(scheduler[-1])):
        raise facts.fault("scheduler", reason)
    name = facts.content.get("_class_name")
    if name is not None and not isinstance(name, str):
        raise facts.fault("_class_name", "must be a string, such as DDPMPipeline")
    if name and name.startswith(_LATENT_PIPELINES):
        raise facts.fault("_class_name", f"{LATENT_DIFFUSION}; take a checkpoint whose network works on images")


def _reason(part: str) -> str:
    if part in _LATENTS:
        return f"{LATENT_DIFFUSION}; the network's output is no image before this part has decoded it"
    if part in _SOUND:
        return "sound is not supported, only images; the network's output is no image"
    if part in _CONDITIONS:
        return (
            "text and other prompts are not supported, only class labels; the network is conditioned on what this part "
            "computes"
        )
    return f"only pipelines of {' and '.join(PARTS)} are served; set it to [null, null] if the network does without"
