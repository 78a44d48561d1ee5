"""``model_index.json`` and the folders beside it: parts without which the network's output is no image."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint.facts import CheckpointError, Facts
from model.checkpoint.scheduler import judge_class

INDEX = "model_index.json"
PARTS = ("unet", "scheduler")
# Parts that turn latents or sound into the result, or text and images into what the network is conditioned on.
_LATENTS = ("vae", "vqvae", "movq", "mel", "decoder", "prior")
_CONDITIONS = ("text_encoder", "text_encoder_2", "tokenizer", "bert", "image_encoder", "transformer")
_LATENT_PIPELINES = ("LDM", "LatentDiffusion", "StableDiffusion", "VQDiffusion", "AudioDiffusion", "DiT", "Kandinsky")


def check_pipeline(folder: Path) -> None:
    """Refuse a pipeline with other parts than a network and a scheduler.

    Raises:
        CheckpointError: naming the part, or the class of the pipeline.
    """
    for part in (*_LATENTS, *_CONDITIONS):
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
        raise facts.fault("_class_name", "its network works on latents, which are no images; pixel space is served")


def _reason(part: str) -> str:
    if part in _LATENTS:
        return "the network's output is no image before this part has decoded it; only pixel space is served"
    if part in _CONDITIONS:
        return "the network is conditioned on what this part computes; only class labels are served"
    return f"only pipelines of {' and '.join(PARTS)} are served; set it to [null, null] if the network does without"
