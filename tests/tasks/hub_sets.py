"""Small copies of the papers' data sets, laid out and with the columns as on the hub or in their own release."""

import json
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, List, Value

from tests.tasks.conftest import png

TEXT, TEXTS, PICTURE = Value("string"), List(Value("string")), Image()


def picture(colour):
    return {"bytes": png(colour), "path": None}


def write_set(folder: Path, configs: dict[str, dict[str, list[dict]]], features: dict | dict[str, dict]) -> None:
    """A hub repository: parquet files, and a card that says which configuration and split they are.

    Args:
        folder: The repository.
        configs: Rows of each split of each configuration.
        features: Their columns, or these by configuration.
    """
    card = []
    for config, splits in configs.items():
        place = "data" if config == "default" else config
        (folder / place).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            columns = features.get(config, features)
            rows = [{**dict.fromkeys(columns), **row} for row in rows]
            dataset = Dataset.from_list(rows, features=Features(columns))
            dataset.to_parquet(str(folder / place / f"{split}-00000-of-00001.parquet"))
        files = [{"split": split, "path": f"{place}/{split}-*"} for split in splits]
        card.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs:\n{yaml.safe_dump(card)}---\n# A card\n")


def scienceqa(data: Path) -> None:
    names = ["question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"]
    features = {"image": PICTURE, **dict.fromkeys(names, TEXT), "choices": TEXTS, "answer": Value("int8")}
    blank = dict.fromkeys(names, "")

    def row(**columns):
        return {**blank, **columns}

    rows = [
        row(
            image=picture("red"),
            question="Which month is the wettest?",
            hint="Use the graph.",
            choices=["March", "June", "October"],
            answer=1,
        ),
        row(image=None, question="Is ice a solid?", choices=["yes", "no"], answer=0),
        row(image=picture("blue"), question="Which property matches?", choices=["hard", "soft"], answer=0),
    ]
    write_set(
        data / "derek-thomas/ScienceQA", {"default": dict.fromkeys(("train", "validation", "test"), rows)}, features
    )


def textvqa(data: Path) -> None:
    features = {
        "image_id": TEXT,
        "question_id": Value("int32"),
        "question": TEXT,
        "question_tokens": TEXTS,
        "image": PICTURE,
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": TEXT,
        "flickr_300k_url": TEXT,
        "answers": TEXTS,
        "image_classes": TEXTS,
        "set_name": TEXT,
        "ocr_tokens": TEXTS,
    }
    rows = [
        {
            "image_id": f"image{number // 2}",
            "question_id": number,
            "question": "what is the brand of phone?",
            "question_tokens": ["what"],
            "image": picture("lime"),
            "answers": ["nokia"] * 7 + ["toshiba"] * 3,
            "ocr_tokens": ["MIA", "NOKIA"] if number % 2 == 0 else [],
        }
        for number in range(100)
    ]
    write_set(
        data / "lmms-lab/textvqa", {"default": {"train": rows, "validation": rows[:4], "test": rows[:2]}}, features
    )


def vizwiz(data: Path) -> None:
    for split, colour in (("train", "red"), ("val", "blue")):
        (data / "vizwiz/Annotations").mkdir(parents=True, exist_ok=True)
        (data / f"vizwiz/{split}").mkdir()
        rows = []
        for number in range(60 if split == "train" else 3):
            name = f"VizWiz_{split}_{number:08}.jpg"
            (data / f"vizwiz/{split}/{name}").write_bytes(png(colour))
            said = ["unanswerable"] * 6 + ["dog", "a dog", "cat", "unsuitable"]
            rows.append(
                {
                    "image": name,
                    "question": "What is this?",
                    "answers": [{"answer_confidence": "yes", "answer": answer} for answer in said],
                    "answer_type": "unanswerable",
                    "answerable": 0,
                }
            )
        (data / f"vizwiz/Annotations/{split}.json").write_text(json.dumps(rows))


def vizwiz_hub(data: Path) -> None:
    features = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answers": TEXTS, "category": TEXT}
    row = {"question_id": "VizWiz_val_00000000", "image": picture("red"), "question": "Which green vegetable?"}
    val = {**row, "answers": ["broccoli"] * 9 + ["vegetable"], "category": "other"}
    splits = {"val": [val] * 3, "test": [{**row, "answers": [], "category": None}]}
    write_set(data / "lmms-lab/VizWiz-VQA", {"default": splits}, features)


def gqa(data: Path) -> None:
    questions = {
        "id": TEXT,
        "imageId": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "fullAnswer": TEXT,
        "isBalanced": Value("bool"),
        "groups": {"global": TEXT, "local": TEXT},
        "entailed": TEXT,
        "equivalent": TEXT,
        "types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT},
        "annotations": {"question": List({"objectId": TEXT, "value": TEXT})},
        "semantic": List({"operation": TEXT, "argument": TEXT, "dependencies": List(Value("int32"))}),
        "semanticStr": TEXT,
    }
    asked = [
        {
            "id": f"{number}",
            "imageId": f"n{number % 3}",
            "question": f"Is it {number}?",
            "answer": "yes",
            "fullAnswer": "Yes, it is.",
            "isBalanced": True,
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verify"},
        }
        for number in range(7)
    ]
    shown = [
        {"id": f"n{number}", "image": picture(colour)} for number, colour in ((2, "blue"), (0, "red"), (1, "lime"))
    ]
    configs, features = {}, {}
    for name, split in (("train", "train"), ("val", "val"), ("testdev", "testdev")):
        configs[f"{name}_balanced_instructions"] = {split: asked}
        features[f"{name}_balanced_instructions"] = questions
        configs[f"{name}_balanced_images"] = {split: shown}
        features[f"{name}_balanced_images"] = {"id": TEXT, "image": PICTURE}
    write_set(data / "lmms-lab/GQA", configs, features)


def geometry3k(data: Path) -> None:
    rows = [{"images": [picture("red")], "problem": r"<image>Find $m \angle 2$.", "answer": r"8 \sqrt { 2 }"}] * 3
    features = {"images": List(PICTURE), "problem": TEXT, "answer": TEXT}
    write_set(data / "hiyouga/geometry3k", {"default": dict.fromkeys(("train", "validation", "test"), rows)}, features)


def pathvqa(data: Path) -> None:
    rows = [{"image": picture("red"), "question": "where are liver stem cells located?", "answer": "in the canals"}] * 3
    features = {"image": PICTURE, "question": TEXT, "answer": TEXT}
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    write_set(data / "flaviagiammarino/path-vqa", {"default": splits}, features)


def super_clevr(data: Path) -> None:
    (data / "super_clevr/images").mkdir(parents=True)
    questions = []
    for number in range(40):
        name = f"superCLEVR_new_{number // 2:06}.png"
        (data / "super_clevr/images" / name).write_bytes(png("red"))
        asked = {"image_filename": name, "image_index": number // 2, "question_hash": "a", "program": []}
        questions.append(
            {**asked, "question": "How many buses are there?", "answer": [2, True, "small", 0][number % 4]}
        )
    held = {"info": {"split": "new"}, "questions": questions}
    (data / "super_clevr/superCLEVR_questions_30k.json").write_text(json.dumps(held))


def mmmu(data: Path) -> None:
    names = ["id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty", "question_type"]
    images = [f"image_{number}" for number in range(1, 8)]
    features = {**dict.fromkeys([*names, "subfield"], TEXT), **dict.fromkeys(images, PICTURE)}
    chosen = {
        "id": "validation_Art_1",
        "question": "<image 1> Which one shows the same colour?",
        "options": "['<image 2>', '<image 3>', 'both of them', \"it's none\"]",
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": picture("red"),
        "image_2": picture("blue"),
        "image_3": picture("lime"),
    }
    read_off = {
        "id": "validation_Math_1",
        "question": "How large is the slope? <image 1>",
        "options": "[]",
        "answer": "['24/7', '3.429']",
        "question_type": "open",
        "image_1": picture("red"),
    }
    configs = {
        "Art": {split: [chosen] for split in ("dev", "validation", "test")},
        "Math": {split: [read_off] * 2 for split in ("dev", "validation", "test")},
    }
    write_set(data / "MMMU/MMMU", configs, features)


def mmlu_pro(data: Path) -> None:
    features = {
        "question_id": Value("int64"),
        "question": TEXT,
        "options": TEXTS,
        "answer": TEXT,
        "answer_index": Value("int64"),
        "cot_content": TEXT,
        "category": TEXT,
        "src": TEXT,
    }
    row = {
        "question_id": 70,
        "question": "How many forests?",
        "options": [str(number) for number in range(10, 20)],
        "answer": "I",
        "answer_index": 8,
        "cot_content": "",
        "category": "math",
        "src": "theoremQA",
    }
    write_set(data / "TIGER-Lab/MMLU-Pro", {"default": {"test": [row] * 3, "validation": [row]}}, features)


def pope(data: Path) -> None:
    features = dict.fromkeys(("id", "question_id", "question", "answer", "image_source", "category"), TEXT)
    row = {"id": "0", "question_id": "1", "question": "Is there a snowboard in the image?", "answer": "yes"}
    rows = [
        {**row, "image_source": "COCO_val2014_000000310196", "category": "adversarial", "image": picture("red")}
    ] * 3
    splits = {"default": {"test": rows}, "Full": dict.fromkeys(("adversarial", "popular", "random"), rows)}
    write_set(data / "lmms-lab/POPE", splits, {**features, "image": PICTURE})
