"""The network's architecture as diffusers describes it, and which of its configs are supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


class ConfigError(ValueError):
    """An unsupported network config; the message names the key, its value and the remedy."""


@dataclass(frozen=True)
class UNetConfig:
    """The keys of diffusers' ``UNet2DModel`` config that change what is computed, with diffusers' defaults."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_class_embeds: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a ``config.json``; missing keys take diffusers' defaults.

        Raises:
            ConfigError: not a ``UNet2DModel`` with positional timestep embedding, or inconsistent.
        """
        config = dict(config)
        for key, accepted in _ONLY.items():
            if key in config and config[key] not in accepted:
                raise ConfigError(f"{key} = {config[key]!r} is not supported; this UNet takes {accepted[0]!r}")
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        for key in ("down_block_types", "up_block_types"):
            if key in known:
                known[key] = tuple(name.removeprefix("UNetRes") for name in known[key])
        known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """A ``config.json`` for diffusers' ``UNet2DModel.from_config``."""
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"_class_name": "UNet2DModel", "time_embedding_type": "positional", "act_fn": "silu", **config}

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ConfigError(
                f"down_block_types ({len(self.down_block_types)}), up_block_types ({len(self.up_block_types)}) and "
                f"block_out_channels ({levels}) must have one entry per resolution level"
            )
        for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            for name in getattr(self, key):
                if name not in known:
                    raise ConfigError(f"{key} has {name!r}; this UNet takes {' and '.join(known)}")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ConfigError(
                    f"block_out_channels has {width}, no multiple of norm_num_groups {self.norm_num_groups}"
                )
        for side in self.size:
            if side % 2 ** (levels - 1):
                raise ConfigError(f"sample_size {side} must be a multiple of 2^{levels - 1}, once halved per level")

    @property
    def size(self) -> tuple[int, ...]:
        """(height, width), or () if the config has none."""
        if self.sample_size is None:
            return ()
        return (self.sample_size,) * 2 if isinstance(self.sample_size, int) else tuple(self.sample_size)

    @property
    def embedding_dim(self) -> int:
        """Width of the timestep embedding after its MLP."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


_DOWN = ("DownBlock2D", "AttnDownBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D")
# Keys with the only values that are supported; the first is the usual one.
_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel", "UNetUnconditionalModel", "UNetModel"),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "downsample_padding": (1, 0),
}
