"""What the embedded base is pre-trained on: pictures of the toy world, and several exchanges about each.

One question per picture taught a model of this size too little in the time; a caption of the whole scene and three
questions about it, in one packed row (packing.py), taught it. All pictures come from the split ``"pretrain"``.
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy.random import Generator
from PIL import Image

from cpt_lightning.tasks import load_image
from cpt_lightning.tasks.toy import draw_row, keyed_rng
from cpt_lightning.tasks.toy_drawings import ask_chart, draw_chart
from cpt_lightning.tasks.toy_scenes import ASKERS, draw_scene, make_scene
from cpt_lightning.tasks.toy_text import think


@dataclass(frozen=True)
class Exchange:
    """One question and the reply to learn; ``answer`` is weighted, a ``caption`` in its place is not."""

    question: str
    thought: str
    answer: str
    is_caption: bool = False


@dataclass
class Lesson:
    """A picture, or ``None``, and the exchanges about it."""

    image: Image.Image | None
    exchanges: list[Exchange]


def scene_lesson(rng: Generator) -> Lesson:
    """A scene with its caption and three questions of different kinds."""
    scene = make_scene(rng)
    image = draw_scene(scene, rng)
    asked = [asker(scene, rng) for asker in ASKERS.values()]
    answerable = [pair for pair in asked if pair is not None]
    chosen = rng.permutation(len(answerable))[:3]
    caption = Exchange("describe the grid.", think(rng), scene.caption, is_caption=True)
    return Lesson(image, [caption, *(Exchange(answerable[i][0], think(rng), answerable[i][1]) for i in chosen)])


def chart_lesson(rng: Generator) -> Lesson:
    """A bar chart with the order of its bars and both of its questions."""
    image, colours = draw_chart(rng)
    order = Exchange("list the bars from the shortest.", think(rng), " ".join(colours), is_caption=True)
    questions = [ask_chart(colours, rng, tallest) for tallest in (True, False)]
    return Lesson(image, [order, *(Exchange(question, think(rng), answer) for question, answer in questions)])


def single_lesson(rng: Generator, family: str) -> Lesson:
    """One row of a family, as any task would ask it."""
    row = draw_row(family, rng, "pretrain")
    exchange = Exchange(row.question, row.fields["thought"], str(row.answer))
    return Lesson(load_image(row.images[0]) if row.images else None, [exchange])


def make_lessons(seed: int, step: int, recipe: dict[str, int]) -> list[Lesson]:
    """The lessons of one step: ``recipe`` counts scenes, charts, and single questions by family."""
    rng = keyed_rng("pretrain", seed, step)
    makers = {"scenes": scene_lesson, "charts": chart_lesson}
    lessons = []
    for name, count in recipe.items():
        maker = makers.get(name)
        lessons += [maker(rng) if maker else single_lesson(rng, name) for _ in range(count)]
    return lessons
