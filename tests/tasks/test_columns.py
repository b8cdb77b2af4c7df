"""Columns to rows: questions from lines, options and their letters, images in their places, rows left out."""

import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from cpt_lightning.tasks import Columns, FileRows, Task
from cpt_lightning.tasks.choices import listed_texts, right_option


def read(record, **options):
    return Columns(**options).read(record, "rows.json:0", Path("/data"))


def asked(record, **options):
    return read({"answer": "x", **record}, **options).question


LINES = ["Context: {hint}", "{question}", "Seen: {seen}"]


@pytest.mark.parametrize(
    "hint, seen, question",
    [
        ("It is hot.", ["a", "b"], "Context: It is hot.\nWhy?\nSeen: a,b"),
        ("", [], "Why?"),
        (None, None, "Why?"),
        ("  ", "", "Why?"),
        (3, 0.5, "Context: 3\nWhy?\nSeen: 0.5"),
    ],
)
def test_a_line_is_left_out_where_a_slot_is_empty(hint, seen, question):
    assert asked({"question": "Why?", "hint": hint, "seen": seen}, question=LINES) == question


def test_braces_in_the_data_are_not_slots():
    assert asked({"q": "{hint}"}, question=["Q: {q}"]) == "Q: {hint}"


@pytest.mark.parametrize(
    "lines, question",
    [
        ("question", "Why?\nA. so\nB. not"),
        (["{question}", "Mind."], "Why?\nMind.\nA. so\nB. not"),
        (["{options}", "{question}"], "A. so\nB. not\nWhy?"),
        (["{question} Choose: {options}"], "Why? Choose: A. so\nB. not"),
    ],
)
def test_options_come_where_their_slot_is_or_last(lines, question):
    row = read({"question": "Why?", "choices": ["so", "not"], "answer": 1}, question=lines, options="choices")
    assert (row.question, row.answer, row.target) == (question, ["B", "not"], None)


@pytest.mark.parametrize(
    "record, options",
    [
        ({"o": [" so ", "not"]}, "o"),
        ({"o": "['so', 'not']"}, "o"),
        ({"o": '["so", "not"]'}, "o"),
        ({"A": "so", "B": "not", "C": None, "D": ""}, ["A", "B", "C", "D"]),
    ],
)
def test_options_are_a_list_text_that_writes_one_or_several_columns(record, options):
    row = read({"question": "Why?", "answer": "a", **record}, options=options)
    assert (row.question, row.answer) == ("Why?\nA. so\nB. not", ["A", "so"])


@pytest.mark.parametrize(
    "answer, texts, gold",
    [
        (0, ["so", "not"], ["A", "so"]),
        ("B", ["so", "not"], ["B", "not"]),
        ("(b)", ["so", "not"], ["B", "not"]),
        ("not", ["so", "not"], ["B", "not"]),
        ("C", ["B", "C", "so"], ["C", "so"]),  # a letter names an option before it is one's text
        ("A", ["B", "C", "so"], "A"),  # whose text "B" could not be told from a choice
        (1, ["so", "<image 2>"], "B"),  # which nobody can say
        (9, [str(number) for number in range(10)], ["J", "9"]),
    ],
)
def test_the_right_option_is_a_letter_and_its_text(answer, texts, gold):
    assert right_option(answer, texts) == gold


@pytest.mark.parametrize("answer", [2, -1, True, "C", "nothing", None, 0.0, ["A"]])
def test_an_answer_that_is_no_option_is_refused(answer):
    with pytest.raises(ValueError, match="neither index, letter nor text of one of the 2 options"):
        right_option(answer, ["so", "not"])


def test_text_of_equal_options_is_no_answer():
    with pytest.raises(ValueError, match="neither index"):
        right_option("so", ["so", "so"])


@pytest.mark.parametrize("text", ["[see above]", "[__import__('os')]", "[1, 2", "{}", "[" * 5000 + "]" * 5000, "a"])
def test_text_that_is_no_list_of_plain_values_is_not_evaluated(text):
    assert listed_texts(text) is None


def test_sft_learns_the_letter(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "Why?", "o": ["so", "not"], "answer": 1}]))
    task = Task(FileRows(str(tmp_path / "rows.json"), columns=Columns(options="o")), target="It is {answer}")
    (example,) = task.examples("train", "why")
    assert (example.target, example.gold) == ("It is B", ["B", "not"])


@pytest.mark.parametrize("chat", [True, False])
def test_options_in_the_questions_own_text_are_accepted_as_text_too(chat):
    question = "Which month?\nA. March\nB. June\nAnswer with the letter."
    record = {"question": question, "answer": "B"}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "B"}]
    row = read({"messages": turns} if chat else record)
    assert (row.answer, row.target) == (["B", "June"], "B" if chat else None)
    assert read({"question": "What is B?", "answer": "B"}).answer == "B"
    assert read({"question": question, "answer": ["B", "b"]}).answer == ["B", "b"]  # as it was given


def test_an_open_question_among_multiple_choice_may_have_its_answers_written_out():
    record = {"question": "Slope?", "o": "[]", "answer": "['24/7', '3.43']"}
    assert read(record, options="o").answer == ["24/7", "3.43"]
    assert read(record | {"answer": "5"}, options="o").answer == "5"
    assert read({"question": "Interval?", "answer": "[1, 2]"}).answer == "[1, 2]"


COLUMNS = ["i1", "i2", "i3"]


@pytest.mark.parametrize(
    "question, shown, images",
    [
        ("Which?", "Which?", ["a", "c"]),
        ("<image 1> or <image 3>?", "<image> or <image>?", ["a", "c"]),
        ("<image 3> or <image 1>?", "<image> or <image>?", ["c", "a"]),
        ("<image 1>, again <image 1>?", "<image><image>, again <image>?", ["c", "a", "a"]),
        ("Of <image 3>?", "<image>Of <image>?", ["a", "c"]),
    ],
)
def test_numbered_markers_place_images(question, shown, images):
    record = {"question": question, "answer": "x", "i1": "a", "i2": None, "i3": "c"}
    row = read(record, images=COLUMNS)
    assert (row.question, row.images) == (shown, [f"/data/{image}" for image in images])
    row = read({"question": question.replace("3", "2"), "answer": "x", "images": ["a", "c"]})
    assert (row.question, row.images) == (shown, [f"/data/{image}" for image in images])


def test_an_image_without_bytes_and_path_is_none():
    record = {"question": "x?", "answer": "a", "i1": {"bytes": None, "path": None}, "i2": {"bytes": b"a", "path": None}}
    assert read(record, images=["i1", "i2"]).images == [{"bytes": b"a", "path": None}]
    assert read(record, images="i1").images == []


@pytest.mark.parametrize(
    "record, options, message",
    [
        ({"question": "x?", "o": ["a", ""], "answer": 0}, {"options": "o"}, "an option is empty"),
        ({"question": "x?", "A": "", "B": "b", "answer": 1}, {"options": ["A", "B"]}, "an option is empty"),
        (
            {"question": "x?", "o": "a or b", "answer": 0},
            {"options": "o"},
            "'o' holds 'a or b', which is no list",
        ),
        ({"question": "x?", "o": {"a": 1}, "answer": 0}, {"options": "o"}, "'o' holds a dict, not a list of options"),
        ({"question": "x?", "o": ["a"] * 27, "answer": 0}, {"options": "o"}, "27 options are more than"),
        (
            {"question": "x?", "answer": 0},
            {"options": "o"},
            "no column 'o', only question, answer; correct",
        ),
        ({"question": "x?", "o": ["a", "b"], "answer": 2}, {"options": "o"}, "the answer 2 is neither index"),
        ({"a": "", "answer": "x"}, {"question": ["{a}"]}, "the question is empty; fill it in, or leave such rows out"),
        ({"a": {"b": 1}, "answer": "x"}, {"question": ["{a}"]}, "'a' holds a dict, which is no text"),
        ({"a": "x", "answer": "x"}, {"question": ["{b}"]}, "no column 'b', only a, answer; correct columns.question"),
        ({"question": "<image 2>?", "answer": "x", "image": "a"}, {}, "shows <image 2>, the row has 1; correct col"),
        ({"question": "<image 1>?", "answer": "x"}, {}, "shows <image 1>, the row has none"),
        ({"question": "<image 1><image>?", "answer": "x", "image": "a"}, {}, "mixes <image> and numbered markers"),
    ],
)
def test_a_row_that_does_not_fit_is_named(record, options, message):
    with pytest.raises(ValueError, match=f"rows.json:0: .*{message}"):
        read(record, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"messages": "a", "question": "b"}, "columns.messages excludes question and options"),
        ({"messages": "a", "options": "b"}, "columns.messages excludes question and options"),
        ({"question": "{a}"}, "has slots; write it as a list of lines"),
        ({"question": ["Why?"]}, "has no slot, so every row would ask the same"),
        ({"question": ["{a", "b"]}, "a literal brace is written twice"),
        ({"question": ["{a}", "{options}"]}, "has the slot {options}; name the column"),
    ],
)
def test_options_that_contradict_each_other_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Columns(**options)


# -- rows left out -----------------------------------------------------------------------------------------------------


def source(tmp_path, records, columns, **options):
    (tmp_path / "rows.json").write_text(json.dumps(records))
    return FileRows(str(tmp_path / "rows.json"), columns=columns, **options)


def test_rows_are_left_out_by_what_they_hold_and_counted(tmp_path):
    records = [
        {"question": f"{i}?", "answer": "a", "kind": "open" if i % 2 else "closed", "image": [None, "", "a.png"][i % 3]}
        for i in range(12)
    ]
    kept = source(tmp_path, records, Columns(required=["image"], where={"kind": "open"}))
    assert [row.row_id for row in kept.split("train")] == [f"{tmp_path}/rows.json:{i}" for i in (6, 12)]
    assert kept.num_left_out("train") == 10
    either = source(tmp_path, records, Columns(where={"kind": ["open", "closed"]}))
    assert (len(either.split("train")), either.num_left_out("train")) == (12, 0)


def test_a_cut_is_of_the_rows_that_are_kept(tmp_path):
    records = [{"question": f"{i}?", "answer": "a", "level": i % 2} for i in range(20)]
    kept = source(tmp_path, records, Columns(where={"level": 1}), val_fraction=0.2, test_fraction=0.3)
    rows = {split: [row.question for row in kept.split(split)] for split in ("train", "val", "test")}
    assert {split: len(questions) for split, questions in rows.items()} == {"train": 5, "val": 2, "test": 3}
    assert {int(question[:-1]) % 2 for questions in rows.values() for question in questions} == {1}
    assert kept.num_left_out("val") == kept.num_left_out("train") == 10


@pytest.mark.parametrize(
    "columns, message",
    [
        (Columns(required=["kind"]), "columns.required: there is no column 'kind', only question, answer, level"),
        (Columns(where={"kind": 1}), "columns.where: there is no column 'kind', only question, answer, level"),
        (Columns(where={"answer": "b"}), "columns.required and columns.where leave none of 1 rows of train"),
        (Columns(where={"level": "b"}), "columns.required and columns.where leave none of 1 rows of train"),
    ],
)
def test_leaving_out_by_what_is_not_there_is_an_error(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        source(tmp_path, [{"question": "x?", "answer": "a", "level": None}], columns).split("train")


def test_rows_without_options_are_counted(tmp_path):
    record = {"question": "x?", "answer": "a", "A": None, "B": None}
    values = [["a", "b"], "['a', 'b']", "[]", [], None]
    listed = source(tmp_path, [{**record, "o": value} for value in values], Columns(options="o"))
    assert listed.num_without_options("train") == 3
    records = [{**record, "A": "a", "B": "b"}, record]
    assert source(tmp_path, records, Columns(options=["A", "B"])).num_without_options("train") == 1
    assert source(tmp_path, records, Columns()).num_without_options("train") == 0


def test_columns_are_written_in_yaml(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    text = f"""
source:
  train: {tmp_path}/rows.json
  columns:
    question: ["{{hint}}", "{{question}}"]
    options: [A, B]
    where: {{level: [1, 2], kind: open, done: true}}
"""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FileRows, "source")
    parsed = parser.parse_string(text)
    columns = parser.instantiate(parsed).source.columns
    where = {"level": [1, 2], "kind": "open", "done": True}
    assert columns == Columns(question=["{hint}", "{question}"], options=["A", "B"], where=where)
    again = parser.instantiate(parser.parse_string(parser.dump(parsed))).source
    assert again.columns == columns
