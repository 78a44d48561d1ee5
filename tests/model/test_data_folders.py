"""Folders as file managers, notebooks and archives leave them."""

import numpy as np
import pytest
from PIL import Image

from model import data
from model.data import DataError


def draw(path, value=100, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), value).save(path)


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(("cat", "dog")):
        draw(tmp_path / "data" / name / "a.png", k)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/a.png",
        ".cache/a.png",
        "__MACOSX/cat/a.png",
        "cat/._a.jpg",
        "cat/.ipynb_checkpoints/a.png",
        "dog/deeper/.b.png",
        ".DS_Store",
    ],
)
def test_hidden_files_and_folders_are_skipped_and_counted(folder, name):
    hidden = folder / name
    hidden.parent.mkdir(parents=True, exist_ok=True)
    hidden.write_bytes(b"no image")
    found = data.load(folder, 4)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 1]
    (notice,) = found.notices
    assert "skipped 1 hidden file or folder: " in notice


def test_a_folder_with_nothing_but_hidden_folders_beside_its_images_has_no_classes(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / ".ipynb_checkpoints" / "a.png")
    found = data.load(tmp_path, 4)
    assert (len(found.images), found.labels, found.classes) == (1, None, ())


def test_a_folder_that_is_itself_hidden_can_be_read(tmp_path):
    draw(tmp_path / ".data" / "cat" / "a.png")
    assert data.load(tmp_path / ".data", 4).classes == ("cat",)


def test_files_of_other_types_are_named_with_their_counts(folder):
    for name in ("cat/a.tif", "cat/b.TIF", "dog/c.avif", "dog/deeper/notes"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    (notice,) = data.load(folder, 4).notices
    assert notice.endswith(": 2 .tif, 1 .avif, 1 no suffix")


def test_every_class_without_images_is_named(folder):
    (folder / "bird").mkdir()
    (folder / "fish").mkdir()
    (folder / "fish" / "a.tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"class folders without images: bird, fish \(1 \.tif\); fill or remove them"):
        data.load(folder, 4)


def test_all_files_that_cannot_be_read_are_named_at_once(folder):
    (folder / "cat" / "b.png").write_bytes(b"no image")
    (folder / "dog" / "c.png").write_bytes((folder / "dog" / "a.png").read_bytes()[:50])
    with pytest.raises(DataError, match="2 of 4 images cannot be read") as caught:
        data.load(folder, 4)
    assert "cat/b.png (" in str(caught.value)
    assert "dog/c.png (" in str(caught.value)


def test_one_is_not_called_many(folder, tmp_path):
    for name in (".a", ".b"):
        (folder / name).touch()
    (notice,) = data.load(folder, 4).notices
    assert notice.endswith("skipped 2 hidden files and folders: .a, .b")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"its only image cannot be read; mend or remove a\.png"):
        data.load(tmp_path / "one", 4)


def test_a_long_list_of_broken_files_ends_with_a_count(folder):
    for k in range(13):
        (folder / "cat" / f"broken-{k:02}.png").write_bytes(b"no image")
    (folder / "cat" / "broken-03.png").rename(folder / "cat" / "broken-03\n.png")
    with pytest.raises(DataError, match=r"13 of 15 images .* and 3 more$") as caught:
        data.load(folder, 4)
    assert str(caught.value).count("broken-") == 10
    assert "it is no image" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_to_folders_are_counted_and_not_followed(folder):
    (folder / "cat" / "all").symlink_to(folder)
    found = data.load(folder, 4)
    assert len(found.images) == 2
    assert "1 link to a folder" in found.notices[0]


def test_classes_that_differ_in_case_only_are_refused(folder):
    draw(folder / "Cat" / "a.png")
    with pytest.raises(DataError, match="classes 'Cat' and 'cat' have one name, but for case"):
        data.load(folder, 4)


def test_given_classes_order_the_folders_by_name(folder):
    found = data.load(folder, 4, classes=("dog", "cat"))
    assert found.classes == ("dog", "cat")
    assert found.labels.tolist() == [1, 0]
    assert found.images[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(DataError, match="has the classes cat, dog; those given are cat, cow"):
        data.load(folder, 4, classes=("cat", "cow"))


@pytest.mark.parametrize(("channels", "expected"), [(3, [200, 100, 50]), (1, [124])])
def test_the_background_is_behind_and_around_images(tmp_path, channels, expected):
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    found = data.load(tmp_path, 4, channels, background=(200, 100, 50))
    assert np.all(found.images == expected)
