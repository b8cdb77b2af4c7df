"""Pictures of the toy world with one subject each: bar charts, digits, words, polygons, single shapes, jigsaws.

Every function draws one example, ``(rng, split) -> (image, question, answer)``. The ``2`` versions ask the same about
pictures the embedded base has hardly seen: smaller, noisier, in other fonts, at other places.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from cpt_lightning.tasks.toy_scenes import COLOURS, SHAPES, SIZE, add_noise, draw_shape, pick, polygon_points

Drawing = tuple[Image.Image, str, str]

_WORDS = (
    "apple bear bird boat book cake corn door duck fish frog gold "
    "hand king lamp leaf moon nest pear rain ship snow tree wolf"
)
WORDS = _WORDS.split()
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
OTHER_FONTS = ("DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "DejaVuSans-Oblique", "DejaVuSansMono")
SINGLE_COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
SINGLE_SHAPES = ("circle", "rectangle", "triangle")
SIDES = ("how many sides does the polygon have?", "count the sides of the polygon.")
DIGIT_ROWS = {"pretrain": (0, 1200), "train": (0, 1200), "val": (1200, 1450), "test": (1450, 1797)}
"""Rows of scikit-learn's digits for each split: unbroken stretches, because neighbours in that file share a writer."""


def draw_bars(rng: Generator, split: str) -> Drawing:
    """Three or four broad bars of clearly different heights: the colour of the tallest or shortest."""
    image, colours = draw_chart(rng)
    return image, *ask_chart(colours, rng)


def draw_bars2(rng: Generator, split: str) -> Drawing:
    """Five or six thin bars whose heights may differ by 5 pixels."""
    count = int(rng.integers(5, 7))
    heights = rng.choice(np.arange(15, 78, 5), size=count, replace=False) + rng.integers(-2, 3)
    image, colours = _chart(rng, heights, width=SIZE // count - 7, noise=14)
    return image, *ask_chart(colours, rng)


def draw_chart(rng: Generator) -> tuple[Image.Image, list[str]]:
    """A chart of three or four broad bars, and the bars' colours from the shortest to the tallest."""
    count = int(rng.integers(3, 5))
    heights = rng.choice(np.arange(15, 76, 12), size=count, replace=False) + rng.integers(-3, 4)
    return _chart(rng, heights, width=SIZE // count - 6, noise=8)


def ask_chart(colours: list[str], rng: Generator, tallest: bool | None = None) -> tuple[str, str]:
    """The colour of the tallest or the shortest bar, given the colours in order of height."""
    tallest = rng.random() < 0.5 if tallest is None else tallest
    kind = "tallest" if tallest else "shortest"
    return pick(rng, f"what color is the {kind} bar?", f"which bar is the {kind}?"), colours[-1 if tallest else 0]


def _chart(rng: Generator, heights: np.ndarray, width: int, noise: int) -> tuple[Image.Image, list[str]]:
    image, draw = _ground(rng)
    colours = rng.permutation(list(COLOURS))[: len(heights)].tolist()
    step = SIZE / len(heights)
    for place, (height, colour) in enumerate(zip(heights.tolist(), colours, strict=True)):
        left = place * step + (step - width) / 2 + int(rng.integers(-1, 2))
        draw.rectangle((left, SIZE - 2 - height, left + width, SIZE - 2), fill=COLOURS[colour])
    return add_noise(image, rng, noise), [colours[bar] for bar in np.argsort(heights)]


def draw_digit(rng: Generator, split: str) -> Drawing:
    """A handwritten digit, large, turned by at most 8 degrees."""
    return _digit(rng, split, low=52, high=64, turn=8, noise=8)


def draw_digit2(rng: Generator, split: str) -> Drawing:
    """A smaller digit at a freer place, turned by up to 20 degrees, on a noisier ground."""
    return _digit(rng, split, low=34, high=48, turn=20, noise=24)


def _digit(rng: Generator, split: str, low: int, high: int, turn: float, noise: int) -> Drawing:
    pixels, labels = _digits()
    row = rng.integers(*DIGIT_ROWS[split])
    size = int(rng.integers(low, high + 1))
    ink = Image.fromarray(pixels[row]).resize((size, size), Image.Resampling.BILINEAR)
    ink = ink.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR)
    image, _ = _ground(rng)
    colour = COLOURS[str(rng.choice(list(COLOURS)))]
    image.paste(colour, tuple(rng.integers(2, SIZE - 1 - size, size=2).tolist()), ink)
    question = pick(rng, "which digit is written?", "read the digit.")
    return add_noise(image, rng, noise), question, str(labels[row])


def draw_word(rng: Generator, split: str) -> Drawing:
    """A word in one of three fonts, large, near the middle."""
    return _word_picture(rng, FONTS, low=20, high=23, noise=8, spread=0.3)


def draw_word2(rng: Generator, split: str) -> Drawing:
    """The same words in four other fonts, smaller, anywhere."""
    return _word_picture(rng, OTHER_FONTS, low=14, high=20, noise=14, spread=1.0)


def _word_picture(rng: Generator, fonts: tuple[str, ...], low: int, high: int, noise: int, spread: float) -> Drawing:
    word = WORDS[rng.integers(len(WORDS))]
    font = _font(fonts[rng.integers(len(fonts))], int(rng.integers(low, high + 1)))
    image, draw = _ground(rng)
    left, top, right, bottom = font.getbbox(word)
    slack = np.array([max(0, SIZE - 4 - (right - left)), max(0, SIZE - 4 - (bottom - top))])
    x, y = 2 + slack / 2 + spread * slack * rng.uniform(-0.5, 0.5, size=2)
    colour = COLOURS[str(rng.choice(list(COLOURS)))]
    draw.text((round(x - left), round(y - top)), word, fill=colour, font=font)
    return add_noise(image, rng, noise), pick(rng, "which word is written?", "read the word."), word


def draw_polygon(rng: Generator, split: str) -> Drawing:
    """A filled regular polygon of three to eight sides, large."""
    sides = int(rng.integers(3, 9))
    image, draw = _ground(rng)
    radius = rng.uniform(28, 36)
    draw.polygon(_corners(rng, sides, radius, [1.0] * sides), fill=_colour(rng))
    return add_noise(image, rng, 8), pick(rng, *SIDES), str(sides)


def draw_polygon2(rng: Generator, split: str) -> Drawing:
    """A smaller polygon, outlined or filled, a little irregular, anywhere."""
    sides = int(rng.integers(3, 9))
    image, draw = _ground(rng)
    radius = rng.uniform(20, 28)
    corners = _corners(rng, sides, radius, rng.uniform(0.9, 1.0, size=sides))
    if rng.random() < 0.5:
        draw.polygon(corners, fill=_colour(rng))
    else:
        draw.polygon(corners, outline=_colour(rng), width=3)
    return add_noise(image, rng, 14), pick(rng, *SIDES), str(sides)


def _corners(rng: Generator, sides: int, radius: float, shares: ArrayLike) -> list[tuple[float, float]]:
    x, y = rng.uniform(radius + 2, SIZE - radius - 2, size=2)
    return polygon_points(x, y, radius * np.asarray(shares), turn=rng.uniform(0, 2 * np.pi))


def draw_single(rng: Generator, split: str) -> Drawing:
    """One shape of any size on a plain light ground: its colour, its shape, or whether it has a given one."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(225, 256, size=3).tolist()))
    colour, shape = str(rng.choice(list(SINGLE_COLOURS))), str(rng.choice(SINGLE_SHAPES))
    radius = rng.uniform(7, 26)
    x, y = rng.uniform(radius, SIZE - radius, size=2)
    draw_shape(ImageDraw.Draw(image), shape, x, y, radius, SINGLE_COLOURS[colour])
    question, answer = _ask_single(rng, colour, shape)
    return add_noise(image, rng, 3), question, answer


def _ask_single(rng: Generator, colour: str, shape: str) -> tuple[str, str]:
    kind = rng.integers(4)
    if kind == 0:
        return pick(rng, "what color is the shape?", "name the color of the shape."), colour
    if kind == 1:
        return pick(rng, "what shape is it?", "name the shape."), shape
    names, truth = (list(SINGLE_COLOURS), colour) if kind == 2 else (list(SINGLE_SHAPES), shape)
    asked = truth if rng.random() < 0.5 else str(rng.choice([name for name in names if name != truth]))
    noun = f"{asked} shape" if kind == 2 else asked
    return pick(rng, f"is there a {noun}?", f"do you see a {noun}?"), "yes" if asked == truth else "no"


def draw_jigsaw(rng: Generator, split: str) -> Drawing:
    """One large shape, cut 2 x 2 and shuffled: the place (1 to 4, row by row) from which each shown tile came."""
    image, draw = _ground(rng)
    x, y = rng.uniform(SIZE / 2 - 6, SIZE / 2 + 6, size=2)
    draw_shape(draw, SHAPES[rng.integers(len(SHAPES))], x, y, rng.uniform(26, 34), _colour(rng))
    image = add_noise(image, rng, 8)
    half = SIZE // 2
    corners = [(0, 0), (half, 0), (0, half), (half, half)]
    tiles = [image.crop((x, y, x + half, y + half)) for x, y in corners]
    order = rng.permutation(4).tolist()
    for corner, source in zip(corners, order, strict=True):
        image.paste(tiles[source], corner)
    question = pick(rng, "the four tiles are shuffled. where does each belong?", "give the true place of each tile.")
    return image, question, " ".join(str(source + 1) for source in order)


DRAWERS: dict[str, Callable[[Generator, str], Drawing]] = {
    "bars": draw_bars,
    "bars2": draw_bars2,
    "digit": draw_digit,
    "digit2": draw_digit2,
    "word": draw_word,
    "word2": draw_word2,
    "polygon": draw_polygon,
    "polygon2": draw_polygon2,
    "single": draw_single,
    "jigsaw": draw_jigsaw,
}


def _ground(rng: Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(8, 32, size=3).tolist()))
    return image, ImageDraw.Draw(image)


def _colour(rng: Generator) -> tuple[int, int, int]:
    return COLOURS[str(rng.choice(list(COLOURS)))]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A DejaVu font of matplotlib's wheel, so that every machine draws the same; found without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the toy world writes in the DejaVu fonts of matplotlib: pip install matplotlib")
    path = Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: pixels ``[1797, 8, 8]`` uint8 and labels ``[1797]``."""
    from sklearn.datasets import load_digits  # takes a second, and only two families need it

    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target
