import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding

from model.network.config import ConfigError, UNetConfig
from model.network.unet import UNet, timestep_embedding

BASE = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
# google/ddpm-*: TensorFlow's padding, sines first, attention with one head.
GOOGLE = {
    **BASE,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
# The Hugging Face course and most user uploads.
COURSE = {
    **BASE,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
}
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift"}
CONFIGS = {
    "google": GOOGLE,
    "course": COURSE,
    "google-six-levels": {
        **GOOGLE,
        "sample_size": 32,
        "block_out_channels": [4, 4, 8, 8, 12, 12],
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    },
    "narrowing": {**COURSE, "block_out_channels": [16, 8]},
    "one-layer": {**COURSE, "layers_per_block": 1},
    "three-layers": {**GOOGLE, "layers_per_block": 3},
    "one-level": {
        **COURSE,
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    },
    "scale-shift": {**COURSE, **SCALE_SHIFT},
    "scale-shift-attn-norm": {**COURSE, **SCALE_SHIFT, "attn_norm_num_groups": 2},
    "attn-norm": {**COURSE, "attn_norm_num_groups": 8},
    "classes": {**COURSE, "num_class_embeds": 5},
    "mid-scale": {**COURSE, "mid_block_scale_factor": 1.4142},
    "no-mid-attention": {**COURSE, "add_attention": False},
    "no-attention": {**COURSE, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
    "mixed-attention": {**COURSE, "up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
    "learned-variance": {**GOOGLE, "out_channels": 6},
    "grey": {**COURSE, "in_channels": 1, "out_channels": 1},
    "wide-image": {**COURSE, "sample_size": [4, 12]},
    "centred": {**COURSE, "center_input_sample": True},
    "embedding-width": {**COURSE, "time_embedding_dim": 24},
    "odd-embedding": {**COURSE, "block_out_channels": [7, 14], "norm_num_groups": 7, "attention_head_dim": 7},
    "two-heads": {**COURSE, "attention_head_dim": 4},
}


def pair(config):
    """Our UNet and diffusers' in float64, with the same weights, large enough that every one of them shows."""
    ours, theirs = UNet(UNetConfig.from_dict(config)).double().eval(), UNet2DModel(**config).double().eval()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in theirs.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        fan_in = value[0].numel() if value.ndim > 1 else 1
        state[key] = noise * 1.5 / fan_in**0.5 if value.ndim > 1 else (value + noise / 2)
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    return ours, theirs


@torch.inference_mode()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_network_is_diffusers(config):
    ours, theirs = pair(config)
    wanted = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == wanted
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config["in_channels"], *ours.config.size, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 4, 2]) if "num_class_embeds" in config else None
    for t in (torch.tensor([0, 500, 999]), torch.tensor([0.25, 17.5, 998.9])):
        found, expected = ours(x, t, y), theirs(x, t, y).sample
        assert found.shape == (3, config["out_channels"], *ours.config.size)
        # The same operations in float64, a few of them in another order: some hundred roundings of 1e-16, on outputs of
        # a few units. The sinusoids are float32 in both, from the same expressions, hence to the same bits.
        assert (found - expected).abs().max() < 1e-11
        assert expected.std() > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("config", [GOOGLE, COURSE], ids=["google", "course"])
def test_every_weight_shows_in_the_output(config):
    # Otherwise equal outputs above would say little about it.
    ours, _ = pair(config)
    x, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.tensor([300])
    base = ours(x, t)
    for key, value in ours.named_parameters():
        if key.endswith("to_k.bias"):
            continue  # adds the same to all of a query's scores: the softmax does not see it
        value.flatten()[0] += 0.5
        assert (ours(x, t) - base).abs().max() > 1e-9, key
        value.flatten()[0] -= 0.5


@torch.inference_mode()
@pytest.mark.parametrize("config", [GOOGLE, {**COURSE, "num_class_embeds": 5}], ids=["google", "course-classes"])
def test_rows_of_a_batch_do_not_meet(config):
    ours, _ = pair(config)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t, y = torch.tensor([3, 999, 0, 500]), torch.tensor([1, 2, 3, 4])
    together = ours(x, t, y)
    for i in range(4):
        alone = ours(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-12  # libraries may block a larger batch differently
    swapped = ours(x.flip(0), t.flip(0), y.flip(0)).flip(0)
    assert (together - swapped).abs().max() < 1e-12


@torch.inference_mode()
def test_time_and_class_matter():
    ours, _ = pair({**COURSE, "num_class_embeds": 5})
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    outputs = [ours(x, torch.tensor([t]), torch.tensor([y])) for t, y in ((10, 1), (11, 1), (10, 2), (10.5, 1))]
    for i in range(1, 4):
        assert (outputs[0] - outputs[i]).abs().max() > 1e-3


@pytest.mark.parametrize("dim", [2, 7, 8, 31, 128])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 0.5])
def test_timestep_embedding_is_diffusers(shift, flip, dim):
    t = torch.tensor([0.0, 1.0, 0.3, 999.0])
    ours = timestep_embedding(t, dim, flip_sin_to_cos=flip, freq_shift=shift)
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert ours.shape == (4, dim)
    # Angles up to 999 in float32 are known to 3e-5 only, if a library's exp differs in its last digit.
    assert (ours - theirs).abs().max() < 1e-4
    assert dim % 2 == 0 or not ours[:, -1].any()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet2DConditionModel"),
        ("time_embedding_type", "fourier"),
        ("time_embedding_type", "learned"),
        ("mid_block_type", None),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("act_fn", "gelu"),
        ("resnet_time_scale_shift", "ada_group"),
        ("class_embed_type", "timestep"),
        ("downsample_padding", 2),
    ],
)
def test_another_network_is_refused_by_key_and_value(key, value):
    with pytest.raises(ConfigError) as caught:
        UNetConfig.from_dict({**COURSE, key: value})
    assert str(caught.value).startswith(f"{key} = {value!r} is not supported; this UNet takes ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ["DownBlock2D"]}, r"down_block_types \(1\), up_block_types \(2\) .* \(2\)"),
        ({"block_out_channels": [8]}, r"block_out_channels \(1\)"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types has 'SkipDownBlock2D'"),
        ({"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"]}, "up_block_types has 'ResnetUpsampleBlock2D'"),
        ({"block_out_channels": [8, 18]}, "has 18, no multiple of norm_num_groups 4"),
        ({"sample_size": 9}, r"sample_size 9 must be a multiple of 2\^1"),
        ({"sample_size": [8, 5]}, r"sample_size 5 must be a multiple of 2\^1"),
    ],
    ids=["few-down-blocks", "few-widths", "skip-block", "resnet-upsample", "width", "size", "size-of-pair"],
)
def test_a_config_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_dict({**COURSE, **changes})


def test_heads_must_divide_their_level():
    with pytest.raises(ConfigError, match="attention_head_dim 5 does not divide a level's 16 channels"):
        UNet(UNetConfig.from_dict({**COURSE, "attention_head_dim": 5}))


def test_old_names_are_understood():
    old = {
        **COURSE,
        "_class_name": "UNetUnconditionalModel",
        "act_fn": "swish",
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        "up_block_types": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
        "a_key_from_the_future": 1,
    }
    assert UNetConfig.from_dict(old) == UNetConfig.from_dict(COURSE)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configs_survive_the_round_trip(config):
    ours = UNetConfig.from_dict(config)
    assert UNetConfig.from_dict(ours.to_dict()) == ours
    theirs = UNet2DModel.from_config(ours.to_dict()).config
    for key, value in config.items():
        assert list(theirs[key]) == value if isinstance(value, list) else theirs[key] == value


def test_missing_keys_take_diffusers_defaults():
    theirs = UNet2DModel(**BASE).config
    for key, value in UNetConfig.from_dict(BASE).to_dict().items():
        if key != "_class_name":
            assert theirs[key] == value or list(theirs[key]) == value, key


def test_size():
    assert UNetConfig(sample_size=32).size == (32, 32)
    assert UNetConfig(sample_size=(16, 32)).size == (16, 32)
    assert UNetConfig().size == ()
