import io

import numpy as np
import pytest
import torch
from PIL import Image

from model import images


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    x = images.from_uint8(levels)
    assert x.dtype == torch.float32
    assert x.shape == (4, 1, 8, 8)
    assert (x.min(), x.max()) == (-1, 1)
    assert np.array_equal(images.to_uint8(x), levels)


def test_channels_move_and_keep_their_order():
    pixels = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    x = images.from_uint8(pixels)
    assert x.shape == (2, 3, 3, 4)
    assert float(x[1, 2, 0, 3]) == pytest.approx(int(pixels[1, 0, 3, 2]) / 127.5 - 1, abs=1e-7)
    assert np.array_equal(images.to_uint8(x[1]), pixels[1])


def test_values_are_rounded_to_nearest_and_clamped():
    x = torch.tensor([-7.0, -1.0, -0.9962, -0.9960, 0.0, 0.9960, 0.9962, 1.0, 7.0]).reshape(1, 1, -1)
    # 1 level is 2 / 255 = 0.00784; -0.99608 and 0.99608 lie halfway to the ends. 0 lies between 127 and 128.
    assert images.to_uint8(x).flatten().tolist() == [0, 0, 0, 1, 128, 254, 255, 255, 255]


def test_double_and_half_precision_are_accepted():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert images.to_uint8(torch.tensor([[[-1.0, 1.0]]], dtype=dtype)).flatten().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("n", "columns", "gap", "shape"),
    [
        (1, None, 2, (3, 4)),
        (4, None, 2, (2 * 3 + 2, 2 * 4 + 2)),
        (5, None, 2, (2 * 3 + 2, 3 * 4 + 4)),
        (5, 5, 1, (3, 5 * 4 + 4)),
        (5, 2, 0, (3 * 3, 2 * 4)),
    ],
)
def test_a_sheet_lays_images_out_row_by_row(n, columns, gap, shape):
    pixels = np.stack([np.full((3, 4, 1), 10 * (i + 1), np.uint8) for i in range(n)])
    page = images.sheet(pixels, columns, gap)
    assert page.shape == (*shape, 1)
    across = (shape[1] + gap) // (4 + gap)
    for i in range(n):
        top, left = i // across * (3 + gap), i % across * (4 + gap)
        assert np.all(page[top : top + 3, left : left + 4] == 10 * (i + 1))
    assert page.astype(int).sum() == pixels.astype(int).sum()  # everything else is black


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")], ids=["grey", "rgb"])
@pytest.mark.parametrize("scale", [1, 3])
def test_a_png_holds_the_pixels(channels, mode, scale):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, channels), dtype=np.uint8)
    with Image.open(io.BytesIO(images.png(pixels, scale=scale))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (4 * scale, 5 * scale))
        found = np.asarray(image).reshape(5 * scale, 4 * scale, channels)
    assert np.array_equal(found, pixels.repeat(scale, 0).repeat(scale, 1))


def test_a_png_holds_its_text():
    text = {"seed": "17", "prompt": "Grüße, 世界", "plan": "x" * 5000}
    with Image.open(io.BytesIO(images.png(np.zeros((2, 2, 1), np.uint8), text))) as image:
        assert image.text == text


def test_the_same_image_is_the_same_bytes():
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    first = images.png(pixels, {"a": "1", "b": "2"}, scale=2)
    assert images.png(pixels.copy(), {"a": "1", "b": "2"}, scale=2) == first
    assert images.png(pixels, {"a": "1", "b": "3"}, scale=2) != first
    assert images.png(pixels ^ 1, {"a": "1", "b": "2"}, scale=2) != first


@pytest.mark.parametrize(("channels", "count"), [(1, 2), (3, 7)])
def test_an_animation_of_equal_frames_is_one(channels, count):
    """Pillow makes a plain PNG of it, which says nothing of its time."""
    frame = np.random.default_rng(3).integers(0, 256, (5, 4, channels), np.uint8)
    content = images.animation(np.stack([frame] * count), "apng", {"a": "b"})
    assert images.is_animated(content)
    assert not images.is_animated(images.png(frame))
    with Image.open(io.BytesIO(content)) as image:
        assert (image.n_frames, image.info["loop"], image.text) == (1, 0, {"a": "b"})
        assert image.info["duration"] == 1800 + 100 * (count - 2)
    (found,) = images.frames(content)
    assert np.array_equal(found, np.broadcast_to(frame, (5, 4, 3)))


def test_the_frames_of_an_animation_are_read():
    moving = np.random.default_rng(4).integers(0, 256, (3, 5, 4, 3), np.uint8)
    assert np.array_equal(images.frames(images.animation(moving, "apng")), moving)


@pytest.mark.parametrize(("channels", "shape"), [(1, (5, 4, 1)), (3, (5, 4, 3))])
def test_a_file_is_read_in_the_wanted_channels(tmp_path, channels, shape):
    pixels = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(images.png(pixels))
    assert np.array_equal(images.read(tmp_path / "a.png", channels), pixels)
    other = images.read(tmp_path / "a.png", 4 - channels)
    assert other.shape == (5, 4, 4 - channels)
    if channels == 1:
        assert np.all(other == pixels)  # grey becomes equal red, green and blue


def test_a_file_of_our_own_may_be_of_a_kind_that_is_not_taken_from_others(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    assert np.array_equal(images.read(tmp_path / "a.bmp", 3), pixels)
    with pytest.raises(images.ImageError):
        images.decode((tmp_path / "a.bmp").read_bytes(), 3)
