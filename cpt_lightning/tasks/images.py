"""Whatever a data set calls an image -> an upright RGB picture."""

from __future__ import annotations

import base64
import os
import re
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cpt_lightning.tasks.records import kind_of

ImageInput = str | os.PathLike[str] | bytes | dict | Image.Image | Callable[[], Image.Image]
"""A path, an encoded file's bytes, these in base64 (bare or as a data URI), the hub's ``{"bytes": ..., "path": ...}``,
a decoded picture, or what makes one when it is asked for."""

MIN_SIDE = 28
"""Pixels; one visual token of Qwen2.5-VL covers 2 x 2 patches of 14 pixels."""
MAX_PIXELS = 100_000_000
MAX_ASPECT_RATIO = 200
"""Qwen2.5-VL's own limit on the longer side over the shorter."""

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
# What the first bytes of JPEG, PNG, GIF, WebP, TIFF (both byte orders) and BMP are in base64.
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3])[A-Za-z0-9+/\s]{60,}={0,2}\s*")


class ImageError(ValueError):
    """A picture that is missing, cannot be read, or cannot be shown to the model."""


def load_image(image: ImageInput, min_side: int = MIN_SIDE) -> Image.Image:
    """The picture upright in RGB: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Args:
        image: Any :data:`ImageInput`.
        min_side: Fewest pixels a side may have.

    Raises:
        ImageError: Missing, truncated or unreadable, or of a size the model cannot take; the message names the file.
    """
    file, name = _file_of(image)
    if isinstance(file, Image.Image):
        return _decode(file, name, min_side)
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on and refuses from 179 on; the limit here lies between.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file)
    except FileNotFoundError as error:
        raise ImageError(f"image {name} does not exist; correct the path or the images' folder") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"image {name}: {error}; {MAX_PIXELS:,} in all are allowed: scale it down or take the row out"
        ) from error
    except UnidentifiedImageError as error:  # of bytes it says where they lie in memory
        raise ImageError(f"image {name} is not an image that can be read") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"image {name} cannot be read: {error}") from error
    with opened:
        return _decode(opened, name, min_side)


def is_encoded(text: str) -> bool:
    """Whether a text is a picture in base64, bare or as a data URI, rather than a path.

    >>> is_encoded("data:image/png;base64,iVBORw0KGgo="), is_encoded("/9j/holiday.jpg")
    (True, False)
    """
    return bool(_DATA_URI.match(text) or _BASE64.fullmatch(text))


def _file_of(image: ImageInput) -> tuple[Path | BytesIO | Image.Image, str]:
    """What Pillow can open, and what to call it in errors."""
    if isinstance(image, dict):
        content, path = image.get("bytes"), image.get("path")
        if content:
            return BytesIO(content), f"'{path}'" if path else "(bytes)"
        if not path:
            raise ImageError(f"image has neither 'bytes' nor 'path', only {', '.join(map(str, image)) or 'nothing'}")
        image = path
    if isinstance(image, str) and is_encoded(image):
        try:
            return BytesIO(base64.b64decode(_DATA_URI.sub("", image, count=1))), "(base64)"
        except ValueError as error:
            raise ImageError(f"image (base64) cannot be read: {error}") from error
    if callable(image):
        image = image()
    if isinstance(image, Image.Image):
        filename = getattr(image, "filename", "")  # only pictures that Pillow itself opened have one
        return image, f"'{filename}'" if filename else "(picture)"
    if isinstance(image, bytes):
        return BytesIO(image), "(bytes)"
    if not isinstance(image, (str, os.PathLike)):
        raise ImageError(f"image is {kind_of(image)}; give a path, bytes, a picture or {{'bytes', 'path'}}")
    image = str(image).removeprefix("file://")
    if "://" in image[:10]:  # looked for at the start only: a long text is no path
        raise ImageError(f"image '{image}' is a web address; download it and give its path")
    path = Path(image).expanduser()
    return path, f"'{path}'"


def _decode(image: Image.Image, name: str, min_side: int) -> Image.Image:
    width, height = image.size
    size = f"image {name} is {width} x {height} pixels"
    if min(width, height) < min_side:
        raise ImageError(f"{size}; the model needs {min_side} a side: enlarge it or take the row out")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{size}; the model takes at most {MAX_ASPECT_RATIO}:1: crop it or take the row out")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{size}; {MAX_PIXELS:,} in all are allowed: scale it down or take the row out")
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise ImageError(f"image {name} cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats as 8 bits; where the mode leaves the range open the largest value tells it."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("its pixels are negative or not numbers")
    ranges = {"F": [1.0, 255.0, 65535.0], "I": [255.0, 65535.0]}.get(image.mode, [65535.0])
    full = next((full for full in ranges if values.max() <= full), None)
    if full is None:
        raise ValueError(f"its pixels reach {values.max():g}, over 16 bits")
    return Image.fromarray((values * (255.0 / full)).round().astype(np.uint8))
