"""What a checkpoint's files say is judged when it is loaded, by file, key, value and remedy."""

import json
import time
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.checkpoint import WEIGHTS, CheckpointError
from model.checkpoint.scheduler import REFUSED, SERVED, complete
from model.diffusion.inversion import INVERSIONS
from model.diffusion.levels import hops, last_level, noise_levels
from model.diffusion.plan import Clip
from model.diffusion.samplers import SAMPLERS
from model.diffusion.schedule import NoiseSchedule, timesteps
from tests.diffusers_levels import diffusers_hops, diffusers_pndm_levels
from tests.model.test_checkpoint import CARD, CONFIG, SCHEDULER, edit, random_net

NETS = {None: random_net(), 6: random_net(replace(CONFIG, num_class_embeds=6))}
NAMES = ["a", "b", "c", "d", "e"]
FILES = {"card": "card.json", "unet": "unet/config.json", "scheduler": "scheduler/scheduler_config.json"}


def save(path, embeddings=None, card=CARD):
    net = NETS[embeddings]
    checkpoint.save(path, net, net.state_dict(), SCHEDULER, card)
    return path


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path)


@pytest.fixture
def conditional(tmp_path):
    return save(tmp_path, 6, replace(CARD, classes=tuple(NAMES), null_class=5))


def refusal(folder, file=None, **changes):
    """The error for a folder with one file changed; file, key and value are in its one line."""
    if file:
        edit(folder / FILES[file], **changes)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert caught.value.remedy
    if file:
        assert caught.value.file == folder / FILES[file]
    return message


def schedulers():
    """Every scheduler that diffusers has; some need packages that are not here, and have only a name."""
    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


@pytest.mark.parametrize("name", schedulers())
def test_schedulers_are_served_or_refused_by_name(folder, name):
    edit(folder / FILES["scheduler"], _class_name=name)
    if name in SERVED:
        assert checkpoint.load(folder).schedule.T == 1000
    else:
        assert f'_class_name = "{name}": is ' in refusal(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers, with this numpy
@pytest.mark.parametrize("name", sorted(SERVED))
def test_what_diffusers_saves_of_a_served_scheduler_loads(folder, name):
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError:
        pytest.skip(f"{name} needs a package that is not installed")
    scheduler.save_pretrained(folder / "scheduler")
    found = checkpoint.load(folder)
    saved = json.loads((folder / FILES["scheduler"]).read_text())
    # The file says everything; with the class alone the same must follow, for the defaults are the class's.
    (folder / FILES["scheduler"]).write_text(json.dumps({"_class_name": name}))
    bare = checkpoint.load(folder)
    assert bare.defaults == found.defaults
    assert (bare.schedule.alphas_cumprod == found.schedule.alphas_cumprod).all()
    assert bare.schedule.ends_clean == found.schedule.ends_clean == saved.get("set_alpha_to_one", True)
    assert found.defaults.clip == (Clip(1.0) if saved.get("clip_sample") else None)
    assert found.defaults.variance == "fixed_small"


@pytest.mark.parametrize(
    ("name", "what"),
    {
        "FlowMatchEulerDiscreteScheduler": "flow matching",
        "EDMEulerScheduler": "EDM",
        "ScoreSdeVeScheduler": "variance-exploding SDE",
        "KarrasVeScheduler": "variance-exploding process",
        "CMStochasticIterativeScheduler": "a consistency model",
        "LCMScheduler": "a latent consistency model",
        "TCDScheduler": "a trajectory consistency model",
        "IPNDMScheduler": "continuous timesteps",
        "Nonsense": "unknown here",
        "": "unknown here",
        7: "unknown here",
        "DDPM" * 100: "unknown here",
    }.items(),
)
def test_a_refused_scheduler_is_said_to_be_what_it_is(folder, name, what):
    message = refusal(folder, "scheduler", _class_name=name)
    assert what in message
    assert len(message) < 500 + len(str(folder))


def test_no_name_is_both_served_and_refused():
    assert not [name for name in SERVED if name.startswith(tuple(REFUSED))]


SCHEDULERS_REFUSED = [
    ({"_class_name": ...}, "_class_name is missing"),
    ({"predict_epsilon": False}, "predict_epsilon = false: is of 2022; set prediction_type"),
    ({"beta_schedule": None}, "beta_schedule = null: must be the name of a schedule"),
    ({"_class_name": None}, "_class_name = null: is missing"),
    ({"timestep_spacing": "foo"}, 'timestep_spacing = "foo": choose one of leading, trailing, linspace'),
    ({"timestep_spacing": ["leading"]}, "choose one of leading"),
    ({"use_flow_sigmas": True}, "flow matching"),
    ({"use_dynamic_shifting": True}, "flow matching"),
    ({"prediction_type": "flow_prediction"}, "flow matching"),
    ({"prediction_type": "score"}, "choose one of epsilon, v_prediction, sample"),
    ({"prediction_type": None}, "choose one of epsilon"),
    ({"timestep_type": "continuous"}, "only discrete is served"),
    ({"variance_type": "learned_range"}, "out_channels is 1, not 2"),
    ({"variance_type": "learned"}, "choose one of fixed_small"),
    ({"variance_type": 1}, "choose one of fixed_small"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps = 1000000000: must be an integer of 1 to 100000"),
    ({"num_train_timesteps": 1e9}, "must be an integer of 1 to 100000"),
    ({"num_train_timesteps": 10**400}, "must be an integer of 1 to 100000"),
    ({"num_train_timesteps": 0}, "must be an integer of 1 to 100000"),
    ({"num_train_timesteps": True}, "must be an integer of 1 to 100000"),
    ({"num_train_timesteps": None, "timesteps": 10**9}, "timesteps = 1000000000"),
    ({"beta_start": 0}, "beta_start = 0: must be a number between 0 and 1"),
    ({"beta_end": 1}, "beta_end = 1: must be a number between 0 and 1"),
    ({"beta_end": float("nan")}, "beta_end = NaN: must be a number"),
    ({"beta_end": "0.02"}, "must be a number"),
    ({"beta_schedule": 3}, "beta_schedule = 3: choose one of linear"),
    ({"trained_betas": [0.1, 2]}, "trained_betas"),
    ({"trained_betas": []}, "trained_betas"),
    ({"trained_betas": 0.1}, "trained_betas"),
    ({"trained_betas": [0.1, 0.2]}, "there are 2 trained_betas; both must be as many"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true: with prediction_type epsilon"),
    ({"rescale_betas_zero_snr": "no"}, "must be true or false"),
    ({"clip_sample": 1}, "clip_sample = 1: must be true or false"),
    ({"clip_sample_range": None}, "clip_sample_range = null: must be a number above 0 and at most 1000"),
    ({"clip_sample_range": 0}, "must be a number above 0"),
    ({"clip_sample_range": float("inf")}, "clip_sample_range = Infinity: must be a number above 0"),
    ({"dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio = 2: must be a number above 0 and at most 1"),
    ({"thresholding": True, "dynamic_thresholding_ratio": 0}, "must be a number above 0 and at most 1"),
    ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value = 0.5: must be a number of 1 to 1000"),
    ({"steps_offset": 1000}, "steps_offset = 1000: must be an integer of 0 to 999"),
    ({"steps_offset": -1}, "must be an integer of 0 to 999"),
    ({"steps_offset": 1.0}, "must be an integer of 0 to 999"),
    ({"set_alpha_to_one": 0}, "set_alpha_to_one = 0: must be true or false"),
]


@pytest.mark.parametrize(("changes", "message"), SCHEDULERS_REFUSED, ids=lambda each: str(each)[:60])
def test_a_scheduler_of_other_values_is_refused(folder, changes, message):
    began = time.monotonic()
    assert message in refusal(folder, "scheduler", **changes)
    assert time.monotonic() - began < 5  # no array of a thousand million timesteps


def test_null_is_the_default_where_diffusers_means_it(folder):
    for changes in (
        {"variance_type": None},
        {"trained_betas": None},
        {"clip_sample": False, "clip_sample_range": None},
    ):
        edit(folder / FILES["scheduler"], **changes)
        assert checkpoint.load(folder).defaults.variance == "fixed_small"
    assert complete({"_class_name": "PNDMScheduler", "clip_sample": None})["clip_sample"] is False


def test_learned_variance_needs_its_channels(tmp_path):
    net = random_net(replace(CONFIG, out_channels=2))
    checkpoint.save(tmp_path, net, net.state_dict(), SCHEDULER | {"variance_type": "learned_range"}, CARD)
    assert checkpoint.load(tmp_path).defaults.variance == "learned_range"


@pytest.mark.parametrize("part", ["vae", "vqvae", "text_encoder", "mel", "something"])
def test_a_pipeline_with_other_parts_is_refused_by_name(folder, part):
    edit(folder / "model_index.json", **{part: [None, None]})
    checkpoint.load(folder)
    edit(folder / "model_index.json", **{part: ["diffusers", "Part"]})
    assert f'{part} = ["diffusers", "Part"]: ' in refusal(folder)


def test_a_part_that_only_has_a_folder_is_refused_as_well(folder):
    (folder / "model_index.json").unlink()
    (folder / "vqvae").mkdir()
    assert "vqvae: latent diffusion (such as Stable Diffusion) is not supported, only diffusion in" in refusal(folder)


def test_what_is_not_supported_is_called_as_users_know_it(folder):
    for part, words in (
        ("vae", "latent diffusion (such as Stable Diffusion) is not supported"),
        ("text_encoder", "text and other prompts are not supported, only class labels"),
        ("mel", "sound is not supported, only images"),
    ):
        (folder / part).mkdir()
        assert f"{part}: {words}" in refusal(folder)
        (folder / part).rmdir()
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    assert '= "StableDiffusionPipeline": latent diffusion (such as Stable Diffusion) is not' in refusal(folder)
    (folder / "model_index.json").unlink()  # the network alone
    words = "in_channels = 4: served are images of 1 channel (grey) or 3 (colour); latent diffusion (such as Stable"
    assert words in refusal(folder, "unet", in_channels=4)


@pytest.mark.parametrize("name", ["LDMPipeline", "LDMSuperResolutionPipeline", "StableDiffusionPipeline", 5])
def test_a_latent_pipeline_is_refused_by_its_class(folder, name):
    edit(folder / "model_index.json", _class_name=name)
    assert f"_class_name = {json.dumps(name)}: " in refusal(folder)


CARDS_REFUSED = [
    ({"null_class": 6}, "null_class = 6: must be an integer of 0 to 5 or null"),
    ({"null_class": -1}, "null_class = -1"),
    ({"null_class": "2"}, 'null_class = "2"'),
    ({"null_class": 2.0}, "null_class = 2.0"),
    ({"null_class": True}, "null_class = true"),
    ({"classes": [*NAMES, "f", "g"]}, "names 7 classes, and the network has 6"),
    ({"classes": NAMES[:4]}, "names 4 classes, and the network has 6"),
    ({"null_class": 0}, "all but the last where null_class is 5"),
    ({"null_class": None}, "names 5 classes, and the network has 6"),
    ({"classes": [1, 2]}, "classes[0] = 1: must be a string"),
    ({"classes": "ab"}, 'classes = "ab": must be a list of strings'),
    ({"classes": None}, "classes = null: must be a list of strings"),
    ({"classes": ["A", "b", "c", "d", "a"]}, 'classes[4] = "a": another class is "A"'),
    ({"classes": ["a", "b", "c", "d", "a"]}, 'classes[4] = "a": another class is "a"'),
    ({"classes": ["Straße", "b", "c", "d", "STRASSE"]}, "compared without case"),
    ({"classes": ["", "b", "c", "d", "e"]}, "must be 1 to 200 printable characters"),
    ({"classes": ["a\nb", "b", "c", "d", "e"]}, r'classes[0] = "a\nb": must be 1 to 200 printable characters'),
    ({"name": 5}, "name = 5: must be a string"),
    ({"name": "a\x1b[2J"}, "must be 1 to 200 printable characters"),
    ({"name": "a" * 201}, "must be 1 to 200 printable characters"),
    ({"description": ["x"]}, "must be a string"),
    ({"licence": None}, "licence = null: must be a string"),
    ({"data": "\ud800"}, "surrogate"),
    ({"training": []}, "training = []: must be an object"),
    ({"numbers": 1}, "numbers = 1: must be an object"),
    ({"sha256": 5}, "sha256 = 5: must be a string"),
    ({"license": "MIT"}, 'license = "MIT": no such key; a card has name, description, licence'),
]


@pytest.mark.parametrize(("changes", "message"), CARDS_REFUSED, ids=lambda each: str(each)[:60])
def test_a_card_that_does_not_fit_is_refused(conditional, changes, message):
    assert message in refusal(conditional, "card", **changes)


@pytest.mark.parametrize("changes", [{"null_class": 0}, {"null_class": False}, {"classes": ["a"]}])
def test_an_unconditional_network_has_no_classes(folder, changes):
    assert "the network is not class-conditional" in refusal(folder, "card", **changes)


@pytest.mark.parametrize(
    ("classes", "null"), [(NAMES, 5), ([*NAMES, "none"], 5), ([*NAMES, "f"], None), (["none", *NAMES], 0)]
)
def test_the_null_class_may_have_a_name(conditional, classes, null):
    edit(conditional / "card.json", classes=classes, null_class=null)
    card = checkpoint.load(conditional).card
    assert (card.classes, card.null_class) == (tuple(classes), null)


def test_classes_without_names_are_numbered(conditional):
    edit(conditional / "card.json", classes=[])
    assert checkpoint.load(conditional).card.classes == tuple("01234")
    assert checkpoint.load(conditional).note == ""
    edit(conditional / "card.json", classes=..., null_class=...)
    assert checkpoint.load(conditional).card.classes == tuple("012345")
    (conditional / "card.json").unlink()
    found = checkpoint.load(conditional)
    assert (found.card.classes, found.card.null_class) == (tuple("012345"), None)
    assert "there is no guidance" in found.note
    assert found.note in found.card.description


NETWORKS_REFUSED = [
    *(({"in_channels": n, "out_channels": n}, f"in_channels = {n}: served are images of 1") for n in (2, 4, 6)),
    ({"in_channels": True}, "in_channels = true: must be an integer"),
    ({"out_channels": 3}, "out_channels = 3: is neither in_channels 1"),
    ({"sample_size": [16]}, "sample_size = [16]: must be an integer of 1 to 4096, or [height, width]"),
    ({"sample_size": 0}, "sample_size = 0"),
    ({"sample_size": 8.0}, "sample_size = 8.0"),
    ({"sample_size": [8, 10**9]}, "sample_size = [8, 1000000000]"),
    ({"sample_size": None}, "sample_size = null: is missing"),
    ({"num_class_embeds": 0}, "num_class_embeds = 0: must be an integer"),
    ({"num_class_embeds": "6"}, 'num_class_embeds = "6": must be an integer'),
    ({"layers_per_block": 10**9}, "layers_per_block = 1000000000: must be an integer of 1 to 64"),
    ({"block_out_channels": [8, -8]}, "block_out_channels = [8, -8]"),
    ({"block_out_channels": 8}, "must be a list of 1 to 12 integers"),
    ({"block_out_channels": [8] * 10**4}, "must be a list of 1 to 12 integers"),
    ({"down_block_types": "DownBlock2D"}, "must be a list of 1 to 12 names"),
    ({"norm_num_groups": None}, "norm_num_groups = null: must be an integer"),
    ({"norm_eps": 0}, "norm_eps = 0: must be a number above 0"),
    ({"mid_block_scale_factor": 0}, "mid_block_scale_factor = 0"),
    ({"flip_sin_to_cos": "yes"}, "must be true or false"),
    ({"attention_head_dim": -1}, "attention_head_dim = -1"),
    ({"time_embedding_dim": 2**40}, "time_embedding_dim"),
    ({"freq_shift": 0.5}, "freq_shift = 0.5"),
]


@pytest.mark.parametrize(("changes", "message"), NETWORKS_REFUSED, ids=lambda each: str(each)[:60])
def test_a_network_of_other_values_is_refused(folder, changes, message):
    assert message in refusal(folder, "unet", **changes)


@pytest.mark.parametrize("file", FILES)
def test_files_may_have_a_byte_order_mark(folder, file):
    path = folder / FILES[file]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    checkpoint.load(folder)
    assert len(checkpoint.sha256_on_card(folder)) == 64


@pytest.mark.parametrize("file", [*FILES.values(), "model_index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 10**5 + "]" * 10**5, "is nested too deeply"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "is nested too deeply"),
        ("[1]", "expected an object, found list"),
        ("9" * 5000, "is no JSON"),
        (" " * (16 * 2**20 + 1), "has more than 16 MiB"),
    ],
    ids=["lists", "objects", "list", "digits", "large"],
)
def test_a_file_of_another_form_is_refused(folder, file, content, message):
    (folder / file).write_text(content)
    assert f"{folder / file}" in refusal(folder)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to(torch.int8), "conv_in.weight is int8; quantised weights"),
        (lambda w: w.to(torch.float8_e4m3fn), "conv_in.weight is float8_e4m3fn; quantised weights"),
        (lambda w: w.double() * 1e300, "conv_in.weight is not finite in float32"),
        (lambda w: w * 1e38, r"the network's output at t = 0 is not finite"),
    ],
    ids=["int8", "fp8", "too large", "nan"],
)
def test_weights_that_cannot_be_computed_with_are_refused(folder, change, message):
    weights = folder / "unet" / WEIGHTS
    state = load_file(weights)
    save_file(state | {"conv_in.weight": change(state["conv_in.weight"])}, weights)
    (folder / "card.json").unlink()
    assert message in refusal(folder)


SHIFTED = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def test_the_offset_shifts_leading_alone(folder):
    edit(folder / FILES["scheduler"], **SHIFTED)
    schedule = checkpoint.load(folder).schedule
    assert [level.t for level in noise_levels(schedule, 10, "leading")][:-1] == list(range(901, 0, -100))
    assert (
        noise_levels(schedule, 10, "trailing")[:-1] == noise_levels(NoiseSchedule.from_config({}), 10, "trailing")[:-1]
    )
    for offset in (1, 7, 999):  # distinct, and below T
        for steps in (1000, 999, 501, 500, 30):
            grid = timesteps(1000, steps, "leading", offset)
            assert grid[0] <= 999
            assert len(set(grid)) == steps


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
def test_the_levels_are_those_of_diffusers(offset, to_one):
    options = {"steps_offset": offset, "set_alpha_to_one": to_one}
    ours = NoiseSchedule.from_config(options)
    theirs = DDIMScheduler(**options)
    last = last_level(ours)
    for mine, other in zip(hops(ours, 50, "leading", last), diffusers_hops(theirs, 50), strict=True):
        assert mine.t == other.t
        assert (mine.abar, mine.abar_next) == pytest.approx((other.abar, other.abar_next), rel=1e-4)
    levels = noise_levels(ours, 50, "leading", last=last)
    for mine, other in zip(levels, diffusers_pndm_levels(PNDMScheduler(**options), 50), strict=True):
        assert (mine.t, mine.abar) == pytest.approx((other.t, other.abar), rel=1e-4)


def test_an_inversion_begins_where_its_sampler_ends():
    ends_above = NoiseSchedule.from_config({"set_alpha_to_one": False})
    clean = NoiseSchedule.from_config({})
    for schedule in (ends_above, clean):
        down = SAMPLERS["ddim"].compile(schedule, 20, spacing="leading")
        up = INVERSIONS["fixed_point"].compile(schedule, 20, spacing="leading")
        # A first step between equal levels leaves the image as it is: ᾱ of both is that of t = 0.
        assert (down.steps[-1].t, up.steps[0].t) == (0, 0)
    still, moving = (INVERSIONS["ddim"].compile(s, 20, spacing="leading").steps[0] for s in (ends_above, clean))
    assert (still.A, still.c) == (((1.0,),), (0.0,))
    assert moving.c[0] > 0
    # Solvers that end at σ = 0 in diffusers, too, do so here.
    for name in ("dpmpp_2m", "ddpm", "heun"):
        assert SAMPLERS[name].compile(ends_above, 20).digest == SAMPLERS[name].compile(clean, 20).digest


def test_the_scheduler_that_the_index_names_is_judged_too(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert "model_index.json: scheduler = " in refusal(folder)
    assert "is flow matching" in refusal(folder)
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    checkpoint.load(folder)
