import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from model import data
from model.data import DataError


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, array):
    """As MNIST's files: magic 0 0 8 ndim, big-endian sizes, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(autouse=True)
def _warn_always():
    """torch says some things only once per process; here each reading must be quiet by itself."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


def test_npz_with_labels_and_names(tmp_path):
    images = pixels(3, 4, 4, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([1, 0, 1]), names=np.array(["cat", "dog"]))
    found = data.load(tmp_path / "a.npz", 4)
    assert np.array_equal(found.images, images)
    assert found.labels.tolist() == [1, 0, 1]
    assert found.labels.dtype == np.int64
    assert found.classes == ("cat", "dog")


def test_npz_of_grey_images_without_labels(tmp_path):
    images = pixels(2, 4, 4)
    np.savez(tmp_path / "a.npz", images=images)
    found = data.load(tmp_path / "a.npz", 4, channels=1)
    assert np.array_equal(found.images, images[..., None])
    assert found.labels is None
    assert found.classes == ()


def test_labels_without_names_are_named_by_their_number(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(3, 4, 4), labels=np.array([2, 0, 1], np.uint8))
    assert data.load(tmp_path / "a.npz", 4).classes == ("0", "1", "2")


def test_idx_folder_takes_the_training_half_and_its_labels(tmp_path):
    train, test = pixels(3, 4, 4, seed=1), pixels(2, 4, 4, seed=2)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", test)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([0, 0], np.uint8))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", train)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([1, 2, 0], np.uint8))
    found = data.load(tmp_path, 4)
    assert np.array_equal(found.images[..., 0], train)
    assert found.labels.tolist() == [1, 2, 0]
    assert found.classes == ("0", "1", "2")
    assert np.array_equal(data.load(tmp_path / "t10k-images-idx3-ubyte.gz", 4).images[..., 0], test)


def test_idx_file_without_labels_beside_it(tmp_path):
    write_idx(tmp_path / "images.gz", pixels(2, 4, 6))
    found = data.load(tmp_path / "images.gz", 6)
    assert found.images.shape == (2, 6, 6, 1)
    assert found.labels is None


def test_idx_images_that_are_shrunk(tmp_path):
    images = pixels(2, 8, 8)
    write_idx(tmp_path / "images.gz", images)
    expected = images.reshape(2, 4, 2, 4, 2).mean(axis=(2, 4)).round()
    assert np.array_equal(data.load(tmp_path / "images.gz", 4).images[..., 0], expected)


def test_folder_without_classes(tmp_path):
    first, second = pixels(4, 4, 3, seed=3), pixels(2, 4, 3, seed=4)
    Image.fromarray(second).save(tmp_path / "b.PNG")
    Image.fromarray(first).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = data.load(tmp_path, 4)
    assert np.array_equal(found.images[0], first)
    assert np.array_equal(found.images[1, 1:3], second)
    assert found.labels is None
    assert found.classes == ()


def test_folder_whose_subfolders_are_classes(tmp_path):
    for name, count in (("dog", 1), ("cat", 2)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(pixels(4, 4)).save(tmp_path / name / "deeper" / f"{i}.png")
    found = data.load(tmp_path, 4, channels=1)
    assert found.images.shape == (3, 4, 4, 1)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1]


def test_folder_brings_every_image_to_one_size(tmp_path):
    Image.fromarray(np.full((8, 16), 200, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((3, 3), 100, np.uint8)).save(tmp_path / "b.png")
    found = data.load(tmp_path, 4, channels=1).images[..., 0]
    assert found[0].tolist() == [[0] * 4, [200] * 4, [200] * 4, [0] * 4]
    assert found[1].tolist() == [[100, 100, 100, 0]] * 3 + [[0] * 4]


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "P"), (3, "RGBA")])
def test_folder_converts_colours(tmp_path, channels, mode):
    image = Image.fromarray(np.full((4, 4, 3), 102, np.uint8)).convert(mode)  # a grey that palettes have
    image.save(tmp_path / "a.png")
    found = data.load(tmp_path, 4, channels)
    assert found.images.shape == (1, 4, 4, channels)
    assert np.all(found.images == 102)


def test_smaller_images_are_centred_on_black():
    images = pixels(2, 4, 6, 3) | 1
    found = data.fit(images, 8)
    assert found.dtype == np.uint8
    assert np.array_equal(found[:, 2:6, 1:7], images)
    assert np.count_nonzero(found) == images.size


def test_padding_that_cannot_be_halved_puts_the_rest_right_and_below():
    found = data.fit(np.full((1, 3, 4, 1), 9, np.uint8), 4)[0, ..., 0]
    assert found.tolist() == [[9] * 4] * 3 + [[0] * 4]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 4), (12, 12), (4, 16)])
def test_larger_images_are_area_averaged(height, width):
    images, factor = pixels(3, height, width, 3), max(height, width) // 4
    h, w = height // factor, width // factor
    expected = images.reshape(3, h, factor, w, factor, 3).mean(axis=(2, 4))
    top, left = (4 - h) // 2, (4 - w) // 2
    found = data.fit(images, 4).astype(float)
    # Half of a level is rounding; a mean within float32's 1e-5 of a half may go either way.
    assert np.max(np.abs(found[:, top : top + h, left : left + w] - expected)) <= 0.5 + 1e-4
    found[:, top : top + h, left : left + w] = 0
    assert not found.any()


def test_shrinking_keeps_the_order_of_many_images():
    images = np.repeat(np.arange(9000) % 251, 4).astype(np.uint8).reshape(9000, 2, 2, 1)
    assert np.array_equal(data.fit(images, 1)[:, 0, 0, 0], np.arange(9000) % 251)


def test_a_very_long_image_keeps_at_least_a_line():
    assert data.fit(np.full((1, 1, 300, 1), 7, np.uint8), 8).max() == 7


def test_an_image_of_the_right_size_is_left_alone():
    images = pixels(2, 5, 5, 1)
    assert np.array_equal(data.fit(images, 5), images)


def npz(**arrays):
    return lambda path: np.savez(path / "a.npz", **arrays) or path / "a.npz"


def written(name, content):
    return lambda path: (path / name).write_bytes(content) and path / name


def idx_of_wrong_kind(path):
    write_idx(path / "labels.gz", np.zeros(3, np.uint8))
    return path / "labels.gz"


def idx_cut_short(path):
    write_idx(path / "images.gz", pixels(3, 4, 4))
    (path / "images.gz").write_bytes(gzip.compress(gzip.decompress((path / "images.gz").read_bytes())[:-10]))
    return path / "images.gz"


def one_array(path):
    with (path / "a.npz").open("wb") as file:
        np.save(file, IMAGES)
    return path / "a.npz"


def folder_of_text(path):
    (path / "notes.txt").write_text("no image")
    return path


def folder_with_a_broken_image(path):
    (path / "a.png").write_bytes(b"no image")
    return path


IMAGES = pixels(3, 4, 4, 1)
UNREADABLE = {
    "nothing": (lambda path: path / "nowhere", "no such file or folder"),
    "text-file": (written("a.txt", b"x"), "neither a folder of images"),
    "empty-folder": (lambda path: path, "holds no images"),
    "folder-of-text": (folder_of_text, "holds no images"),
    "folder-broken-image": (folder_with_a_broken_image, r"a\.png"),
    "npz-without-images": (npz(pixels=IMAGES), "has pixels, but no 'images'"),
    "npz-floats": (npz(images=IMAGES / 255), r"expected uint8 \[N, H, W, 1 or 3\], found float64 \[3, 4, 4, 1\]"),
    "npz-flat": (npz(images=IMAGES[0, 0]), "expected uint8"),
    "npz-two-channels": (npz(images=pixels(3, 4, 4, 2)), r"found uint8 \[3, 4, 4, 2\]"),
    "npz-empty": (npz(images=pixels(0, 4, 4, 1)), "expected uint8"),
    "npz-labels-short": (npz(images=IMAGES, labels=np.array([0, 1])), "one label of 0 or more for each of 3 images"),
    "npz-labels-negative": (npz(images=IMAGES, labels=np.array([0, 1, -1])), "one label of 0 or more"),
    "npz-names-short": (
        npz(images=IMAGES, labels=np.array([0, 1, 2]), names=np.array(["a", "b"])),
        "label 2 has no name among 2",
    ),
    "npz-label-gap": (npz(images=IMAGES, labels=np.array([0, 2, 2])), "classes without images: 1;"),
    "npz-label-huge": (npz(images=IMAGES, labels=np.array([0, 1, 2**62])), "that of image 2 is 4611686018427387904"),
    "npz-label-far": (npz(images=IMAGES, labels=np.array([0, 1, 10**6])), r"images: 2, 3, .* and 999988 more;"),
    "npz-name-without-images": (
        npz(images=IMAGES, labels=np.array([0, 1, 1]), names=np.array(["a", "b", "c"])),
        r"classes without images: 2 \(c\);",
    ),
    "npz-label-half": (npz(images=IMAGES, labels=np.array([0, 0.5, 1])), "whole number; that of image 1 is 0.5"),
    "npz-label-nan": (npz(images=IMAGES, labels=np.array([0, 1, np.nan])), "whole number; that of image 2 is nan"),
    "npz-label-complex": (npz(images=IMAGES, labels=np.array([0, 1j, 1])), "labels are complex128"),
    "npz-label-objects": (npz(images=IMAGES, labels=np.array(["a", None, "b"], object)), "'labels' is an array of Py"),
    "npz-label-one-hot": (npz(images=IMAGES, labels=np.eye(3)), r"one label of 0 or more .* found \[3, 3\]"),
    "npz-label-unknown": (
        npz(images=IMAGES, labels=np.array(["a", "x", "b"]), names=np.array(["a", "b"])),
        "labels 'x' are not among its names: a, b",
    ),
    "npz-names-only": (npz(images=IMAGES, names=np.array(["a", "b"])), "names 2 classes, but has no labels"),
    "npz-names-flat": (npz(images=IMAGES, labels=np.arange(3), names=np.array("a")), r"'names' as text \[K\]"),
    "npz-names-twice": (
        npz(images=IMAGES, labels=np.array([0, 1, 1]), names=np.array(["a", "a"])),
        "classes 'a' and 'a' have one name",
    ),
    "npz-name-empty": (npz(images=IMAGES, labels=np.array(["a", "", ""])), "'' is no name for a class"),
    "npz-no-pixels": (npz(images=pixels(3, 0, 4, 1)), "expected uint8"),
    "npz-is-npy": (one_array, "is a single array; save it with np.savez"),
    "npz-missing": (lambda path: path / "a.npz", r"a\.npz: no such file"),
    "npz-no-zip": (written("a.npz", b"no zip"), r"a\.npz: .*[^.]; is it damaged\? put a good copy in its place"),
    "npz-objects": (npz(images=np.array([None, {}], object)), r"a\.npz"),
    "idx-wrong-kind": (idx_of_wrong_kind, "is no idx file of 3-dimensional bytes"),
    "idx-missing": (lambda path: path / "a.gz", r"a\.gz"),
    "idx-no-gzip": (written("a.gz", b"no gzip"), r"a\.gz"),
    "idx-cut-short": (idx_cut_short, r"images\.gz: .*; is it damaged\?"),
}


@pytest.mark.parametrize(("make", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_data_that_cannot_be_read_is_refused(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        data.load(path, 4)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("labels", [np.array([1.0, 0.0, 1.0], np.float16), np.array([True, False, True])], ids=str)
def test_labels_of_any_type_that_are_whole_numbers(tmp_path, labels):
    found = data.load(npz(images=IMAGES, labels=labels)(tmp_path), 4)
    assert (found.labels.tolist(), found.classes, found.named) == ([1, 0, 1], ("0", "1"), False)


@pytest.mark.parametrize("kind", ["U", "S"])
def test_text_labels_become_classes_in_alphabetical_order(tmp_path, kind):
    labels = {"labels": np.array(["dog", "cat", "dog"], kind), "test_labels": np.array(["dog", "dog", "dog"], kind)}
    path = npz(images=IMAGES, test_images=IMAGES, **labels)(tmp_path)
    found = data.load(path, 4)
    assert (found.labels.tolist(), found.classes, found.named) == ([1, 0, 1], ("cat", "dog"), True)
    assert data.load(path, 4, split="test").labels.tolist() == [1, 1, 1]


def test_given_classes_name_numbers_and_order_names(tmp_path):
    path = npz(images=IMAGES, labels=np.array([1, 0, 1]))(tmp_path)
    found = data.load(path, 4, classes=("cat", "dog"))
    assert (found.labels.tolist(), found.classes) == ([1, 0, 1], ("cat", "dog"))
    with pytest.raises(DataError, match="has labels 0 to 1, but 3 classes were given; name them all"):
        data.load(path, 4, classes=("cat", "dog", "cow"))
    path = npz(images=IMAGES, labels=np.array([1, 0, 1]), names=np.array(["cat", "dog"]))(tmp_path)
    found = data.load(path, 4, classes=("dog", "cat"))
    assert (found.labels.tolist(), found.classes) == ([0, 1, 0], ("dog", "cat"))
    with pytest.raises(DataError, match="has no labels, so classes cannot be named: cat"):
        data.load(npz(images=IMAGES)(tmp_path), 4, classes=("cat",))


def test_channels_that_do_not_fit_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES)
    with pytest.raises(DataError, match="has 1 channel, not 3"):
        data.load(tmp_path / "a.npz", 4, channels=3)


def test_the_test_half_of_an_npz(tmp_path):
    train, test = pixels(3, 4, 4), pixels(2, 4, 4, seed=1)
    np.savez(tmp_path / "a.npz", images=train, labels=np.arange(3), test_images=test, test_labels=np.array([2, 0]))
    found = data.load(tmp_path / "a.npz", 4, split="test")
    assert np.array_equal(found.images[..., 0], test)
    assert found.labels.tolist() == [2, 0]


def test_the_test_half_of_an_idx_folder(tmp_path):
    for name, seed in (("train", 0), ("t10k", 1)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pixels(2, 4, 4, seed=seed))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.array([seed, seed], np.uint8))
    found = data.load(tmp_path, 4, split="test")
    assert np.array_equal(found.images[..., 0], pixels(2, 4, 4, seed=1))
    assert found.labels.tolist() == [1, 1]


def test_what_has_no_test_half_says_so(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(3, 4, 4))
    (tmp_path / "photos").mkdir()
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx" / "train-images-idx3-ubyte.gz", pixels(2, 4, 4))
    for path, words in (("a.npz", "no 'test_images'"), ("photos", "no test images of its own"), ("idx", "t10k")):
        with pytest.raises(DataError, match=words):
            data.load(tmp_path / path, 4, split="test")
