"""What the model is asked, word for word: a text file for each style and kind of task, compared exactly.

A test that fails here has found that prompts, answers or targets changed, so that scores no longer compare with earlier
ones. If that is meant, renew the files, read the difference, and commit it::

    RENEW_SNAPSHOTS=1 pytest tests/test_prompt_texts.py; git diff tests/snapshots
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from cpt_lightning.cli.inspect.measure import show
from cpt_lightning.tasks import FileRows, Jigsaw, Prompt, Reward, Row, Source, Task
from cpt_lightning.tasks.prompts import INSTRUCTIONS
from cpt_lightning.tasks.splits import spaced
from cpt_lightning.tasks.toy import FAMILIES, ToyWorld
from cpt_lightning.tasks.vqa import EasyVQA
from tests.tasks import hub_sets

SNAPSHOTS = Path(__file__).parent / "snapshots"
NUM_ROWS = 3
THOUGHT = "<think>{thought}</think><answer>{answer}</answer>"


def snapshot(task: Task, split: str, processor) -> str:
    """A few evenly spaced rows of a task, from the chat template to what the SFT target earns."""
    examples = task.examples(split, "task")
    blocks = []
    for index in spaced(len(examples), NUM_ROWS):
        shown = show(examples[index], processor)
        facts = {"answer": shown.gold, "SFT target": shown.target, "it earns": shown.earns}
        blocks.append(
            "\n".join([f"=== {Path(shown.row_id).name}", shown.prompt, *(f"{k}: {v}" for k, v in facts.items())])
        )
    return "\n\n".join(blocks) + "\n"


def check(name: str, text: str) -> None:
    """Compares with the file of that name; with RENEW_SNAPSHOTS=1 writes it instead."""
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("RENEW_SNAPSHOTS") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"there is no {path.name} yet: {__doc__}"
    assert text == path.read_text(encoding="utf-8"), __doc__


# -- the kinds of tasks: a name, the split, and what makes the task; ``data`` is a folder to write files into ----------


class OneOfEach(Source):
    """A question with an image before it, one with images in its midst, one without."""

    def split(self, split):
        picture = Image.new("RGB", (84, 56))
        return [
            Row("rows:0", "What colour is it?", "black", [picture]),
            Row("rows:1", "Is <image> like <image>?", ["yes", "yes", "no"], [picture, picture]),
            Row("rows:2", "What is 2 + 2?", "4", system="You are a helpful assistant."),
        ]


def jigsaw(data: Path, **options) -> Task:
    for number in range(4):
        Image.new("RGB", (120, 120), (60 * number, 0, 0)).save(data / f"{number}.png")
    reward = Reward(kind="permutation", format="think_answer")
    return Task(Jigsaw(str(data), test_fraction=0.5, val_fraction=0, **options), Prompt(style="think_answer"), reward)


def files(data: Path, rows: list[dict], **options) -> Task:
    """Rows in a file, with a picture of 84 x 84 pixels wherever they name one."""
    Image.new("RGB", (84, 84)).save(data / "a.png")
    (data / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return Task(FileRows(test=str(data / "rows.json")), **options)


CHAT = [
    {"role": "user", "content": "<image>Which is right?\nA. ice\nB. fire\nAnswer with the option's letter."},
    {"role": "assistant", "content": "A"},
]
TASKS: dict[str, tuple[str, Callable[[Path], Task]]] = {
    **{f"style_{style}": ("test", lambda data, s=style: Task(OneOfEach(), Prompt(style=s))) for style in INSTRUCTIONS},
    "style_all_texts": (
        "test",
        lambda data: Task(
            OneOfEach(), Prompt("You are terse.", "Look. ", " Take care.", "direct"), target="So: {answer}"
        ),
    ),
    **{f"toy_{family}": ("test", lambda data, f=family: Task(ToyWorld(f), target=THOUGHT)) for family in FAMILIES},
    "jigsaw_source": ("test", jigsaw),
    "jigsaw_target_2x2": ("test", lambda data: jigsaw(data, num_rows=2, num_cols=2, convention="target")),
    **{f"easy_vqa_{q}": ("test", lambda data, q=q: Task(EasyVQA([q]))) for q in ("shape", "color", "yes_no")},
    "files_messages": ("test", lambda data: files(data, [{"messages": CHAT, "images": ["a.png"]}])),
    "files_problem_answer": (
        "test",
        lambda data: files(
            data,
            [{"images": ["a.png"], "problem": "<image>Find $x$.", "answer": r"\frac{1}{2}"}],
            prompt=Prompt(style="think_boxed"),
            reward=Reward(kind="math", format="think_boxed"),
            target=r"<think>Look.</think>\boxed{{{answer}}}",
        ),
    ),
    "files_ten_answers": (
        "test",
        lambda data: files(
            data,
            [{"image": "a.png", "question": "What brand?", "answers": ["nokia"] * 7 + ["toshiba"] * 3}],
            prompt=Prompt(style="direct"),
            reward=Reward(kind="vqa"),
        ),
    ),
}


def paper(data: Path, name: str, style: str) -> Task:
    """A task of configs/tasks, on a few rows in the columns of its set."""
    if name == "jigsaw":
        (data / "data/coco/train2014").mkdir(parents=True)
        for number in range(200):
            Image.new("RGB", (90, 90)).save(data / f"data/coco/train2014/{number:03}.png")
    else:
        getattr(hub_sets, name)(data / "data")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    settings = {**yaml.safe_load((PAPERS / f"{name}.yaml").read_text()), "num_train": None, "num_test": None}
    return parser.instantiate(parser.parse_object({"task": settings})).task.in_style(style)


PAPERS = Path(__file__).parents[1] / "configs" / "tasks"
TASKS |= {
    f"paper_{path.stem}_{style}": ("test", lambda data, n=path.stem, s=style: paper(data, n, s))
    for path in sorted(PAPERS.glob("*.yaml"))
    for style in ("direct", "think_answer" if path.stem == "jigsaw" else "think_boxed")
}


@pytest.mark.parametrize("name", TASKS)
def test_the_prompts_of_a_task_are_word_for_word_what_they_were(name, tmp_path, processor, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)  # sets on disk are looked for in ./data
    split, make = TASKS[name]
    check(name, snapshot(make(tmp_path), split, processor))


def test_every_snapshot_is_compared():
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == set(TASKS)
