"""The noise predictor: a UNet whose state dict has the keys of diffusers' ``UNet2DModel``.

The architecture is that of DDPM (Ho et al. 2020, appendix B): residual blocks conditioned on a sinusoidal timestep
embedding, self-attention at chosen resolutions, and a skip connection from every block on the way down to its mirror
on the way up. Attribute names are checkpoint keys: renaming one makes all checkpoints unreadable.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.config import ConfigError, UNetConfig


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5, as DDPM uses them).

    Args:
        t: float32 [B]; may be fractional.
        dim: width of the result; an odd one ends in a zero.

    Returns:
        float32 [B, dim]: sines then cosines, or the reverse when ``flip_sin_to_cos``.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * k / (half - freq_shift))[None]  # [B, half]
    parts = [angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimestepMLP(nn.Module):
    """Two linear layers around a SiLU, from the sinusoids to the embedding that all blocks read."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ResnetBlock(nn.Module):
    """norm, SiLU, conv; add (or scale and shift by) the timestep; norm, SiLU, dropout, conv; add the input."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, output_scale: float = 1.0) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.output_scale = output_scale
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        temb = self.time_emb_proj(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + temb)
        h = self.conv2(self.dropout(F.silu(h)))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor = skip + h
        return out if self.output_scale == 1.0 else out / self.output_scale


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, config: UNetConfig, groups: int | None, output_scale: float = 1.0) -> None:
        super().__init__()
        head_dim = channels if config.attention_head_dim is None else config.attention_head_dim
        if channels % head_dim:
            raise ConfigError(f"attention_head_dim {head_dim} does not divide a level's {channels} channels")
        self.heads = channels // head_dim
        self.output_scale = output_scale
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps=config.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        normed = x if self.group_norm is None else self.group_norm(x)
        tokens = normed.flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (
            proj(tokens).view(b, h * w, self.heads, -1).transpose(1, 2) for proj in (self.to_q, self.to_k, self.to_v)
        )  # each [B, heads, HW, C / heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        out: Tensor = x + self.to_out[0](mixed).transpose(1, 2).reshape(b, c, h, w)
        return out if self.output_scale == 1.0 else out / self.output_scale


class Downsample(nn.Module):
    """Half the resolution, by a strided convolution."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == 0:  # TensorFlow's "SAME": the odd pixel of padding lies right and below
            x = F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Twice the resolution, by nearest neighbours and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Block(nn.Module):
    """One resolution level of either path: residual blocks, each followed by attention where the level has it."""

    def __init__(self, in_channels: list[int], out_channels: int, config: UNetConfig, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, out_channels, config) for c in in_channels])
        if attention:
            groups = config.norm_num_groups
            self.attentions = nn.ModuleList([Attention(out_channels, config, groups) for _ in in_channels])
        self.attention = attention

    def layer(self, i: int, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x) if self.attention else x


class DownBlock(Block):
    """A level on the way down; returns its output and the skip connections."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, attention: bool, last: bool) -> None:
        super().__init__(
            [in_channels] + [out_channels] * (config.layers_per_block - 1), out_channels, config, attention
        )
        self.downsamplers = None if last else nn.ModuleList([Downsample(out_channels, config.downsample_padding)])

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UpBlock(Block):
    """A level on the way up; takes one skip connection per residual block, the last first."""

    def __init__(
        self, in_channels: list[int], out_channels: int, config: UNetConfig, attention: bool, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, config, attention)
        self.upsamplers = None if last else nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class MidBlock(nn.Module):
    """Two residual blocks around one attention, at the lowest resolution."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        scale = config.mid_block_scale_factor
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, config, scale) for _ in range(2)])
        if config.add_attention:
            self.attentions = nn.ModuleList([Attention(channels, config, groups, scale)])
        self.add_attention = config.add_attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        if self.add_attention:
            x = self.attentions[0](x)
        out: Tensor = self.resnets[1](x, emb)
        return out


class UNet(nn.Module):
    """εθ(x_t, t, y): the noise in an image, or what else was trained, see ``NoiseSchedule.prediction``."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        layers = config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], config.embedding_dim)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.embedding_dim)

        ins = (widths[0], *widths[:-1])
        self.down_blocks = nn.ModuleList(
            DownBlock(ins[i], widths[i], config, config.down_block_types[i] == "AttnDownBlock2D", i == len(widths) - 1)
            for i in range(len(widths))
        )
        self.mid_block = MidBlock(widths[-1], config)
        self.up_blocks = nn.ModuleList()
        for i, out in enumerate(reversed(widths)):
            level = len(widths) - 1 - i
            below = widths[min(level + 1, len(widths) - 1)]
            # The input of each residual block: the output so far, joined with a skip of the mirrored level.
            streams = [below] + [out] * layers
            skips = [out] * layers + [ins[level]]
            channels = [a + b for a, b in zip(streams, skips, strict=True)]
            attention = config.up_block_types[i] == "AttnUpBlock2D"
            self.up_blocks.append(UpBlock(channels, out, config, attention, level == 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noisy images.

        Args:
            x: [B, C, H, W], about unit variance; C is ``in_channels``.
            t: [B] timesteps in 0..T-1, integer or fractional.
            y: int64 [B] class indices, or float [B, K] weights of all K embeddings, whose weighted sum is taken;
                None exactly when the network is not class-conditional.

        Returns:
            [B, out_channels, H, W]: ε (or v, or x_0), and the variance channels after it where they were trained.
        """
        config = self.config
        if config.center_input_sample:
            x = 2 * x - 1
        freqs = timestep_embedding(
            t, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        emb = self.time_embedding(freqs.to(self.conv_in.weight.dtype))  # [B, E]
        if config.num_class_embeds is not None:
            emb = emb + self.embed_classes(y)

        h = self.conv_in(x)
        skips = [h]
        for down in self.down_blocks:
            h, more = down(h, emb)
            skips += more
        h = self.mid_block(h, emb)
        for up in self.up_blocks:
            h = up(h, emb, skips)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out

    def embed_classes(self, y: Tensor | None) -> Tensor:
        """The class's part of the embedding, [B, E].

        A single weight of 1 is bit-identical to its class index: the other terms add zeros.
        """
        assert y is not None, "This is a bug: a class-conditional network without classes."
        if not y.is_floating_point():
            out: Tensor = self.class_embedding(y)
            return out
        embeddings = self.class_embedding.weight
        return (y.to(embeddings.dtype)[:, :, None] * embeddings).sum(dim=1)
