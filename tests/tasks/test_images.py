"""Whatever a data set calls an image becomes the same upright RGB picture, or an error that names it."""

import base64
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpt_lightning.tasks import ImageError, load_image
from cpt_lightning.tasks.images import is_encoded


def encoded(image, form="PNG", **options):
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def half_and_half(width=40, height=30):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def test_a_picture_is_the_same_from_path_bytes_hub_dict_and_memory(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(half_and_half()))
    ways = [
        path,
        str(path),
        f"file://{path}",
        path.read_bytes(),
        {"bytes": path.read_bytes(), "path": "picture.png"},
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
        half_and_half(),
    ]
    for way in ways:
        image = load_image(way)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(half_and_half()))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("lead", ["", "data:image/png;base64,", "data:image/jpeg;base64,"])
def test_base64_is_recognised_bare_and_as_data_uri(form, lead):
    text = lead + base64.b64encode(encoded(half_and_half(), form)).decode()
    assert is_encoded(text)
    image = load_image(text)
    assert image.size == (40, 30)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(half_and_half(), dtype=int)).mean() < 8  # JPEG's loss


def test_base64_may_be_broken_into_lines():
    assert load_image(base64.encodebytes(encoded(half_and_half())).decode()).size == (40, 30)


@pytest.mark.parametrize(
    "path", ["/9j/a.jpg", "R0lGOD.gif", "images/1.png", "data/image/1.png", "Qk0", "/9j/" + "a/" * 20]
)
def test_paths_are_not_taken_for_base64(path):
    assert not is_encoded(path)


def test_a_picture_may_be_made_when_it_is_asked_for():
    assert load_image(half_and_half).size == (40, 30)


def claimed(width, height):
    """A PNG file that claims a size and holds no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(10_001, 10_000), (13_000, 13_000), (100_000, 100_000)])
def test_a_huge_picture_is_refused_by_what_its_header_says(width, height):
    """100 megapixels are the limit; Pillow warns from 89 on and refuses from 179 on, with a text of its own."""
    with pytest.raises(ImageError, match=r"image 'a.png'.*100,000,000 in all are allowed: scale it down"):
        load_image({"bytes": claimed(width, height), "path": "a.png"})


def test_a_large_picture_below_the_limit_gives_no_warning():
    """It is decoded, and only then found to be empty."""
    with pytest.raises(ImageError, match=r"image \(bytes\) cannot be decoded"):
        load_image(claimed(9_600, 9_500))


def test_a_picture_taken_sideways_is_turned_upright():
    """Orientation 6: the camera was turned, the stored rows run from top to bottom at the right edge."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(encoded(half_and_half(40, 30), exif=exif))
    assert image.size == (30, 40)
    assert image.getpixel((15, 5)) == (255, 0, 0)  # the left half is now the upper one
    assert image.getpixel((15, 35)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "1"])
def test_transparent_parts_turn_white(mode):
    if mode in ("P", "L", "1"):  # one colour of the file stands for nothing
        image = Image.new(mode, (32, 32), 0)
        file = encoded(image, transparency=0)
    elif mode == "PA":
        image = Image.new("RGBA", (32, 32), (0, 0, 0, 0)).convert("PA")
        assert np.asarray(load_image(image)).min() == 255
        return
    else:
        file = encoded(Image.new(mode, (32, 32), (0, 0) if mode == "LA" else (0, 0, 0, 0)))
    assert np.asarray(load_image(file)).min() == 255


def test_half_transparent_red_on_white_is_pink():
    """255 * (1 - 128/255) = 127 of the white shows through."""
    image = load_image(Image.new("RGBA", (32, 32), (255, 0, 0, 128)))
    assert image.getpixel((0, 0)) == (255, 127, 127)


def test_a_palette_gives_its_colours():
    assert load_image(encoded(half_and_half().convert("P"))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "values, dtype, grey",
    [
        (65535, np.uint16, 255),
        (32896, np.uint16, 128),  # 32896 = 128 * 257
        (200, np.uint16, 1),  # 200 / 257, not 200
        (200, np.int32, 200),
        (25700, np.int32, 100),
        (0.5, np.float32, 128),
        (100.0, np.float32, 100),
    ],
)
def test_deep_grey_keeps_its_brightness(values, dtype, grey):
    image = Image.fromarray(np.full((30, 30), values, dtype=dtype))
    assert load_image(image).getpixel((0, 0)) == (grey, grey, grey)


def test_a_16_bit_file_is_not_clipped():
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    image = load_image(encoded(Image.fromarray(ramp)))
    assert np.abs(np.asarray(image)[..., 0] - ramp / 257).max() <= 0.5


def test_cmyk_becomes_rgb():
    image = load_image(encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = image.getpixel((0, 0))
    assert red > 250
    assert max(green, blue) < 5


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    image = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_file_is_closed_after_reading(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(half_and_half()))
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("open files cannot be counted here")
    before = len(list(open_files.iterdir()))
    images = [load_image(path) for _ in range(5)]
    assert len(images) == 5
    assert len(list(open_files.iterdir())) == before


@pytest.mark.parametrize(
    "image, message",
    [
        ("nowhere/a.png", "image 'nowhere/a.png' does not exist; correct the path"),
        (b"no picture", r"image \(bytes\) is not an image that can be read$"),
        ({"bytes": b"no picture", "path": "a.png"}, "image 'a.png' is not an image"),
        (encoded(half_and_half(200, 200), "BMP")[:5000], "image .* cannot be decoded: .*truncated"),
        (encoded(half_and_half(27, 100)), "27 x 100 pixels; the model needs 28 a side"),
        (encoded(half_and_half(28, 28 * 201)), "28 x 5628 pixels; the model takes at most 200:1"),
        ("https://example.com/a.png", "is a web address; download it"),
        ("data:image/png;base64,AAA", r"image \(base64\) cannot be read"),
        ("data:image/png;base64,AAAA", r"image \(base64\) is not an image that can be read$"),
        ({"url": "a.png"}, "neither 'bytes' nor 'path', only url"),
        ({}, "only nothing"),
        (None, "image is nothing; give a path"),
        (Image.fromarray(np.full((30, 30), -1, dtype=np.int32)), "negative"),
        (Image.fromarray(np.full((30, 30), np.nan, dtype=np.float32)), "not numbers"),
        (Image.fromarray(np.full((30, 30), 70000, dtype=np.int32)), "reach 70000, over 16 bits"),
        (Image.new("1", (20_000, 5_001)), "100,000,000 in all are allowed"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(image, message):
    with pytest.raises(ImageError, match=message):
        load_image(image)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("part", [0.2, 0.6])
def test_a_truncated_file_is_an_image_error(form, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), form)
    with pytest.raises(ImageError, match=r"\(bytes\)"):
        load_image(content[: int(len(content) * part)])


def test_a_folder_is_not_a_picture(tmp_path):
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)


def test_the_least_size_can_be_lowered():
    assert load_image(half_and_half(10, 10), min_side=10).size == (10, 10)
