import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.checkpoint import WEIGHTS, Card, CheckpointError
from model.diffusion import machine
from model.diffusion.plan import Clip
from model.diffusion.samplers import ddpm
from model.network.config import UNetConfig
from model.network.unet import UNet

CONFIG = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
}
CARD = Card("tiny", licence="CC0-1.0", data="noise", training={"steps": 3}, numbers={"fid": 12.5})


def random_net(config=CONFIG):
    torch.manual_seed(1)
    return UNet(config).eval()


@pytest.fixture
def folder(tmp_path):
    net = random_net()
    checkpoint.save(tmp_path, net, net.state_dict(), SCHEDULER, CARD)
    return tmp_path


@torch.inference_mode()
def assert_same(net, theirs, y=None):
    """To the last bits but few: float32 on outputs near 1, the same operations."""
    x = torch.randn(2, net.config.in_channels, *net.config.size, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([3, 700])
    outputs = [
        output if isinstance(output, torch.Tensor) else output.sample for output in (net(x, t, y), theirs(x, t, y))
    ]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
    assert outputs[0].std() > 1e-3


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))


def rewrite_weights(folder, change):
    """Change the tensors and forget the card, whose hash would be the first to complain."""
    state = load_file(folder / "unet" / WEIGHTS)
    change(state)
    save_file(state, folder / "unet" / WEIGHTS)
    (folder / "card.json").unlink()


def test_what_was_saved_is_loaded(folder):
    net, found = random_net(), checkpoint.load(folder)
    assert found.net.config == CONFIG
    assert found.scheduler_config == SCHEDULER
    assert found.shape == (1, 8, 8)
    assert found.schedule.T == 1000
    assert replace(found.card, sha256="") == CARD
    assert len(found.card.sha256) == 64
    assert not found.net.training
    assert not any(parameter.requires_grad for parameter in found.net.parameters())
    for key, value in net.state_dict().items():
        assert torch.equal(found.net.state_dict()[key], value), key


def test_classes_survive_with_their_null_class(tmp_path):
    net = random_net(replace(CONFIG, num_class_embeds=3))
    card = Card("clothes", classes=("Ärmel", "boot"), null_class=2)
    written = checkpoint.save(tmp_path, net, net.state_dict(), SCHEDULER, card)
    found = checkpoint.load(tmp_path)
    assert found.card == written
    assert found.card.classes == ("Ärmel", "boot")
    assert found.card.null_class == 2


def test_the_background_is_a_colour(tmp_path):
    net = random_net()
    checkpoint.save(tmp_path, net, net.state_dict(), SCHEDULER, replace(CARD, background="#ff8000"))
    assert checkpoint.load(tmp_path).background == (255, 128, 0)
    facts = json.loads((tmp_path / "card.json").read_text())
    for wrong in ("white", "#fff", "#gggggg", 255):
        (tmp_path / "card.json").write_text(json.dumps({**facts, "background": wrong}))
        with pytest.raises(checkpoint.CheckpointError, match="no colour of the form #rrggbb"):
            checkpoint.load(tmp_path)
    del facts["background"]
    (tmp_path / "card.json").write_text(json.dumps(facts))
    assert checkpoint.load(tmp_path).background == (0, 0, 0)


def test_the_saved_state_is_the_one_given(tmp_path):
    # The moving average is written, not the network's own weights.
    net = random_net()
    average = {key: value / 2 for key, value in net.state_dict().items()}
    checkpoint.save(tmp_path, net, average, SCHEDULER, CARD)
    assert torch.equal(checkpoint.load(tmp_path).net.conv_in.weight, average["conv_in.weight"])


def test_diffusers_opens_our_network(folder):
    theirs = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    assert_same(checkpoint.load(folder).net, theirs)


@torch.inference_mode()
def test_diffusers_opens_our_folder_as_a_pipeline(folder):
    pipeline = DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    ours = checkpoint.load(folder)
    assert_same(ours.net, pipeline.unet.eval())
    seeds = [5, 6]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = pipeline(2, generators, num_inference_steps=10, output_type="np").images
    found = machine.sample(ours.net, ddpm(ours.schedule, 10, clip=Clip(1.0)), seeds, ours.shape)
    # float32, 10 steps: see test_machine; the pipeline's images lie in [0, 1].
    assert (found.clamp(-1, 1) / 2 + 0.5 - torch.from_numpy(theirs).movedim(-1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")])
@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_what_diffusers_saved_is_opened(tmp_path, layout, scheduler):
    torch.manual_seed(3)
    config = CONFIG.to_dict()
    theirs = UNet2DModel.from_config(config).eval()
    if layout == "nested":
        DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path)
    else:
        theirs.save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
    found = checkpoint.load(tmp_path)
    assert_same(found.net, theirs)
    assert found.card.name == tmp_path.name
    assert len(found.card.sha256) == 64
    # diffusers' levels are float32; test_schedule derives this bound.
    assert abs(found.schedule.alphas_cumprod[999] / float(scheduler.alphas_cumprod[999]) - 1) < 9e-5


def test_attention_names_of_old_files_are_understood(folder):
    def age(state):
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for key in list(state):
            for new, name in old.items():
                if "attentions" in key and f".{new}." in key:
                    state[key.replace(f".{new}.", f".{name}.")] = state.pop(key)

    before = checkpoint.load(folder).net.state_dict()
    rewrite_weights(folder, age)
    keys = load_file(folder / "unet" / WEIGHTS)
    assert "mid_block.attentions.0.proj_attn.weight" in keys
    assert not any("to_" in key for key in keys)
    after = checkpoint.load(folder).net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_half_precision_files_become_float32(folder):
    rewrite_weights(folder, lambda state: state.update({key: value.half() for key, value in state.items()}))
    assert {parameter.dtype for parameter in checkpoint.load(folder).net.parameters()} == {torch.float32}


def set_tensor(key, value):
    return lambda folder: rewrite_weights(folder, lambda state: state.update({key: value}))


def spoil(folder):
    state = load_file(folder / "unet" / WEIGHTS)
    state["conv_in.weight"][0, 0, 1, 1] = torch.nan
    save_file(state, folder / "unet" / WEIGHTS)
    (folder / "card.json").unlink()


def truncate(folder):
    weights = folder / "unet" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "card.json").unlink()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 456\n"


def pickle_only(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


BROKEN = {
    "no-unet": (lambda f: [p.unlink() for p in (f / "unet").iterdir()], r"unet.config\.json is missing"),
    "no-scheduler": (
        lambda f: (f / "scheduler" / "scheduler_config.json").unlink(),
        r"scheduler_config\.json is missing; a checkpoint is a folder with model_index\.json, unet/ and scheduler/",
    ),
    "no-weights": (lambda f: (f / "unet" / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "bin-only": (pickle_only, "must first be converted to safetensors"),
    "truncated": (truncate, r"model\.safetensors is no readable safetensors file: .*[^.]; copy the file anew"),
    "nan": (spoil, r"conv_in\.weight is not finite"),
    "shape": (set_tensor("conv_out.bias", torch.zeros(2)), r"conv_out\.bias is \[2\], in the config \[1\]"),
    "missing-tensor": (
        lambda f: rewrite_weights(f, lambda state: state.pop("conv_in.bias")),
        r"lacks 1 tensor of the config, such as conv_in\.bias",
    ),
    "extra-tensor": (set_tensor("logvar", torch.zeros(2)), "has 1 tensor beyond the config, such as logvar"),
    "hash": (
        lambda f: edit(f / "card.json", sha256="0" * 64),
        'sha256 = "0{64}": the weights\' sha256 is [0-9a-f]{64}',
    ),
    "bad-json": (
        lambda f: (f / "unet" / "config.json").write_text("{"),
        r"config\.json is no JSON in UTF-8: Expecting .* \(char 1\); mend it, or copy the file anew",
    ),
    "not-text": (
        lambda f: (f / "unet" / "config.json").write_bytes(b"\xff\xfe{}"),
        r"config\.json is no JSON in UTF-8: byte 0 is 0xff; save it as UTF-8",
    ),
    "empty": (
        lambda f: (f / "unet" / "config.json").write_text(" "),
        r"config\.json is no JSON in UTF-8: the file is empty; mend it",
    ),
    "lfs": (
        lambda f: (f / "unet" / "config.json").write_bytes(LFS),
        r"config\.json is no JSON in UTF-8: it is a pointer of Git LFS, not the file itself; .* git lfs pull",
    ),
    "lfs-weights": (
        lambda f: (f / "unet" / WEIGHTS).write_bytes(LFS) and (f / "card.json").unlink(),
        r"model\.safetensors is no readable safetensors file: it is a pointer of Git LFS, .* git lfs pull",
    ),
    "json-list": (lambda f: (f / "card.json").write_text("[]"), r"card\.json: expected an object, found list; mend it"),
    "card-key": (lambda f: edit(f / "card.json", license="MIT"), r"card\.json: .*license"),
    "card-nameless": (lambda f: edit(f / "card.json", name=...), r"card\.json: .*name"),
    "classes": (
        lambda f: edit(f / "card.json", classes=["a"]),
        "names classes, but the network is not class-conditional",
    ),
    "no-size": (lambda f: edit(f / "unet" / "config.json", sample_size=...), r"config\.json: sample_size is missing"),
    "other-network": (lambda f: edit(f / "unet" / "config.json", act_fn="gelu"), "act_fn = 'gelu' is not supported"),
    "other-schedule": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_schedule="laplace"),
        'beta_schedule = "laplace"',
    ),
    "heads": (lambda f: edit(f / "unet" / "config.json", attention_head_dim=5), "attention_head_dim 5 does not divide"),
    "attn-norm": (
        lambda f: edit(f / "unet" / "config.json", attn_norm_num_groups=5),
        "attn_norm_num_groups|num_groups",
    ),
    "wrong-type": (
        lambda f: edit(f / "unet" / "config.json", down_block_types=[1, 2]),
        "down_block_types|removeprefix",
    ),
    "not-a-number": (lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_end="high"), "high"),
}


@pytest.mark.parametrize(("breaking", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused(folder, breaking, message):
    checkpoint.load(folder)
    breaking(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)


def test_nothing_there():
    with pytest.raises(CheckpointError, match=r"^nowhere: no such folder; a checkpoint is a folder with model_index"):
        checkpoint.load(Path("nowhere"))


def test_what_is_no_checkpoint_is_answered_with_the_one_that_is_meant(folder, tmp_path):
    photos, weights, mine = tmp_path / "photos", tmp_path / "weights", tmp_path / "weights" / "mine"
    parts = list(folder.iterdir())
    (photos / "red").mkdir(parents=True)
    mine.mkdir(parents=True)
    for part in parts:
        part.rename(mine / part.name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"")
    for path, words in (
        (photos, "is no checkpoint; neither unet/ nor config.json is in it; a checkpoint is a folder with model_index"),
        (weights, f"is no checkpoint; give one of those in it, such as {mine}"),
        (tmp_path / "run", "is no checkpoint; it holds a run of unstir train without a checkpoint yet"),
        (mine / "card.json", f"is a file; give the checkpoint's folder, {mine}"),
        (mine / "unet" / WEIGHTS, f"is a file; give the checkpoint's folder, {mine}"),
        (mine / "unet", f"is a part of a checkpoint; give the checkpoint's folder, {mine}"),
    ):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        assert str(caught.value).startswith(f"{path} {words}")
    (mine / "scheduler").rename(tmp_path / "s")
    (mine / "unet").rename(tmp_path / "unet")
    with pytest.raises(CheckpointError, match="mine has no folder unet; a checkpoint is a folder with"):
        checkpoint.load(mine)


def test_others_may_read_the_weights(folder):
    # safetensors' own save_file gives 0600, and the user inside a container is somebody else.
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*") if path.is_file())


def test_loading_needs_no_compiler(tiny):
    """Parts of torch and diffusers that take seconds to load are loaded when used, and a start has no use for them."""
    command = (
        "import sys; from pathlib import Path; from model.checkpoint import load; load(Path(sys.argv[1])); "
        "print([name for name in ('torch._dynamo', 'sympy', 'triton', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, tiny], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
