"""Data sets of the hub: where they are looked for, which splits they have, what is joined, what is said when not."""

import pickle
import socket

import pytest

from cpt_lightning.tasks import Columns, HubRows, Join, Task, hub, load_image
from tests.tasks.conftest import png

datasets = pytest.importorskip("datasets")
hub_sets = pytest.importorskip("tests.tasks.hub_sets")

TRAIN_AND_TEST = {"train": "train", "test": "test"}


@pytest.fixture
def data(tmp_path, monkeypatch, cache):
    """The folder ``data`` of the working directory; nothing may reach for the network."""

    def refuse(*_):
        raise AssertionError("a data set on disk needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def small(data, configs=("default",), splits=("train", "test"), num_rows=4):
    rows = [{"question": f"{i}?", "answer": f"a{i}", "image": hub_sets.picture("red")} for i in range(num_rows)]
    features = {"question": hub_sets.TEXT, "answer": hub_sets.TEXT, "image": hub_sets.PICTURE}
    hub_sets.write_set(data / "me/set", {name: dict.fromkeys(splits, rows) for name in configs}, features)


def ids(source, split="train"):
    return [row.row_id for row in source.split(split)]


def test_a_set_is_looked_for_in_the_root_then_as_a_folder(data):
    small(data)
    assert ids(HubRows("me/set", TRAIN_AND_TEST), "test") == [f"me/set/test/{i}" for i in range(4)]
    assert ids(HubRows("set", TRAIN_AND_TEST, root="data/me"))[0] == "set/train/0"
    assert ids(HubRows(str(data / "me/set"), TRAIN_AND_TEST))[0] == f"{data}/me/set/train/0"
    assert ids(HubRows("data/me/set", TRAIN_AND_TEST, root="nowhere", revision="v1"))[0] == "data/me/set/train/0"


def test_a_set_without_a_card_and_with_traces_of_its_download_is_read(data):
    small(data)
    (data / "me/set/README.md").unlink()
    (data / "me/set/.gitattributes").write_text("*.parquet filter=lfs\n")
    (data / "me/set/.cache/huggingface").mkdir(parents=True)
    (data / "me/set/.cache/huggingface/train.metadata").write_text("a commit\n")
    assert len(HubRows("me/set", TRAIN_AND_TEST).split("train")) == 4


def test_configurations_are_named_listed_or_all(data):
    small(data, configs=("b", "a"), num_rows=1)
    assert ids(HubRows("me/set", {"train": "a/train"})) == ["me/set/a/train/0"]
    assert ids(HubRows("me/set", {"train": ["b/train", "a/test"]})) == ["me/set/b/train/0", "me/set/a/test/0"]
    assert sorted(ids(HubRows("me/set", {"train": "*/train"}))) == ["me/set/a/train/0", "me/set/b/train/0"]


def test_a_saved_set_is_read_too(data):
    splits = {name: datasets.Dataset.from_list([{"question": "x?", "answer": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(data / "me/set"))
    assert HubRows("me/set", TRAIN_AND_TEST).split("test")[0].answer == "test"
    with pytest.raises(ValueError, match="data set 'data/me/set': split 'dev' cannot be read: there are train, test"):
        HubRows("me/set", {"train": "dev"}).split("train")
    datasets.DatasetDict(splits).save_to_disk(str(data / "me/many/art"))
    assert ids(HubRows("me/many", {"train": "*/test"})) == ["me/many/art/test/0"]
    assert ids(HubRows("me/many", {"train": "art/test"})) == ["me/many/art/test/0"]
    with pytest.raises(ValueError, match="set/train' is a single saved split; give it to FileRows"):
        HubRows("data/me/set/train", {"train": "train"}).split("train")


def test_a_set_that_is_not_there_says_how_to_get_it(data, tmp_path):
    source = HubRows("me/set", TRAIN_AND_TEST, root="/sets")
    with pytest.raises(ValueError) as raised:  # noqa: PT011 looked at below
        source.split("train")
    message = str(raised.value)
    assert "data set 'me/set' is neither on disk (looked for /sets/me/set and me/set" in message
    assert str(tmp_path) in message
    assert message.endswith("get it with: hf download --repo-type dataset me/set --local-dir /sets/me/set")
    with pytest.raises(ValueError, match="'me/set' is neither on disk .* nor to be had from the hub"):
        HubRows("me/set", {"train": "*/train"}).split("train")
    with pytest.raises(ValueError, match="neither on disk .*no folder, and no name on the hub"):
        HubRows("./some/where/else", TRAIN_AND_TEST).split("train")


def test_a_hub_that_cannot_be_reached_is_tried_once_for_all_sets(data, cache, monkeypatch):
    """What is in the cache of ``datasets`` is read all the same, and the setting is as before afterwards."""
    asked, offline = [], []

    def refuse(*args, **options):
        asked.append(args)
        raise OSError("no route")

    def load(path, config, split, revision):
        offline.append(constants.HF_HUB_OFFLINE)
        if path == "me/cached":
            return datasets.Dataset.from_list([{"question": "x?", "answer": "a"}])
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.http_backoff", refuse)
    monkeypatch.setattr("datasets.load_dataset", load)
    hub._why_hub_is_silent.cache_clear()
    try:
        for name in ("me/set", "me/other"):
            source = HubRows(name, TRAIN_AND_TEST)
            for split in ("train", "test", "train"):
                with pytest.raises(ValueError, match=f"'{name}' is neither .*cannot be reached: OSError: no route"):
                    source.split(split)
        assert len(HubRows("me/cached", TRAIN_AND_TEST).split("train")) == 1
    finally:
        hub._why_hub_is_silent.cache_clear()
    assert (len(asked), offline, constants.HF_HUB_OFFLINE) == (1, [True] * 5, False)


@pytest.mark.parametrize("spec, message", [("dev", "split 'dev' .*dev"), ("art/train", "split 'art/train' .*art")])
def test_a_split_that_is_not_there_is_named(data, spec, message):
    small(data)
    with pytest.raises(ValueError, match=f"data set 'data/me/set': {message}"):
        HubRows("me/set", {"train": spec}).split("train")


def test_a_set_of_several_configurations_asks_for_one(data):
    small(data, configs=("a", "b"))
    with pytest.raises(ValueError, match="split 'train' cannot be read: .*a.*b"):
        HubRows("me/set", TRAIN_AND_TEST).split("train")


def test_splits_that_the_set_lacks_are_cut_from_its_training_rows(data):
    small(data, num_rows=10)
    source = HubRows("me/set", {"train": "train"}, val_fraction=0.2, test_fraction=0.3)
    cut = [ids(source, split) for split in ("train", "val", "test")]
    assert [len(part) for part in cut] == [5, 2, 3]
    assert sorted(row_id for part in cut for row_id in part) == [f"me/set/train/{i}" for i in range(10)]
    with pytest.raises(ValueError, match="no val split; set val, or val_fraction"):
        HubRows("me/set", {"train": "train"}).split("val")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"splits": {}}, "splits names nothing; map some of train, val, test to me/set's"),
        ({"splits": {"validation": "val"}}, "splits names validation; map some of train, val, test"),
        ({"splits": {"train": "a/b/c"}}, "splits.train is 'a/b/c'; write <split> or <configuration>/<split>"),
        ({"splits": {"train": ["a", "/b"]}}, "splits.train is"),
        ({"splits": {"train": "a", "val": "b"}, "val_fraction": 0.1}, "both val and val_fraction"),
        ({"splits": {"test": "a"}, "val_fraction": 0.1}, "are cut from train"),
        (
            {"splits": TRAIN_AND_TEST, "join": Join("a", "b", {"train": "c"})},
            "join.splits has train, splits train, test",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        HubRows("me/set", **options)


# -- what is not read before it is needed ------------------------------------------------------------------------------


def test_images_stay_encoded_until_a_row_is_shown(data):
    """A broken image does no harm to counting, choosing and reading rows."""
    broken = {"bytes": png()[:40], "path": "cut.png"}
    rows = [{"question": "x?", "answer": "a", "image": image, "kind": 1} for image in (broken, None, broken)]
    features = {"question": hub_sets.TEXT, "answer": hub_sets.TEXT, "image": hub_sets.PICTURE}
    hub_sets.write_set(data / "me/set", {"default": {"train": rows}}, features | {"kind": datasets.Value("int64")})
    source = HubRows("me/set", {"train": "train"}, columns=Columns(required=["image"], where={"kind": 1}))
    rows = source.split("train")
    assert (len(rows), source.num_left_out("train")) == (2, 1)
    assert rows[1].row_id == "me/set/train/2"
    with pytest.raises(ValueError, match="task 'a', me/set/train/2: image 'cut.png' is not an image"):
        Task(source).examples("train", "a")[1]


@pytest.mark.parametrize("kind", ["struct", "list", "bytes"])
def test_required_images_are_only_looked_at_for_being_there(data, kind):
    values = {"struct": [hub_sets.picture("red"), None, None]}
    values |= {"list": [[hub_sets.picture("red")], [], None], "bytes": [png(), None, None]}
    types = {"struct": hub_sets.PICTURE, "list": datasets.List(hub_sets.PICTURE), "bytes": datasets.Value("binary")}
    rows = [{"question": "x?", "answer": "a", "image": value} for value in values[kind]]
    features = {"question": hub_sets.TEXT, "answer": hub_sets.TEXT, "image": types[kind]}
    hub_sets.write_set(data / "me/set", {"default": {"train": rows}}, features)
    source = HubRows("me/set", {"train": "train"}, columns=Columns(required=["image"]))
    (row,) = source.split("train")
    assert load_image(row.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_rows_travel_to_workers(data):
    hub_sets.gqa(data)
    rows = gqa().split("train")
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]


# -- joined columns ----------------------------------------------------------------------------------------------------


def gqa(split="train", other="images", **options):
    join = Join("imageId", "id", {split: f"train_balanced_{other}/train"}, **options.pop("join", {}))
    return HubRows("lmms-lab/GQA", {split: "train_balanced_instructions/train"}, join=join, **options)


def test_a_joined_cut_keeps_the_questions_of_a_picture_together(data):
    hub_sets.gqa(data)
    source = gqa(val_fraction=0.34)
    colours = [
        {load_image(row.images[0]).getpixel((0, 0)) for row in source.split(split)} for split in ("train", "val")
    ]
    assert [len(part) for part in colours] == [2, 1]
    assert not colours[0] & colours[1]


def test_a_key_without_its_row_is_named_or_left_out(data):
    asked = [{"id": str(i), "imageId": f"n{i}", "question": "x?", "answer": "a"} for i in range(3)]
    shown = [{"id": "n2", "image": hub_sets.picture("red")}, {"id": "n1", "image": None}]
    features = {
        "train_balanced_instructions": dict.fromkeys(("id", "imageId", "question", "answer"), hub_sets.TEXT),
        "train_balanced_images": {"id": hub_sets.TEXT, "image": hub_sets.PICTURE},
    }
    configs = {"train_balanced_instructions": {"train": asked}, "train_balanced_images": {"train": shown}}
    hub_sets.write_set(data / "lmms-lab/GQA", configs, features)
    with pytest.raises(ValueError, match="instructions/train/0: no row of .*_images/train has the imageId 'n0'"):
        gqa().split("train")[0]
    source = gqa(columns=Columns(required=["image"]))
    assert ids(source) == ["lmms-lab/GQA/train_balanced_instructions/train/2"]
    assert source.num_left_out("train") == 2


def test_rows_are_chosen_by_joined_columns(data):
    asked = [{"id": str(i), "imageId": f"n{i}", "question": "x?", "answer": "a"} for i in range(3)]
    shown = [{"id": "n2", "place": "sea"}, {"id": "n1", "place": "hill"}]
    features = {
        "train_balanced_instructions": dict.fromkeys(("id", "imageId", "question", "answer"), hub_sets.TEXT),
        "train_balanced_images": {"id": hub_sets.TEXT, "place": hub_sets.TEXT},
    }
    configs = {"train_balanced_instructions": {"train": asked}, "train_balanced_images": {"train": shown}}
    hub_sets.write_set(data / "lmms-lab/GQA", configs, features)
    source = gqa(join={"columns": ["place"]}, columns=Columns(where={"place": "sea"}))
    assert ids(source) == ["lmms-lab/GQA/train_balanced_instructions/train/2"]


def test_a_join_by_columns_that_are_not_there_is_refused(data):
    hub_sets.gqa(data)
    with pytest.raises(ValueError, match="data set 'lmms-lab/GQA': join: there is no column 'picture' in id, image"):
        gqa(join={"columns": ["picture"]}).split("train")
