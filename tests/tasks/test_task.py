"""A task asks, subsets and grades the rows of a source, and is written in YAML."""

import pickle

import pytest
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from cpt_lightning.rewards import Reward, permutation_hits
from cpt_lightning.tasks import LazySequence, Prompt, Row, SkippedRow, Source, Task, ToyWorld
from cpt_lightning.tasks.targets import fill_template, most_frequent, template_slots


class Listed(Source):
    """Rows from a list; only a training split."""

    def __init__(self, rows):
        self.rows = rows

    def split(self, split):
        if split != "train":
            raise ValueError(f"no {split} split")
        return self.rows


def rows(count=10):
    return [Row(f"list:{i}", f"What is {i}?", str(i), fields={"thought": f"it is {i}"}) for i in range(count)]


def only(task):
    """The task's single training example."""
    (example,) = task.examples("train", "numbers")
    return example


def test_an_example_is_the_row_as_it_is_asked_and_graded():
    picture = Image.new("L", (30, 40))
    row = Row("list:0", "What is it?", ["cat", "dog"], [picture])
    reward = Reward(kind="vqa")
    example = only(Task(Listed([row]), Prompt(suffix=" Say."), reward))
    assert (example.task, example.row_id, example.gold) == ("numbers", "list:0", ["cat", "dog"])
    assert example.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? Say."}]}
    ]
    assert [(image.mode, image.size) for image in example.images] == [("RGB", (30, 40))]
    assert example.reward is reward


@pytest.mark.parametrize(
    "template, own, target",
    [
        (None, None, "7"),
        (None, "seven", "seven"),
        ("{answer}", "seven", "7"),
        ("<think>{thought}</think><answer>{answer}</answer>", None, "<think>odd</think><answer>7</answer>"),
        (r"\boxed{{{answer}}}", None, r"\boxed{7}"),
    ],
)
def test_the_target_is_the_template_else_the_rows_own_else_the_answer(template, own, target):
    row = Row("list:0", "x?", "7", target=own, fields={"thought": "odd"})
    assert only(Task(Listed([row]), target=template)).target == target


def test_the_target_of_many_answers_is_the_most_frequent():
    assert only(Task(Listed([Row("list:0", "x?", ["a", "b", "b"])]))).target == "b"
    assert most_frequent(["b", "a"]) == "b"


def test_braces_in_the_data_are_not_slots():
    row = Row("list:0", "x?", r"\frac{1}{2}")
    assert only(Task(Listed([row]), target=r"\boxed{{{answer}}}")).target == r"\boxed{\frac{1}{2}}"


def test_rows_are_read_when_fetched_and_not_kept():
    read = []
    source = Listed(LazySequence(5, lambda index: read.append(index) or rows()[index]))
    examples = Task(source).examples("train", "numbers")
    assert (len(examples), read) == (5, [])
    assert examples[3].row_id == examples[-2].row_id == "list:3"
    assert read == [3, 3]
    assert [example.row_id for example in examples[1:3]] == ["list:1", "list:2"]
    with pytest.raises(IndexError):
        examples[5]


def test_an_index_error_inside_a_source_does_not_end_the_data_silently():
    def get(index):
        raise IndexError("a bug")

    with pytest.raises(IndexError, match="a bug"):
        list(LazySequence(3, get))


def test_a_subset_is_seeded_keeps_the_order_and_grows_by_adding():
    def ids(**options):
        return [example.row_id for example in Task(Listed(rows(50)), **options).examples("train", "numbers")]

    everything = [f"list:{i}" for i in range(50)]
    assert ids() == ids(num_train=50) == everything
    five, ten = ids(num_train=5), ids(num_train=10)
    assert set(five) < set(ten)
    assert ten == [row for row in everything if row in set(ten)]
    assert five == ids(num_train=5, num_test=3) != ids(num_train=5, seed=1)
    assert five != everything[:5]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_train": 0}, "num_train=0 must be at least 1; null takes every row"),
        ({"num_test": -3}, "num_test=-3 must be"),
        ({"seed": -1}, "seed is -1"),
        ({"bad_images": "drop"}, "bad_images 'drop' is unknown; there are fail, skip"),
        ({"target": "{answer"}, "a literal brace is written twice"),
        ({"target": r"\boxed{answer}!{}"}, "not a plain slot name"),
        ({"target": "{answer.__class__}"}, "not a plain slot name"),
        ({"target": "{answer!r}"}, "not a plain slot name"),
        ({"target": "red"}, "has no slot"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Task(Listed(rows()), **options)


def test_splits_that_are_not_there_are_named():
    task = Task(Listed(rows()), num_train=11)
    with pytest.raises(ValueError, match="task 'numbers': num_train=11, but the train split has 10 rows"):
        task.examples("train", "numbers")
    with pytest.raises(ValueError, match="task 'numbers': no test split"):
        task.examples("test", "numbers")
    with pytest.raises(ValueError, match="unknown split 'dev'; there are train, val, test"):
        task.examples("dev", "numbers")
    with pytest.raises(ValueError, match="task 'numbers': the train split has no rows"):
        Task(Listed([])).examples("train", "numbers")


@pytest.mark.parametrize(
    "row, options, message",
    [
        (Row("a.json:3", "x?", "1", ["gone.png"]), {}, "task 'numbers', a.json:3: image 'gone.png' does not exist"),
        (Row("a.json:3", "<image>x?", "1"), {}, "a.json:3: the question has 1 <image> markers for 0 images"),
        (Row("a.json:3", "x <|im_end|>?", "1"), {}, "a.json:3: the question holds"),
        (Row("a.json:3", "x?", "<|im_end|>"), {}, "a.json:3: the target holds"),
        (
            Row("a.json:3", "x \ud800?", "1"),
            {},
            r"'numbers', a.json:3: the question holds '\\ud800', which is half of a",
        ),
        (Row("a.json:3", "x?", "1", system="\udfff"), {}, "'numbers', a.json:3: the system turn holds .* remove it"),
        (
            Row("a.json:3", "x?", "1", target="1\ud800"),
            {},
            "'numbers', a.json:3: the target holds .*half of a character",
        ),
        (
            Row("a.json:3", "x?", "1", fields={"thought": "\ud800"}),
            {"target": "{thought} {answer}"},
            "'numbers', a.json:3: the target holds .*half of a character",
        ),
        (
            Row("a.json:3", "x?", "1", fields={"hint": "h"}),
            {"target": "{thought} {answer}"},
            r"a.json:3: target .* has the slot \{thought\}, the row offers: answer, hint",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_task(row, options, message):
    with pytest.raises(ValueError, match=message):
        only(Task(Listed([row]), **options))


def test_a_row_with_a_bad_image_is_skipped_where_the_task_says_so():
    """The filler is asked like the row, with a blank picture in place of every one."""
    row = Row("a.json:3", "Is <image> like <image>?", "1", ["gone.png", Image.new("RGB", (30, 30))])
    with pytest.raises(SkippedRow, match="task 'numbers', a.json:3: image 'gone.png' does not exist") as raised:
        only(Task(Listed([row]), bad_images="skip"))
    filler = raised.value.filler
    assert (filler.row_id, filler.gold, filler.target) == ("a.json:3", "1", "1")
    assert [part["type"] for part in filler.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert [image.getextrema() for image in filler.images] == [((0, 0),) * 3] * 2


def test_skipping_is_for_images_only():
    row = Row("a.json:3", "<image>x?", "1")
    with pytest.raises(ValueError, match="1 <image> markers for 0 images") as raised:
        only(Task(Listed([row]), bad_images="skip"))
    assert not isinstance(raised.value, SkippedRow)


@pytest.mark.parametrize("answer", ["", "  ", [], ["a", ""]])
def test_an_empty_answer_is_refused(answer):
    with pytest.raises(ValueError, match="list:0: empty answer"):
        Row("list:0", "x?", answer)


@pytest.mark.parametrize("answer", ["a\ud800", ["a", "\ud800"]])
def test_half_of_a_character_in_an_answer_is_refused(answer):
    """It is never tokenized if the row has a target of its own, but graded and written down."""
    with pytest.raises(ValueError, match=r"list:0: the answer holds '\\ud800', which is half of a character"):
        Row("list:0", "x?", answer, target="b")


def test_a_field_may_not_hide_the_answer():
    with pytest.raises(ValueError, match="'answer' would hide"):
        Row("list:0", "x?", "1", fields={"answer": "2"})


def test_templates_tell_their_slots():
    assert template_slots("{{}} {a} {b}") == ["a", "b"]
    assert fill_template("{a}{a}", {"a": "x"}) == "xx"


def test_examples_travel_to_workers():
    examples = Task(Listed(rows())).examples("train", "numbers")
    assert pickle.loads(pickle.dumps(examples))[4].row_id == "list:4"


TASKS = """
tasks:
  shapes:
    source: {class_path: cpt_lightning.tasks.EasyVQA, init_args: {questions: [shape], val_fraction: 0.2}}
    prompt: {style: think_answer, prefix: "Look. "}
    reward:
      kind: permutation
      format: think_answer
      accuracy_weight: 0.8
      extra: {hits: {function: cpt_lightning.rewards.permutation_hits, weight: 0.5}}
    target: "<answer>{answer}</answer>"
    num_train: 20
    bad_images: skip
  colours:
    source: {class_path: cpt_lightning.tasks.EasyVQA, init_args: {questions: [color]}}
"""


def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=dict[str, Task])
    return parser


def test_tasks_are_written_in_yaml_and_survive_a_round_trip():
    parsed = parser().parse_string(TASKS)
    tasks = parser().instantiate(parsed).tasks
    shapes = tasks["shapes"]
    assert list(tasks) == ["shapes", "colours"]
    assert (type(shapes), shapes.num_train, shapes.source.questions) == (Task, 20, ["shape"])
    assert (shapes.bad_images, tasks["colours"].bad_images) == ("skip", "fail")
    assert shapes.reward.extra["hits"].function is permutation_hits
    assert shapes.prompt == Prompt(prefix="Look. ", style="think_answer")
    assert (tasks["colours"].reward, tasks["colours"].prompt) == (Reward(), Prompt())
    assert len(shapes.examples("train", "shapes")) == 20
    printed = parser().dump(parsed)
    again = parser().instantiate(parser().parse_string(printed)).tasks["shapes"]
    assert (again.prompt, again.reward, again.target) == (shapes.prompt, shapes.reward, shapes.target)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"promt": {"style": "direct"}}, "promt"),
        ({"reward": {"kind": "colour"}}, "colour"),
        ({"prompt": {"style": "cot"}}, "cot"),
        ({"source": {"class_path": "cpt_lightning.tasks.EasyVQA", "init_args": {"questions": ["size"]}}}, "size"),
        ({"source": {"class_path": "cpt_lightning.tasks.Prompt"}}, "Source"),
    ],
)
def test_a_misspelt_option_is_refused_when_parsed(change, message):
    config = yaml.safe_load(TASKS)
    config["tasks"]["shapes"].update(change)
    with pytest.raises(Exception, match=message):
        parser().parse_object(config)


@pytest.mark.parametrize(
    ("style", "format_style", "needs_format"),
    [("think_boxed", "think_boxed", True), ("think_answer", "think_answer", True), ("direct", "none", False)],
)
def test_a_task_in_another_style_is_asked_and_rewarded_in_it(style, format_style, needs_format):
    """Weights, kind and texts stay; without a format there is nothing that accuracy could need."""
    reward = Reward("number", "think_answer", accuracy_weight=0.7, format_weight=0.3, accuracy_needs_format=True)
    task = Task(Listed(rows()), Prompt(suffix=" Say."), reward, num_train=3)
    styled = task.in_style(style)
    assert (styled.prompt.style, styled.prompt.suffix, styled.num_train) == (style, " Say.", 3)
    assert (styled.reward.format, styled.reward.accuracy_needs_format) == (format_style, needs_format)
    assert (styled.reward.kind, styled.reward.accuracy_weight) == ("number", 0.7)
    assert (task.prompt.style, task.reward.format) == ("none", "think_answer")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "bars2"}, "source='bars2' is a str; give a Source"),
        ({"prompt": "Think."}, "prompt='Think.' is a str; give a Prompt"),
        ({"reward": "number"}, "reward='number' is a str; give a Reward"),
    ],
)
def test_what_is_no_source_prompt_or_reward_is_refused(options, said):
    with pytest.raises(TypeError, match=said):
        Task(**{"source": ToyWorld("bars2")} | options)


@pytest.mark.parametrize("count", ["5", 2.5])
def test_a_number_of_rows_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match="num_test=.* must be a whole number"):
        Task(ToyWorld("bars2"), num_test=count)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"answer": 5}, "numbers/3: the answer 5 is no text, nor a list of texts"),
        ({"answer": ["5", 6]}, r"numbers/3: the answer \['5', 6\] is no text"),
        ({"question": 7}, "numbers/3: the question is an int; give text"),
        ({"images": "a.png"}, "numbers/3: images is a str; give a list of images"),
        ({"images": Image.new("RGB", (28, 28))}, "numbers/3: images is an Image; give a list of images"),
    ],
)
def test_a_row_of_an_own_source_that_holds_something_else_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        Row(**{"row_id": "numbers/3", "question": "?", "answer": "5"} | options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (iter(rows(3)), "task 'sums': its source gives a list_iterator; give a sequence of Rows, as a list or LazySeq"),
        ([{"question": "?", "answer": "5"}], "task 'sums': its source gives a dict in the place of a Row"),
    ],
)
def test_an_own_source_that_gives_no_sequence_of_rows_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        Task(Listed(given)).examples("train", "sums")[0]
