"""What a run keeps: its last sound state, its card, its classes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.training.recipe import DivergedError, RecipeError, TrainingError
from model.training.run import publish, train
from model.training.trainer import Trainer
from tests.tiny_training import CPU, TINY, assert_equal_states, shades

SHORT = replace(TINY, steps=2)


@pytest.fixture(autouse=True)
def _no_samples(monkeypatch):
    monkeypatch.setattr("model.training.run.grid", lambda net, classes: np.zeros((2, 2, 1), np.uint8))


def save(path, names=("dark", "light"), labels=None, channels=1):
    dataset = shades(10)
    images = dataset.images.repeat(channels, -1)
    np.savez(path, images=images, labels=dataset.labels if labels is None else labels, names=np.array(names))
    return path


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "data.npz")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.training.run.grid", lambda net, classes: np.zeros((2, 2, 1), np.uint8))
        train(save(folder / "data.npz"), folder / "out", SHORT, CPU)
    return folder / "out"


@pytest.fixture
def out(tmp_path, finished):
    """A run of two steps."""
    return shutil.copytree(finished, tmp_path / "out")


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_diverges_stops_and_leaves_what_was_there(tmp_path, source, out):
    before = content(out)
    words = r"diverged at step \d, the loss is .*state\.pt is that of step 2; continue with --resume and a lower --lr$"
    with pytest.raises(DivergedError, match=words) as caught:
        train(source, out, replace(TINY, lr=1e30, warmup=0), CPU, resume=True)
    assert 3 <= caught.value.step <= 5
    assert content(out) == before
    assert train(source, out, TINY, CPU, resume=True).step == 7


def test_a_run_that_diverges_before_it_saved_says_so(tmp_path, source):
    with pytest.raises(DivergedError, match="nothing was saved yet; start again with a lower --lr"):
        train(source, tmp_path / "out", replace(TINY, lr=1e30, warmup=0), CPU)
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_the_first_step_that_went_wrong_is_remembered(monkeypatch, value):
    trainer = Trainer.start(TINY, shades(4), CPU)
    gradient = Trainer._gradient

    def spoiled(self, batch):
        return gradient(self, batch) + (value if self.step == 2 else 0.0)

    monkeypatch.setattr(Trainer, "_gradient", spoiled)
    for _ in range(2):
        trainer.advance()
        trainer.check(weights=True)
    for _ in range(4):
        trainer.advance()
    with pytest.raises(DivergedError) as caught:
        trainer.check()
    assert caught.value.step == 3


@pytest.mark.parametrize("which", ["net", "ema"])
def test_weights_that_are_not_finite_are_never_written(tmp_path, which):
    trainer = Trainer.start(TINY, shades(4), CPU)
    trainer.advance()
    trainer.save_state(tmp_path / "state.pt")
    before = content(tmp_path)
    with torch.no_grad():
        next(getattr(trainer, which).parameters()).view(-1)[0] = float("nan")
    with pytest.raises(DivergedError, match="at step 1"):
        trainer.save_state(tmp_path / "state.pt")
    with pytest.raises(DivergedError, match="at step 1"):
        publish(trainer, tmp_path)
    assert content(tmp_path) == before


def test_a_state_of_a_run_that_diverged_is_refused(tmp_path):
    trainer = Trainer.start(TINY, shades(4), CPU)
    trainer.save_state(tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "loss": float("nan")}, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="this run diverged before it was saved"):
        trainer.load_state(tmp_path / "state.pt")


def test_a_recipe_is_finite():
    with pytest.raises(RecipeError, match="minutes = inf: must be finite"):
        replace(TINY, minutes=float("inf"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, source, monkeypatch):
    trainer = train(source, tmp_path / "out", replace(TINY, steps=1), CPU)
    before = content(tmp_path / "out")
    save_ = checkpoint.save

    def full(path, *rest):
        save_(path, *rest)
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left"):
        publish(trainer, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_resumed_run_keeps_its_card_but_for_what_is_given(tmp_path, source):
    facts = {"name": "Shades", "description": "Greys.", "licence": "MIT", "background": "#ffffff"}
    train(source, tmp_path / "out", SHORT, CPU, card=facts)
    path = tmp_path / "out" / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "description": "By hand."}))
    train(source, tmp_path / "out", TINY, CPU, resume=True, card={"licence": "CC0-1.0"})
    card = checkpoint.load(tmp_path / "out").card
    assert (card.name, card.description, card.licence) == ("Shades", "By hand.", "CC0-1.0")
    assert card.background == "#ffffff"
    assert card.training["steps"] == 7


def test_facts_of_a_run_that_was_killed_before_its_first_checkpoint_are_kept(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("model.training.run.publish", lambda *_, **__: None)
        train(source, tmp_path / "out", SHORT, CPU, card={"licence": "MIT"}, classes=("light", "dark"))
    train(source, tmp_path / "out", SHORT, CPU, resume=True)
    card = checkpoint.load(tmp_path / "out").card
    assert (card.licence, card.classes) == ("MIT", ("light", "dark"))


def test_new_facts_reach_the_card_before_the_next_checkpoint(tmp_path, source, monkeypatch, out):
    monkeypatch.setattr("model.training.run.publish", lambda *_, **__: None)
    train(source, out, TINY, CPU, resume=True, card={"licence": "MIT"})
    assert checkpoint.load(out).card.licence == "MIT"


def test_images_are_read_on_the_background_of_the_card(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(tmp_path / "data" / "a.png")
    runs = [
        train(tmp_path / "data", tmp_path / "out", SHORT, CPU, card={"background": "#0a141e"}),
        train(tmp_path / "data", tmp_path / "out", TINY, CPU, resume=True),
    ]
    for run in runs:
        assert np.all(run.dataset.images == [10, 20, 30])
    with pytest.raises(TrainingError, match="background 'white' is no colour of the form #rrggbb"):
        train(tmp_path / "data", tmp_path / "out", TINY, CPU, resume=True, card={"background": "white"})


@pytest.mark.parametrize(
    ("names", "count", "old", "words"),
    [
        (("light", "dark"), 2, False, "was trained with other classes: 0 was 'dark', now it is 'light'; keep their"),
        (("light", "dark"), 2, True, "was trained with other classes: 0 was 'dark', now it is 'light'; keep their"),
        (("dark", "bright"), 2, False, "was trained with other classes: 1 was 'light', now it is 'bright'"),
        (("a", "b", "c"), 3, False, r"with 2 classes \(dark, light\), the data has 3 classes \(a, b, c\)"),
    ],
    ids=["reordered", "state-without-classes", "renamed", "more"],
)
def test_other_classes_are_refused_by_name_and_order(source, out, names, count, old, words):
    if old:  # as it was before states had them; the card does
        state = torch.load(out / "state.pt", weights_only=True)
        for key in ("classes", "classes_given", "card"):
            del state[key]
        torch.save(state, out / "state.pt")
    before = content(out)
    with pytest.raises(TrainingError, match=words):
        train(save(source, names, np.arange(10) % count), out, TINY, CPU, resume=True, card={"licence": "MIT"})
    assert content(out) == before


def test_images_of_other_channels_are_refused(tmp_path, source, out):
    with pytest.raises(TrainingError, match="was trained on images of 1 channels, these have 3"):
        train(save(source, channels=3), out, TINY, CPU, resume=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def empty(path):
    path.write_bytes(b"")


def another_file(path):
    torch.save([1, 2], path)


def without_a_key(path):
    torch.save({**torch.load(path, weights_only=True), "net": None}, path)


def of_other_weights(path):
    torch.save({**torch.load(path, weights_only=True), "ema": {"weight": torch.ones(3)}}, path)


def of_another_recipe(path):
    torch.save({**torch.load(path, weights_only=True), "recipe": {"colour": 1}}, path)


@pytest.mark.parametrize("spoil", [cut, empty, another_file, without_a_key, of_other_weights, of_another_recipe])
def test_a_damaged_state_is_an_error_of_one_line(tmp_path, source, spoil, out):
    spoil(out / "state.pt")
    with pytest.raises(TrainingError, match=r"^\S+state\.pt is damaged; put a good copy in its place") as caught:
        train(source, out, TINY, CPU, resume=True)
    assert "\n" not in str(caught.value)


def test_a_damaged_card_is_refused_before_it_is_lost(tmp_path, source, out):
    (out / "card.json").write_text('{"name": "Sha')
    with pytest.raises(TrainingError, match=r"card\.json cannot be read \(.*\); mend it, or delete it"):
        train(source, out, TINY, CPU, resume=True)


def test_a_state_holds_all_of_a_run(tmp_path):
    first = Trainer.start(TINY, shades(4), CPU)
    first.facts, first.classes_given = {"licence": "MIT"}, ("dark", "light")
    first.advance()
    first.save_state(tmp_path / "state.pt")
    second = Trainer.start(TINY, shades(4), CPU)
    second.load_state(tmp_path / "state.pt")
    assert_equal_states(first, second)
    assert (second.saved, int(second.sound)) == (1, 1)
    second.advance()
    second.check(weights=True)
