import json
import math

import numpy as np
import pytest
import torch

from model import images
from model.checkpoint import load
from model.data import DataError, Dataset
from model.diffusion import machine
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.samplers import SAMPLERS
from model.evaluation import classifier, report, roundtrip, sampling
from model.evaluation.frechet import frechet_distance
from model.evaluation.imagenet import efficientnet
from model.evaluation.reference import read_reference
from model.evaluation.run import evaluate
from model.evaluation.scope import QUICK, VARIANTS, Scope, cells
from tests.conftest import CLASSES

CPU = torch.device("cpu")
SMALL = Scope(images=6, budgets=(5, 10), long=None, inverted=3, inversion_steps=(4,), reference=40)


def cloud(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def textbook(a, b):
    """The formula as it is written, through the eigenvalues of Σ_a Σ_b."""
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(sigma_a @ sigma_b).real, 0, None))
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(sigma_a) + np.trace(sigma_b) - 2 * roots.sum()


@pytest.mark.parametrize(("n", "m"), [(200, 300), (20, 300), (300, 20), (20, 20)], ids=str)
def test_frechet_distance_is_the_textbooks(n, m):
    a, b = cloud(n, 30, 1), cloud(m, 30, 2)
    # Where there are fewer images than features, the textbook's eigenvalues near 0 carry errors of their roots.
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-9 if min(n, m) > 30 else 1e-5)


def test_frechet_distance_of_known_gaussians():
    a, b = cloud(500, 4, 1), cloud(400, 4, 2)

    def white(x, mean, deviations):
        """Exactly these moments."""
        centred = x - x.mean(0)
        return centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred, rowvar=False))).T * deviations + mean

    a = white(a, np.array([0, 0, 0, 1.0]), np.array([1, 2, 3, 1.0]))
    b = white(b, np.array([0, 0, 2, 0.0]), np.array([1, 1, 1, 0.5]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 0 + 1 + 4 + 0.25)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)


def shades(n, seed=0):
    """Dark, middle and bright 8x8 squares."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.integers(0, 60, (n, 8, 8, 1)) + labels[:, None, None, None] * 90
    return Dataset(images.astype(np.uint8), labels.astype(np.int64), ("dark", "middle", "bright"))


def test_the_classifier_learns_once_and_is_read_afterwards(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "classifier.safetensors"
    net = classifier.load_or_train(path, shades(2000), CPU)
    fresh = shades(100, seed=1)
    features, decisions = classifier.classify(net, fresh.images, CPU)
    assert features.shape == (100, 64)
    assert (decisions == fresh.labels).mean() > 0.95
    monkeypatch.setattr(torch.optim, "AdamW", None)  # a second training would fail
    again = classifier.load_or_train(path, shades(10), CPU)
    assert np.array_equal(classifier.classify(again, fresh.images, CPU)[0], features)


def test_efficientnet_has_1280_features(tmp_path):
    features = efficientnet(CPU, tmp_path / "features")
    images = shades(3).images
    found = features(images)
    assert found.shape == (3, 1280)
    assert np.isfinite(found).all()
    assert np.ptp(found, axis=0).max() > 0.01
    assert np.allclose(features(images[1:]), found[1:], atol=1e-4)  # float32 sums in another order
    assert np.array_equal(features(images), found)
    assert len(list((tmp_path / "features").iterdir())) == 2  # kept, and read the third time


def test_every_sampler_is_compared_within_its_budget(tiny):
    ckpt = load(tiny)
    defaults = SamplingDefaults.from_config(ckpt.scheduler_config)
    found = list(cells(ckpt.schedule, defaults, Scope()))
    assert {cell.sampler for cell in found} == SAMPLERS.keys()
    assert {cell.variant for cell in found} == VARIANTS.keys()
    for cell in found:
        assert cell.plan.nfe <= cell.budget < cell.plan.nfe + SAMPLERS[cell.sampler].evaluations[0]
    assert [cell.variant for cell in found if cell.budget == 1000] == ["ddpm"]
    assert len({cell.plan.digest for cell in found}) == len(found)
    assert sum(cell.plan.nfe for cell in cells(ckpt.schedule, defaults, QUICK)) <= 35 * len(VARIANTS)


def test_drawing_continues_where_it_was_and_gives_what_the_server_would(tiny, tmp_path, monkeypatch):
    ckpt = load(tiny)
    cell = next(cells(ckpt.schedule, SamplingDefaults.from_config(ckpt.scheduler_config), SMALL))
    monkeypatch.setattr(sampling, "CHUNK", 4)
    sampling.draw(ckpt, [cell], 11, tmp_path / "whole", CPU)
    sampling.draw(ckpt, [cell], 5, tmp_path / "parts", CPU)
    calls = []
    real = machine.sample

    def counted(net, plan, seeds, *rest):
        calls.append(list(seeds))
        return real(net, plan, seeds, *rest)

    monkeypatch.setattr(machine, "sample", counted)
    sampling.draw(ckpt, [cell], 11, tmp_path / "parts", CPU)
    assert calls == [[5, 6, 7, 8], [9, 10]]
    sampling.draw(ckpt, [cell], 11, tmp_path / "parts", CPU)
    assert len(calls) == 2
    whole, parts = (np.load(next((tmp_path / name).glob("*.npy"))) for name in ("whole", "parts"))
    # Chunks of other widths move the last float32 bits, which may tip a pixel over to the next of 256 values.
    assert np.abs(whole.astype(int) - parts).max() <= 1
    alone = real(ckpt.net, cell.plan, [7], ckpt.shape, torch.tensor([7 % 3]))
    assert np.abs(whole[7].astype(int) - images.to_uint8(alone)[0]).max() <= 1


def test_round_trips_are_measured_once(tiny, tmp_path, monkeypatch):
    ckpt = load(tiny)
    todo = list(roundtrip.round_trips(ckpt.schedule, (4, 50)))
    assert {trip.method for trip in todo} >= {"ddim", "ddim, source time", "fixed_point, 10 refinements", "obelm, pair"}
    todo = [trip for trip in todo if trip.steps == 4]
    rows = roundtrip.measure(ckpt, todo, shades(9), 5, tmp_path, CPU)
    assert [row["nfe"] for row in rows] == [4, 8, 16, 4]
    pair = rows[-1]
    assert pair["method"] == "obelm, pair"
    assert pair["psnr"]["median"] > rows[0]["psnr"]["median"]
    assert all(("residual" in row) == row["method"].startswith("fixed_point") for row in rows)
    monkeypatch.setattr(machine, "run_slots", None)  # a second measurement would fail
    assert roundtrip.measure(ckpt, todo, shades(9), 5, tmp_path, CPU) == rows


def test_the_floor_has_the_classes_of_the_samples():
    real, labels = shades(60), np.arange(7) % 3
    draws = sampling.balanced_draws(real, labels, 7)
    assert len(draws) == 4
    assert len(set(np.concatenate(draws))) == 28
    for index in draws:
        assert np.bincount(real.labels[index]).tolist() == [3, 2, 2]
    assert [len(index) for index in sampling.balanced_draws(real, labels[:1].repeat(9), 9)] == [
        9,
        9,
    ]  # some 20 are dark
    for plain in (
        sampling.balanced_draws(real, None, 20),
        sampling.balanced_draws(Dataset(real.images, None, ()), labels, 20),
    ):
        assert sorted(np.concatenate(plain)) == list(range(60))


def test_psnr_and_exactness_mean_what_they_say(monkeypatch, tiny):
    """A round trip that is off by 0.001 in every pixel has 20 log10(2 / 0.001) dB, and rounds to the same bytes."""
    ckpt = load(tiny)
    trip = next(roundtrip.round_trips(ckpt.schedule, (4,)))
    x_0 = images.from_uint8(shades(2).images)
    monkeypatch.setattr(machine, "run_slots", lambda net, plan, slots, y: slots + 0.0005)
    found = roundtrip._round_trip(ckpt, trip, x_0, None)
    assert found["psnr"] == pytest.approx([20 * math.log10(2 / 0.001)] * 2, rel=1e-4)
    assert found["exact"] == [1, 1]
    monkeypatch.setattr(machine, "run_slots", lambda net, plan, slots, y: slots + 0.005)
    assert roundtrip._round_trip(ckpt, trip, x_0, None)["exact"] == [0, 0]


def save(path, **more):
    data = shades(300)
    np.savez(path, images=data.images, labels=data.labels, names=np.array(CLASSES), **more)
    return path


def test_data_whose_classes_have_another_order_is_matched_by_name(tiny, tmp_path):
    """As after `unstir train --classes`, which orders them for the network."""
    loaded, data = load(tiny), shades(20)
    held_out = {"test_images": data.images, "test_labels": data.labels}
    np.savez(tmp_path / "a.npz", images=data.images, labels=data.labels, names=np.array(CLASSES), **held_out)
    order = [2, 0, 1]  # of the names; label k is at order.index(k)
    moved = {key: np.array(order).argsort()[data.labels] for key in ("labels", "test_labels")}
    arrays = {"images": data.images, "test_images": data.images, **moved}
    np.savez(tmp_path / "b.npz", names=np.array(CLASSES)[order], **arrays)
    one, other = (read_reference(tmp_path / name, loaded) for name in ("a.npz", "b.npz"))
    assert one.digest == other.digest
    for part in (other.training, other.held_out):
        assert part.classes == CLASSES
        assert np.array_equal(part.labels, data.labels)


def test_the_whole_evaluation(tiny, tmp_path):
    test = shades(60, seed=5)
    source = save(tmp_path / "shades.npz", test_images=test.images, test_labels=test.labels)
    page = evaluate(tiny, source, tmp_path / "out", tmp_path / "work", SMALL, CPU, command="unstir evaluate …")
    facts = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert facts["checkpoint"]["name"] == "tiny"
    assert len(facts["samplers"]["cells"]) == 2 * len(VARIANTS)
    assert all(row["frechet"].keys() == {"classifier", "efficientnet"} for row in facts["samplers"]["cells"])
    assert all(0 <= row["accuracy"] <= 1 for row in facts["samplers"]["cells"])
    floor = facts["samplers"]["floor"]["classifier"]
    # A network with random weights draws nothing like the data, and real images are much like each other.
    assert all(row["frechet"]["classifier"] > 2 * floor["mean"] for row in facts["samplers"]["cells"])
    assert (tmp_path / "out" / "quality.md").read_text() == page
    for variant in VARIANTS:
        assert f"| {variant} |" in page
    for name in ("quality-samplers.png", "quality-inversion.png"):
        assert name in page
        assert images.read(tmp_path / "out" / name, 3).std() > 5
    assert "that training did not see" in page
    only = evaluate(tiny, source, tmp_path / "out2", tmp_path / "work", SMALL, CPU, parts=("inversion",))
    assert "Round trips" in only
    assert "## Samples" not in only


def test_without_held_out_images_a_part_of_the_training_set_is_set_apart(tiny, tmp_path):
    source = save(tmp_path / "shades.npz")
    page = evaluate(tiny, source, tmp_path / "out", tmp_path, SMALL, CPU, parts=("inversion",))
    assert "3 images of the training set, which has no others" in page


def test_few_images_are_inverted_and_another_data_set_is_measured_anew(tiny, tmp_path):
    pages = []
    for seed in (0, 1):
        np.savez(tmp_path / "few.npz", images=shades(9, seed).images)
        pages.append(evaluate(tiny, tmp_path / "few.npz", tmp_path, tmp_path, SMALL, CPU, parts=("inversion",)))
    assert all("1 images of the training set" in page for page in pages)
    assert pages[0] != pages[1]


def test_a_figure_that_is_no_number_is_null_in_the_json(tmp_path):
    facts = {"checkpoint": {"name": "x", "sha256": "0" * 64}, "command": "c", "unseen": True, "odd": [{"a": math.nan}]}
    report.write(tmp_path, facts)
    assert json.loads((tmp_path / "quality.json").read_text())["odd"] == [{"a": None}]


def test_images_without_labels_need_efficientnet(tiny, tmp_path, monkeypatch):
    np.savez(tmp_path / "plain.npz", images=shades(40).images)
    monkeypatch.setattr("model.evaluation.run.efficientnet", lambda device, folder: None)
    with pytest.raises(DataError, match="EfficientNet only"):
        evaluate(tiny, tmp_path / "plain.npz", tmp_path / "out", tmp_path, SMALL, CPU, parts=("samplers",))


def test_a_page_without_plots_has_no_images():
    row = {"variant": "ddim", "budget": 5, "nfe": 5, "frechet": {"classifier": 123.4}}
    found = {"images": 2, "reference": 3, "floor": {"classifier": {"mean": 0.5, "spread": 0.01}}, "cells": [row]}
    page = report.page(
        {"checkpoint": {"name": "x", "sha256": "0" * 64}, "command": "c", "unseen": True, "samplers": found}, {}
    )
    assert "![" not in page
    assert "| ddim | 123 |" in page
    assert "assigns to the requested class" not in page
