"""A trained noise predictor on disk: a diffusers directory with a card.

    model_index.json                                so that diffusers' DDPMPipeline opens the folder too
    unet/config.json                                the network's shape
    unet/diffusion_pytorch_model.safetensors        its weights
    scheduler/scheduler_config.json                 the noise schedule that it was trained on
    card.json                                       classes, licence, data, training recipe, numbers, hash

Flat directories (``config.json``, weights and ``scheduler_config.json`` side by side) are read as well. Weights are
read from safetensors only: a pickle can run code when it is opened.

Everything that the files say is judged by :func:`load`, so that what loads can also be served: what is left out takes
diffusers' default, what cannot be computed here is refused by a :class:`CheckpointError`.
"""

from model.checkpoint.card import Card, sha256_on_card
from model.checkpoint.facts import CheckpointError
from model.checkpoint.folder import Checkpoint, load, save
from model.checkpoint.pipeline import describe_part
from model.checkpoint.weights import WEIGHTS

__all__ = ["WEIGHTS", "Card", "Checkpoint", "CheckpointError", "describe_part", "load", "save", "sha256_on_card"]
