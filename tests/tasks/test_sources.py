"""Rows from JSON, JSON lines and parquet in the forms that others write."""

import base64
import json
import pickle
from pathlib import Path

import pytest

from cpt_lightning.tasks import Columns, FileRows, Prompt, Reward, Row, Task
from cpt_lightning.tasks.splits import cut_by_group
from tests.tasks.conftest import png

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the samples of real data are not here")


def chat(question, answer, **columns):
    turns = [{"role": "user", "content": question}]
    turns += [{"role": "assistant", "content": answer}] if answer is not None else []
    return {"messages": turns, **columns}


def written(folder, *records, name="rows.json"):
    """The records as a file; its path."""
    path = folder / name
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n" if name.endswith("l") else json.dumps(records))
    return str(path)


def read(folder, *records, name="rows.json", **options):
    return list(FileRows(written(folder, *records, name=name), **options).split("train"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_chats_with_images_are_read_as_other_trainers_write_them(tmp_path, name):
    (row,) = read(tmp_path, chat("<image>\nWhat is it?", "a cat", images=["pictures/1.png"]), name=name)
    path = str(tmp_path / "pictures" / "1.png")
    assert row == Row(f"{tmp_path / name}:1", "<image>\nWhat is it?", "a cat", [path], target="a cat")


def test_questions_with_images_are_read_as_the_hub_has_them(tmp_path):
    (row,) = read(tmp_path, {"images": ["1.png"], "problem": "<image>Find x.", "answer": 5})
    assert row == Row(f"{tmp_path}/rows.json:1", "<image>Find x.", "5", [str(tmp_path / "1.png")])


def test_a_reasoned_reply_is_learned_whole_and_graded_by_its_answer(tmp_path):
    reply = r"<think>5 + 1</think>\boxed{6}"
    (row,) = read(tmp_path, chat("x?", reply))
    assert (row.answer, row.target) == ("6", reply)


def test_a_chat_brings_its_system_turn_and_its_content_in_parts(tmp_path):
    asked = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "x?"}, {"type": "image", "image": "2.png"}]
    record = chat(asked, None, solution="<answer>B</answer>")
    record["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (row,) = read(tmp_path, record)
    assert (row.question, row.system, row.target) == ("<image>x?<image>", "Be brief.", None)
    assert row.images == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    assert row.answer == "<answer>B</answer>"  # a column's value stays as it is


TURNS = chat("<image>x?", "<think>so</think><answer>a</answer>")["messages"]
SHAREGPT = [{"from": "human", "value": "<image>x?"}, {"from": "gpt", "value": "<think>so</think><answer>a</answer>"}]
ASKED, REPLIED = TURNS[:1], TURNS[1:]


@pytest.mark.parametrize(
    "record, options",
    [
        ({"messages": TURNS}, {}),  # LLaMA-Factory, ms-swift, TRL
        ({"conversations": SHAREGPT}, {}),  # ShareGPT, LLaVA
        ({"prompt": ASKED, "completion": REPLIED}, {}),  # TRL
        ({"prompt": "<image>x?", "completion": TURNS[1]["content"]}, {}),
        ({"instruction": "<image>x?", "input": "", "output": TURNS[1]["content"]},
         {"question": ["{instruction}", "{input}"], "reply": "output"}),  # Alpaca
        ({"query": "<image>x?", "response": TURNS[1]["content"]}, {"question": "query", "reply": "response"}),
    ],
)  # fmt: skip
def test_a_reply_is_learned_in_whatever_form_it_is_written(tmp_path, record, options):
    (row,) = read(tmp_path, {**record, "images": ["1.png"], "system": "Be brief."}, columns=Columns(**options))
    assert (row.question, row.answer, row.target) == ("<image>x?", "a", TURNS[1]["content"])
    assert (row.images, row.system) == ([str(tmp_path / "1.png")], "Be brief.")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "solution": "a"},  # TRL's GRPO
        {"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": "a"}},  # verl
        {"prompt": "<image>x?", "ground_truth": "a"},
    ],
)
def test_a_prompt_without_a_reply_is_asked_and_graded(tmp_path, record):
    (row,) = read(tmp_path, {**record, "image": "1.png"})
    assert (row.question, row.answer, row.target) == ("<image>x?", "a", None)


def test_an_answer_of_its_own_is_graded_beside_a_reply(tmp_path):
    record = {"question": "x?", "why": "Since it is so, a.", "answer": "a"}
    (row,) = read(tmp_path, record, columns=Columns(reply="why"))
    assert (row.answer, row.target) == ("a", "Since it is so, a.")
    (row,) = read(tmp_path, {"question": "x?", "completion": "what a model said", "answer": "a"})
    assert (row.answer, row.target) == ("a", None)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "1.png"},
        {"type": "image", "path": "1.png"},
        {"type": "image", "url": "1.png", "image": None},
        {"type": "image_url", "image_url": {"url": "1.png"}},
    ],
)
def test_an_image_stands_inside_a_turn_as_others_write_it(tmp_path, part):
    (row,) = read(tmp_path, chat([part, {"type": "text", "text": "x?"}], "a", images=None))
    assert (row.question, row.images) == ("<image>x?", [str(tmp_path / "1.png")])


def test_the_last_question_of_a_chat_is_asked_behind_the_turns_before_it(tmp_path):
    """Images are counted through all turns, and without a marker come first."""
    turns = [*SHAREGPT, {"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "b"}]
    record = {"conversations": turns, "images": ["1.png", "2.png"]}
    for image in record["images"]:
        (tmp_path / image).write_bytes(png("blue"))
    source = FileRows(written(tmp_path, record), columns=Columns(turns="last"))
    (example,) = Task(source, Prompt(system="Be brief.", suffix=" Say it.")).examples("train", "a")
    text, image = ({"type": "text", "text": "x?"}, {"type": "image"})
    assert example.messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": SHAREGPT[1]["value"]}]},
        {"role": "user", "content": [{"type": "text", "text": "And "}, image, {"type": "text", "text": "? Say it."}]},
    ]
    assert (example.gold, example.target, len(example.images)) == ("b", "b", 2)
    bare = [{"role": turn, "content": turn} for turn in ("user", "assistant", "user", "assistant")]
    (row,) = read(tmp_path, {"messages": bare, "image": "1.png"}, columns=Columns(turns="last"))
    asked = Prompt().messages(row.question, 1, row.system, row.history)
    assert [[part["type"] for part in turn["content"]] for turn in asked] == [["image", "text"], ["text"], ["text"]]


@pytest.mark.parametrize("name, mark", [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_table_of_text_is_read(tmp_path, name, mark):
    """Numbers stay as they are written, and a picture in base64 may be longer than csv's usual limit."""
    picture = base64.b64encode(png("blue")).decode()
    long = f'"x{mark}\ny ""z"" {"w" * 200_000}"'
    lines = [mark.join(row) for row in (["question", "answer", "image"], [long, "007", picture], ["y?", "NA", ""])]
    (tmp_path / name).write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    first, second = Task(FileRows(str(tmp_path / name))).examples("train", "a")
    assert (first.gold, second.gold, second.images) == ("007", "NA", [])
    assert first.messages[0]["content"][1]["text"] == f'x{mark}\ny "z" {"w" * 200_000}'
    assert first.images[0].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("line", ["x?", "x?,a,b", '"x?,a'])
def test_a_line_of_other_values_than_names_is_named(tmp_path, line):
    (tmp_path / "rows.csv").write_text(f"question,answer\ny?,a\n{line}\n")
    with pytest.raises(ValueError, match="rows.csv: line 3 (has not one value for each of question, answer|cannot be)"):
        FileRows(str(tmp_path / "rows.csv")).split("train")


@pytest.mark.parametrize(
    "value, answer",
    [
        ("a", "a"),
        (3, "3"),
        (2.5, "2.5"),
        (1.0, "1"),
        (True, "True"),
        (["a", "b"], ["a", "b"]),
        (["a", None, " ", float("nan"), 2.0], ["a", "2"]),
        ([{"answer": "a", "n": 1}, {"answer": ""}], ["a"]),
    ],
)
def test_answers_become_text(tmp_path, value, answer):
    (row,) = read(tmp_path, {"question": "x?", "answer": value})
    assert row.answer == answer


@pytest.mark.parametrize("value", [None, " ", float("nan"), [], [None, ""], [{"answer": None}]])
def test_an_answer_that_says_nothing_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"rows.json:1: empty answer .*; fill it in or take the row out"):
        read(tmp_path, {"question": "x?", "answer": value})


@pytest.mark.parametrize("value", [None, "", " ", float("nan")])
def test_a_question_that_says_nothing_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"rows.json:1: the question is empty; fill it in, or leave such rows out"):
        read(tmp_path, {"question": value, "answer": "a"})


def test_a_split_that_cannot_be_opened_is_not_tried_again(tmp_path):
    """The second time even a file that has been mended in between is not looked at."""
    path = written(tmp_path, name="rows.json")
    source = FileRows(path)
    Path(path).write_text("[")
    with pytest.raises(ValueError, match="not a JSON file") as first:
        source.split("train")
    written(tmp_path, {"question": "x?", "answer": "a"})
    with pytest.raises(ValueError, match="not a JSON file") as second:
        source.split("train")
    assert str(second.value) == str(first.value)
    assert len(FileRows(path).split("train")) == 1


def test_columns_of_other_names_are_given_by_options(tmp_path):
    record = {"q": "x?", "label": "a", "picture": "1.png", "why": "so", "answer": "not this", "problem": "nor this"}
    columns = Columns(question="q", answer="label", images="picture", fields=["why"])
    (row,) = read(tmp_path, record, image_folder=str(tmp_path.parent), columns=columns)
    assert (row.question, row.answer, row.fields) == ("x?", "a", {"why": "so"})
    assert row.images == [str(tmp_path.parent / "1.png")]
    talk = {"talk": chat("y?", "b")["messages"], "gold": "c"}
    (row,) = read(tmp_path, talk, columns=Columns(messages="talk", answer="gold"))
    assert (row.answer, row.target) == ("c", "b")


def test_rows_without_images_are_text(tmp_path):
    rows = read(tmp_path, {"question": "x?", "answer": "a"}, {"question": "y?", "answer": "b", "image": None})
    assert [row.images for row in rows] == [[], []]


def test_paths_are_only_completed_where_they_are_relative(tmp_path):
    images = ["/elsewhere/1.png", "https://example.com/1.png", {"path": "2.png", "bytes": None}]
    (row,) = read(tmp_path, {"question": "x?", "answer": "a", "images": images})
    assert row.images == ["/elsewhere/1.png", "https://example.com/1.png", str(tmp_path / "2.png")]


def test_base64_in_a_file_is_shown(tmp_path):
    text = base64.b64encode(png("blue")).decode()
    records = [{"question": "x?", "answer": "a", "image": image} for image in (text, f"data:image/png;base64,{text}")]
    for example in Task(FileRows(written(tmp_path, *records))).examples("train", "a"):
        assert example.images[0].getpixel((0, 0)) == (0, 0, 255)


def parquet(path, records, *, decode):
    datasets = pytest.importorskip("datasets")
    image = datasets.Image() if decode else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(
        {"images": datasets.List(image), "problem": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_list(records, features=features).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("decode", [True, False])
def test_parquet_with_the_hubs_images_is_read_row_by_row(tmp_path, cache, decode):
    colours = ["red", "lime", "blue"]
    records = [
        {
            "images": [{"bytes": png(colour), "path": f"{colour}.png"}],
            "problem": "<image>What colour?",
            "answer": colour,
        }
        for colour in colours
    ]
    file = parquet(tmp_path / "rows.parquet", records, decode=decode)
    examples = Task(FileRows(file)).examples("train", "colours")
    assert [example.gold for example in examples] == colours
    assert [example.images[0].getpixel((0, 0)) for example in examples] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert examples[2].row_id == f"{file}:3"
    broken = [{"images": [{"bytes": png()[:50], "path": "cut.png"}], "problem": "<image>?", "answer": "red"}]
    file = parquet(tmp_path / "broken.parquet", broken, decode=decode)
    with pytest.raises(ValueError, match="task 'colours', .*broken.parquet:1: image 'cut.png'"):
        Task(FileRows(file)).examples("train", "colours")[0]


def test_parquet_rows_are_cut_one_by_one_or_by_a_column(tmp_path, cache):
    records = [
        {"images": [{"bytes": png(), "path": None}], "problem": f"<image>{i % 5}", "answer": str(i)} for i in range(20)
    ]
    file = parquet(tmp_path / "rows.parquet", records, decode=True)
    assert len(FileRows(file, test_fraction=0.25).split("test")) == 5
    source = FileRows(file, test_fraction=0.2, group_by="problem")
    assert len({row.question for row in source.split("test")}) == 1
    assert len(source.split("test")) == 4


def test_several_files_make_one_split_and_keep_their_names(tmp_path):
    first = written(tmp_path, {"question": "a?", "answer": "a"}, {"question": "b?", "answer": "b"})
    (tmp_path / "more").mkdir()
    second = written(tmp_path / "more", {"question": "c?", "answer": "c", "image": "1.png"}, name="rows.jsonl")
    rows = FileRows([first, second], val=second).split("train")
    assert [row.row_id for row in rows] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert rows[2].images == [str(tmp_path / "more" / "1.png")]
    assert len(FileRows(first, val=second).split("val")) == 1


def test_a_cut_keeps_the_rows_of_a_picture_together(tmp_path):
    records = [chat(f"<image>{i}?", str(i), images=[f"{i // 4}.png"]) for i in range(40)]
    source = FileRows(written(tmp_path, *records), val_fraction=0.2, test_fraction=0.3)
    splits = {split: list(source.split(split)) for split in ("train", "val", "test")}
    pictures = {split: {row.images[0] for row in rows} for split, rows in splits.items()}
    assert {split: len(names) for split, names in pictures.items()} == {"train": 5, "val": 2, "test": 3}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 20, "val": 8, "test": 12}
    assert len(set.union(*pictures.values())) == 10
    again = FileRows(source.train, val_fraction=0.2, test_fraction=0.3)
    assert [row.row_id for row in again.split("test")] == [row.row_id for row in splits["test"]]
    other = FileRows(source.train, val_fraction=0.2, test_fraction=0.3, seed=1)
    assert [row.row_id for row in other.split("test")] != [row.row_id for row in splits["test"]]


def test_a_cut_of_rows_without_pictures_is_by_row(tmp_path):
    records = [{"question": f"{i}?", "answer": "a", "images": []} for i in range(8)]
    assert len(FileRows(written(tmp_path, *records), val_fraction=0.25).split("val")) == 2


def test_the_test_part_does_not_depend_on_the_validation_part():
    groups = list(range(100))
    with_val, without = cut_by_group(groups, 0.3, 0.2, seed=3), cut_by_group(groups, 0.0, 0.2, seed=3)
    assert with_val["test"].tolist() == without["test"].tolist()
    assert sorted(index for part in with_val.values() for index in part.tolist()) == groups


@pytest.mark.parametrize(
    "record, options, message",
    [
        (
            {"text": "x?", "answer": "a"},
            {},
            "no column problem or question or prompt, only text, answer; name it with columns.question",
        ),
        ({"question": "x?", "gold": "a"}, {}, "no column answer or answers or solution or .*, only question, gold"),
        (
            {"question": "x?", "answer": "a"},
            {"answer": "gold"},
            "no column 'gold', only .*correct columns.answer",
        ),
        ({"question": "x?", "answer": "a"}, {"images": "img"}, "no column 'img', only .*correct columns.images"),
        ({"question": "x?", "answer": "a"}, {"messages": "talk"}, "no column 'talk', only .*correct columns.messages"),
        ({"question": "x?", "answer": "a"}, {"fields": ["why"]}, "no column 'why', only .*correct columns.fields"),
        ({"question": 3, "answer": "a"}, {}, "column 'question' holds an int, not text"),
        ({"question": "x?", "answer": {"a": 1}}, {}, "column 'answer' holds a dict, not an answer"),
        ({"question": "x?", "answer": None}, {}, "empty answer"),
        ({"question": "x?", "answer": "  "}, {}, "empty answer"),
        (chat("x?", ""), {}, "empty answer"),
        (chat("x?", None), {}, "no column answer"),
        ({"messages": "x?"}, {}, "column 'messages' is not a list of turns"),
        ({"messages": [{"role": "tool", "content": "x?"}]}, {}, "a turn of the role 'tool'"),
        ({"messages": [{"role": "user"}]}, {}, "a turn with role; it needs 'role' and 'content'"),
        ({"messages": chat("x?", "a")["messages"] * 2}, {}, "turns before its last question; .*columns.turns=last"),
        ({"prompt": "x?", "completion": chat("y?", "a")["messages"]}, {}, "'completion' is not text, nor a list of"),
        ({**chat("x?", "a"), "system": 3}, {}, "column 'system' holds an int, not text"),
        ({**chat("<video>x?", "a"), "videos": ["1.mp4"]}, {}, "has videos, and text and images are understood"),
        ({"messages": chat("x?", "a")["messages"][1:]}, {}, "may end with the assistant's one reply"),
        (chat([{"type": "video"}], "a"), {}, "a turn with {'type': 'video'}"),
        (["x?", "a"], {}, "the row is a list"),
    ],
)
def test_a_row_that_does_not_fit_names_file_row_and_option(tmp_path, record, options, message):
    source = FileRows(written(tmp_path, record), columns=Columns(**options))
    with pytest.raises(ValueError, match=f"rows.json:1: .*{message}"):
        source.split("train")[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.json", "[1, 2", "rows.json: not a JSON file"),
        ("rows.json", '{"info": [], "data": []}', "rows.json: holds an object with info, data; a list of rows"),
        ("rows.json", "3", "rows.json: holds an int"),
        ("rows.jsonl", '{"a": 1}\n\n{"a": \n', "rows.jsonl: line 3 is not JSON"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        FileRows(str(tmp_path / name)).split("train")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "no file is given"),
        ({"train": "gone.json"}, "file 'gone.json' does not exist"),
        ({"train": __file__}, "test_sources.py' is none of .json, .jsonl, .csv, .tsv, .parquet"),
        ({"train": "FILE", "val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"train": "FILE", "val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing"),
        ({"train": "FILE", "val": "FILE", "val_fraction": 0.5}, "both val and val_fraction"),
        ({"test": "FILE", "val_fraction": 0.5}, "are cut from train"),
        ({"train": "FILE", "group_by": "id"}, "group_by only matters with"),
        ({"train": "FILE", "image_folder": "gone"}, "image_folder 'gone' is not a folder"),
    ],
)
def test_options_that_contradict_each_other_are_refused_at_once(tmp_path, options, message):
    file = written(tmp_path, {"question": "x?", "answer": "a"})
    with pytest.raises(ValueError, match=message):
        FileRows(**{name: file if value == "FILE" else value for name, value in options.items()})


def test_a_missing_split_says_how_to_have_it(tmp_path):
    file = written(tmp_path, {"question": "x?", "answer": "a"})
    with pytest.raises(ValueError, match="no val split; set val, or val_fraction"):
        FileRows(file).split("val")
    with pytest.raises(ValueError, match="no train split; set train"):
        FileRows(test=file).split("train")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        FileRows(file).split("dev")
    with pytest.raises(ValueError, match="val_fraction 0.1 of 1 images or groups is none; raise it"):
        FileRows(file, val_fraction=0.1).split("val")
    with pytest.raises(ValueError, match="there is no column 'id'"):
        FileRows(file, val_fraction=0.1, group_by="id").split("val")


def test_rows_travel_to_workers(tmp_path):
    rows = FileRows(written(tmp_path, {"question": "x?", "answer": "a"})).split("train")
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]


@needs_data
@pytest.mark.parametrize("name", ["scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "super_clevr"])
def test_the_papers_text_is_read_whole(name):
    rows = FileRows(str(DATA / "real_text" / f"{name}.json")).split("train")
    assert len(rows) == (160 if name == "gqa" else 300)
    for row in rows:
        assert (row.question.count("<image>"), len(row.images)) == (1, 1)
        if name == "scienceqa":  # the options stand in the question: their text is right as well, the letter is learned
            assert row.answer == row.target or (row.answer[0] == row.target and f". {row.answer[1]}\n" in row.question)
        else:
            assert row.answer == row.target


@needs_data
def test_real_options_are_asked_and_graded_by_letter_and_text():
    task = Task(FileRows(str(DATA / "mmlu_pro.json"), columns=Columns(options="options")), reward=Reward("letter"))
    records = json.loads((DATA / "mmlu_pro.json").read_text())
    for record, example in zip(records, task.examples("train", "mmlu_pro"), strict=True):
        right = record["options"][record["answer_index"]].strip()
        asked = example.messages[0]["content"][0]["text"]
        assert f"\n{record['answer']}. {right}" in asked
        assert example.target == record["answer"]
        assert example.reward(example.target, example.gold)["accuracy"] == 1
        if isinstance(example.gold, list):
            assert example.gold == [record["answer"], right]


@needs_data
@pytest.mark.parametrize("file, count", [("super_clevr/questions.json", 146), ("geometry3k/problems.json", 6)])
def test_real_pictures_are_shown_with_their_questions(file, count):
    examples = Task(FileRows(str(DATA / file))).examples("train", "real")
    assert len(examples) == count
    for example in (examples[0], examples[-1]):
        assert example.images[0].mode == "RGB"
        assert example.messages[0]["content"][0] == {"type": "image"}
        assert example.reward(example.target, example.gold)["accuracy"] == 1


def test_files_may_be_paths_of_pathlib(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "?", "answer": "5"}\n')
    for given in (file, [file]):
        assert [row.answer for row in FileRows(train=given).split("train")] == ["5"]
