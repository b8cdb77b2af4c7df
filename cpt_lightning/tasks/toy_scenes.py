"""Scenes of the toy world: coloured shapes on a 3x3 grid, what can be asked about them, and their pictures.

One scene answers many questions, so drawing, asking and captioning are separate: a task asks one question of its scene,
the pre-training of the embedded base asks several of the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

SIZE = 84
"""Pixels along each side of every toy picture: 3 x 3 visual tokens of Qwen2.5-VL (patch 14, merge 2)."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (50, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
RELATIONS = {(0, -1): "left", (0, 1): "right", (-1, 0): "above", (1, 0): "below"}
CELL = SIZE // 3


@dataclass(frozen=True)
class Scene:
    """Coloured shapes by cell: ``objects[cell] = (colour, shape)``, cells 0 to 8 row by row, empty cells left out."""

    objects: dict[int, tuple[str, str]]

    @property
    def caption(self) -> str:
        """All nine cells in order, ``-`` for an empty one: ``"red circle - - blue star ..."``."""
        return " ".join(" ".join(self.objects[cell]) if cell in self.objects else "-" for cell in range(9))

    def count(self, colour: str | None = None, shape: str | None = None) -> int:
        """Objects of the given colour and shape; ``None`` matches all."""
        return sum(colour in (None, c) and shape in (None, s) for c, s in self.objects.values())


def make_scene(rng: Generator) -> Scene:
    """Two to seven objects in random cells; every other scene is drawn from few colours and shapes, so counts grow."""
    few = rng.random() < 0.5
    colours = rng.choice(list(COLOURS), size=3 if few else 7, replace=False)
    shapes = rng.choice(SHAPES, size=3 if few else 6, replace=False)
    cells = rng.choice(9, size=rng.integers(2, 8), replace=False)
    return Scene({int(cell): (str(rng.choice(colours)), str(rng.choice(shapes))) for cell in sorted(cells)})


def draw_scene(scene: Scene, rng: Generator) -> Image.Image:
    """The scene on a dark, mildly noisy ground; places and sizes vary by a few pixels."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(8, 32, size=3).tolist()))
    draw = ImageDraw.Draw(image)
    for cell, (colour, shape) in scene.objects.items():
        x, y = (CELL // 2 + CELL * np.array([cell % 3, cell // 3]) + rng.integers(-2, 3, size=2)).tolist()
        draw_shape(draw, shape, x, y, int(rng.integers(8, 12)), COLOURS[colour])
    return add_noise(image, rng, 8)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple) -> None:
    """Draws one filled shape within ``radius`` of ``(x, y)``."""
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape in ("square", "rectangle"):
        half = 0.85 * radius
        height = half if shape == "square" else 0.6 * radius
        draw.rectangle((x - half, y - height, x + half, y + height), fill=fill)
    elif shape == "cross":
        arm = radius / 3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    elif shape == "triangle":
        draw.polygon(polygon_points(x, y + radius / 6, [radius] * 3), fill=fill)
    elif shape == "diamond":
        draw.polygon(polygon_points(x, y, [radius, 0.7 * radius] * 2), fill=fill)
    elif shape == "star":
        draw.polygon(polygon_points(x, y, [radius, 0.42 * radius] * 5), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join((*SHAPES, 'rectangle'))}")


def polygon_points(x: float, y: float, distances: ArrayLike, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners at equal angles and the given distances from ``(x, y)``, the first on top, turned by ``turn`` radians."""
    radii = np.asarray(distances, dtype=float)
    angles = turn + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return list(zip((x + radii * np.sin(angles)).tolist(), (y - radii * np.cos(angles)).tolist(), strict=True))


def add_noise(image: Image.Image, rng: Generator, amplitude: int) -> Image.Image:
    """The picture with uniform noise of up to ``amplitude`` grey levels on every pixel and channel."""
    noise = rng.integers(-amplitude, amplitude + 1, size=(SIZE, SIZE, 3), dtype=np.int8)
    return Image.fromarray((np.asarray(image, np.int16) + noise).clip(0, 255).astype(np.uint8))


def ask_colour(scene: Scene, rng: Generator) -> tuple[str, str] | None:
    """The colour of a shape that stands there once; ``None`` if no shape does."""
    once = [(c, s) for c, s in scene.objects.values() if scene.count(shape=s) == 1]
    if not once:
        return None
    colour, shape = once[rng.integers(len(once))]
    return pick(rng, f"what color is the {shape}?", f"name the color of the {shape}."), colour


def ask_count(scene: Scene, rng: Generator) -> tuple[str, str]:
    """How many objects there are: in all, of one colour, or of one shape, the last two never zero."""
    colour, shape = list(scene.objects.values())[rng.integers(len(scene.objects))]
    kind = rng.integers(3)
    if kind == 0:
        return pick(rng, "how many objects are there?", "count the objects."), str(scene.count())
    if kind == 1:
        answer = str(scene.count(colour=colour))
        return pick(rng, f"how many {colour} objects are there?", f"count the {colour} objects."), answer
    answer = str(scene.count(shape=shape))
    return pick(rng, f"how many {PLURALS[shape]} are there?", f"count the {PLURALS[shape]}."), answer


def ask_existence(scene: Scene, rng: Generator) -> tuple[str, str]:
    """Whether an object is there, yes and no equally often; most absent ones share a colour or shape."""
    present = list(scene.objects.values())
    if rng.random() < 0.5:
        colour, shape = present[rng.integers(len(present))]
        answer = "yes"
    else:
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
        near = [(c, s) for c, s in absent if scene.count(colour=c) or scene.count(shape=s)]
        pool = near if rng.random() < 0.8 else absent
        colour, shape = pool[rng.integers(len(pool))]
        answer = "no"
    return pick(rng, f"is there a {colour} {shape}?", f"do you see a {colour} {shape}?"), answer


def ask_relation(scene: Scene, rng: Generator) -> tuple[str, str] | None:
    """On which side of another an object stands, both unique and in one row or column; ``None`` without such."""
    unique = {cell: thing for cell, thing in scene.objects.items() if scene.count(*thing) == 1}
    pairs = [(a, b) for a in unique for b in unique if a != b and (a // 3 == b // 3 or a % 3 == b % 3)]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    answer = RELATIONS[int(np.sign(a // 3 - b // 3)), int(np.sign(a % 3 - b % 3))]
    first, second = " ".join(unique[a]), " ".join(unique[b])
    wordings = f"on which side of the {second} is the {first}?", f"where is the {first} from the {second}?"
    return pick(rng, *wordings), answer


ASKERS = {"colour": ask_colour, "count": ask_count, "existence": ask_existence, "relation": ask_relation}
"""What can be asked of a scene: ``asker(scene, rng) -> (question, answer)``, or ``None`` where it has no answer."""


def pick(rng: Generator, *wordings: str) -> str:
    """One of several wordings, each as likely."""
    return wordings[rng.integers(len(wordings))]
