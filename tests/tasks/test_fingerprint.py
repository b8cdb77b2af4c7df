"""A fingerprint changes with what decides a score, and with nothing else."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from cpt_lightning.data import TaskStream
from cpt_lightning.rewards import Reward, RewardPart, grade, permutation_hits
from cpt_lightning.tasks import LazySequence, Prompt, Row, Source, Task, ToyWorld, prompts
from cpt_lightning.tasks.fingerprint import describe, fingerprint


class Listed(Source):
    """The same rows in every split."""

    def __init__(self, rows):
        self.rows = rows

    def split(self, split):
        return self.rows


def rows(count=40, question="What is {}?", answer="{}", images=()):
    return [Row(f"list:{i}", question.format(i), answer.format(i), list(images)) for i in range(count)]


def task(**options):
    return Task(Listed(rows()), **options)


def name_of(changed):
    return fingerprint(changed, "test", "numbers")


@pytest.mark.parametrize(
    "changed",
    [
        task(prompt=Prompt(style="direct")),
        task(prompt=Prompt(prefix="Look. ")),
        task(prompt=Prompt(suffix=" Hurry.")),
        task(prompt=Prompt(system="You count.")),
        task(reward=Reward(kind="number")),
        task(reward=Reward(format="think_answer")),
        task(reward=Reward(extra={"hits": RewardPart(permutation_hits)})),
        task(reward=Reward(extra={"hits": RewardPart(permutation_hits, weight=0.5)})),
        Task(Listed(rows(41))),
        Task(Listed(rows(question="What was {}?"))),
        Task(Listed(rows(answer="{}.0"))),
        Task(Listed(rows(images=["a.png"]))),
        task(num_test=39),
    ],
)
def test_it_changes_with_what_is_asked_and_how_it_is_graded(changed):
    assert name_of(changed) != name_of(task())


def test_weights_and_the_instruction_of_a_style_count(monkeypatch):
    tagged = task(prompt=Prompt(style="think_answer"), reward=Reward(format="think_answer"))
    heavier = replace(tagged, reward=Reward(format="think_answer", accuracy_weight=0.8))
    before = name_of(tagged)
    assert name_of(heavier) != before
    monkeypatch.setitem(prompts.INSTRUCTIONS, "think_answer", "\nThink, then answer.")
    assert name_of(tagged) != before


def test_it_does_not_change_with_what_decides_training_alone():
    alike = [task(target="so {answer}"), task(num_train=3), task(seed=5), task(bad_images="skip")]
    assert {name_of(changed) for changed in alike} == {name_of(task())}
    streams = [TaskStream({"numbers": task()}, seed=seed, prompts_per_step=3, passes=seed + 1) for seed in (0, 1)]
    assert [stream.fingerprint("numbers", "test") for stream in streams] == [name_of(task())] * 2


def test_it_neither_opens_images_nor_reads_more_than_32_rows():
    read = []
    lazy = LazySequence(1000, lambda index: read.append(index) or Row(f"x:{index}", "What?", "it", ["nowhere.png"]))
    name = name_of(Task(Listed(lazy)))
    assert (len(read), read[0], read[-1]) == (32, 0, 999)
    assert len(name) == 12 and int(name, 16)


def test_a_row_that_cannot_be_asked_leaves_the_others_counted():
    def read(question, index):
        if index == 1:
            raise ValueError("row 1 is empty")
        return Row(f"x:{index}", question, "it")

    lazy = [LazySequence(3, partial(read, question)) for question in ("What?", "Who?")]
    first, second = (name_of(Task(Listed(rows))) for rows in lazy)
    assert first != second


def test_a_stream_keeps_its_fingerprints():
    read = []
    lazy = LazySequence(3, lambda index: read.append(index) or rows()[index])
    stream = TaskStream({"numbers": Task(Listed(lazy))})
    assert stream.fingerprint("numbers", "val") == stream.fingerprint("numbers", "val")
    assert read == [0, 1, 2]


def test_the_prompts_of_a_toy_task_are_what_they_were():
    """Pinned: if this fails, prompts, answers or grading have changed, and no earlier score compares with a new one.

    If that is meant, say so in the changelog and write the new value here.
    """
    toy = Task(ToyWorld("arithmetic"), Prompt(style="think_answer"), Reward(format="think_answer"), num_test=50)
    assert fingerprint(toy, "test", "arithmetic") == "2e761d7ead98"


def test_it_is_the_same_in_another_process():
    """Strings hash differently in every process: nothing may depend on the order of a set."""
    code = (
        "from cpt_lightning.rewards import permutation_hits;"
        "from cpt_lightning.tasks import Reward, RewardPart, Task, ToyWorld;"
        "from cpt_lightning.tasks.fingerprint import fingerprint;"
        "extra = {name: RewardPart(permutation_hits) for name in ('a', 'b', 'c')};"
        "print(fingerprint(Task(ToyWorld('facts'), reward=Reward(extra=extra)), 'test', 'facts'))"
    )
    printed = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        printed.add(result.stdout)
    extra = {name: RewardPart(permutation_hits) for name in ("a", "b", "c")}
    assert printed == {fingerprint(Task(ToyWorld("facts"), reward=Reward(extra=extra)), "test", "facts") + "\n"}


def test_settings_are_described_without_addresses():
    part = RewardPart(partial(grade, kind="letter"), weight=2)
    assert describe(Reward(extra={"hits": part}))["extra"]["hits"] == {
        "class": "RewardPart",
        "function": ["cpt_lightning.rewards.grading.grade", [], {"kind": "letter"}],
        "weight": 2,
    }
    assert describe([None, (1.5, True), Listed([]), dict]) == [None, [1.5, True], {"class": "Listed"}, "builtins.dict"]
