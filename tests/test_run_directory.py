"""`docs/run_directory.md` is right: short runs leave the files, fields and scalars that it names, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cpt_lightning.cli import main
from cpt_lightning.cli.study.arms import Run
from cpt_lightning.cli.study.runner import Runner
from cpt_lightning.records import RunFolder
from cpt_lightning.report import figures_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "run_directory.md"
PLUGINS = ("_hparams_", "custom_scalars__")
"""Tags in which TensorBoard keeps what is no text: hyperparameters and the layout of charts."""
TYPES = {"text": str, "int": int, "number": (int, float), "bool": bool, "null": type(None)}
CONFIG = """
run_dir: RUN
model: {class_path: cpt_lightning.modules.SFT, init_args: {evaluation: {max_new_tokens: 8, temperature: 0}}}
data:
  tasks:
    word2: &toy
      source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}
      reward: {format: think_answer}
      num_train: 4
      num_test: 2
    digit2: {<<: *toy, source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: digit2}}}
  probes:
    facts:
      <<: *toy
      source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: existence}}
      reward: {kind: yes_no, format: think_answer}
  prompts_per_step: 2
  steps: 2
trainer: {accelerator: cpu, enable_progress_bar: false}
"""
RFT = """
model:
  class_path: cpt_lightning.modules.RFT
  init_args:
    group_size: 2
    kl_coef: 0.01
    peak_flops: 1.0e+12
    forced_prefix: <think>
    sampling: {max_new_tokens: 8}
filter: {mode: solvable, completions_per_row: 2, lowest: 0}
trainer:
  callbacks:
    - {class_path: cpt_lightning.callbacks.Drift, init_args: {num_rows: 2, max_new_tokens: 8}}
    - {class_path: cpt_lightning.callbacks.Influence, init_args: {num_rows: 2, max_new_tokens: 8, every_n_steps: 1}}
    - {class_path: cpt_lightning.callbacks.GradientRisk, init_args: {num_rows: 2, max_new_tokens: 8}}
    - {class_path: cpt_lightning.callbacks.WeightChange}
    - {class_path: cpt_lightning.callbacks.WeightDistance, init_args: {num_rows: 2, max_new_tokens: 8}}
"""
COLLECT = """
model: {init_args: {attempts: {group_size: 2, sampling: {max_new_tokens: 32}}}}
data: {predict_on: train}
trainer:
  callbacks: [{class_path: cpt_lightning.callbacks.RolloutWriter, init_args: {selection: {correct_only: false}}}]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """The folders of a run of SFT that was also tested, predicted, exported and inspected, and of a run of RFT."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overlay in (("rft", RFT), ("collect", COLLECT)):
        (folder / f"{name}.yaml").write_text(overlay)
    (folder / "config.yaml").write_text(CONFIG.replace("RUN", str(folder / "sft")))
    config = ["-c", str(folder / "config.yaml")]
    main(["inspect", *config])
    main(["fit", *config, "--export.when=end"])
    checkpoint = ["--ckpt_path", str(folder / "sft" / "last.ckpt")]
    for verb in ("validate", "test"):
        main([verb, *config, *checkpoint])
    main(["predict", *config, "-c", str(folder / "collect.yaml"), *checkpoint])
    main(["fit", *config, "-c", str(folder / "rft.yaml"), "--run_dir", str(folder / "rft")])
    runner = Runner()
    runner._execute = lambda command, log, gpu: int(log.write_text("") != 0)
    assert runner.run(Run("sft", 0, folder / "sft", (("fit", "-c", "config.yaml"),)))
    return [folder / "sft", folder / "rft"]


# -- the document --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A row of a table: a name in which ``<...>`` stands for any, what is in it, and when it is there."""

    name: str
    kind: str
    when: str

    @property
    def is_made_here(self) -> bool:
        return not self.when.endswith("*")

    def matches(self, name: str) -> bool:
        parts = re.split(r"(<\w+>)", self.name)
        return (
            re.fullmatch("".join("[^/]+?" if part[:1] == "<" else re.escape(part) for part in parts), name) is not None
        )


def tables() -> dict[str, list[Entry]]:
    """The entries of the tables, by heading."""
    found: dict[str, list[Entry]] = {}
    heading = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        elif line.startswith("| `"):
            name, kind, when = (cell.strip() for cell in line.strip("|").split("|")[:3])
            found.setdefault(heading, []).append(Entry(name.strip("`"), kind, when))
    return found


TABLES = tables()


def undescribed(names: Iterable[str], entries: list[Entry]) -> list[str]:
    return [name for name in names if not any(entry.matches(name) for entry in entries)]


def not_made(names: Iterable[str], entries: list[Entry]) -> list[str]:
    names = list(names)
    return [e.name for e in entries if e.is_made_here and not any(e.matches(name) for name in names)]


def events_of(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run))
    events.Reload()
    return events


# -- files and scalars ---------------------------------------------------------------------------------------------


def test_every_file_is_described_and_every_described_file_is_left(runs):
    left = {str(path.relative_to(run)) for run in runs for path in run.rglob("*") if path.is_file()}
    entries = TABLES["Files"]
    assert undescribed(left, entries) == []
    assert not_made(left, entries) == []


def test_every_scalar_is_described_and_every_described_scalar_is_logged(runs):
    logged = set()
    for run in runs:
        events = events_of(run)
        logged |= set(events.Tags()["scalars"])
    entries = TABLES["Scalars"]
    assert undescribed(logged, entries) == []
    assert not_made(logged, entries) == []


def test_every_image_and_text_is_described_and_every_described_one_is_logged(runs):
    logged = set()
    for run in runs:
        events = events_of(run)
        texts = (tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"])
        logged |= {*events.Tags()["images"], *(tag for tag in texts if not tag.startswith(PLUGINS))}
    assert undescribed(logged, TABLES["Images and texts"]) == []
    assert not_made(logged, TABLES["Images and texts"]) == []


def test_what_is_always_there_is_logged_by_sft_and_rft_alike(runs):
    always = [entry for entry in TABLES["Scalars"] if entry.when == "always"]
    for run in runs:
        events = events_of(run)
        assert not_made(events.Tags()["scalars"], always) == []


# -- fields --------------------------------------------------------------------------------------------------------

JSON_FILES = {
    "accuracy_matrix.json": ["accuracy_matrix.json"],
    "samples.jsonl": ["samples.jsonl", "validate.jsonl", "test.jsonl", "predictions.jsonl"],
    "test_scores.json": ["test_scores.json"],
    "drift.json": ["drift.json"],
    "influence.json": ["influence.json"],
    "gradient_risk.json": ["gradient_risk.json"],
    "weight_change.json": ["weight_change.json"],
    "weight_distance.json": ["weight_distance.json"],
    "rollouts.jsonl": ["rollouts.jsonl"],
    "rollouts_summary.json": ["rollouts_summary.json"],
    "environment.json": ["environment.json"],
    "study.json": ["study.json"],
}


def records(runs: list[Path], files: list[str]) -> list[dict]:
    """The objects of JSON files, and of the lines of JSON lines files."""
    texts = [(run / name).read_text() for run in runs for name in files if (run / name).exists()]
    assert texts
    lines = files[0].endswith(".jsonl")
    return [json.loads(part) for text in texts for part in (text.splitlines() if lines else [text])]


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """Where values stand: ``rows[].after``; an empty list or object has none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        yield path, value


def objects(value, path: str = "") -> Iterator[tuple[str, dict]]:
    """All objects within a value, and where they stand."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from objects(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from objects(inner, f"{path}[]")


def complaints(found: list[dict], entries: list[Entry]) -> list[str]:
    """Fields that no entry describes, values of another type, and what should be there and is not."""
    said = []
    places = [leaf for record in found for leaf in leaves(record)]
    for path, value in places:
        fitting = [entry for entry in entries if entry.matches(path)]
        if not fitting:
            said.append(f"{path} is not described")
        elif not any(is_of(value, entry.kind) for entry in fitting):
            said.append(f"{path} is {value!r}, and not {fitting[0].kind}")
    said += [f"{name} is nowhere" for name in not_made({path for path, _ in places}, entries)]
    for entry in entries:
        parent, _, key = entry.name.rpartition(".")
        if entry.when == "always" and not key.startswith("<"):
            where = Entry(parent, "", "")
            holders = [inside for record in found for path, inside in objects(record) if where.matches(path)]
            said += [
                f"{parent} is without {key}"
                for holder in holders
                if key.removesuffix("[]").removesuffix("[]") not in holder
            ]
    return sorted(set(said))


def is_of(value, kind: str) -> bool:
    names = kind.split(" or ")
    return any(isinstance(value, TYPES[name]) and (name == "bool" or not isinstance(value, bool)) for name in names)


@pytest.mark.parametrize("heading", JSON_FILES)
def test_json_files_have_exactly_the_described_fields(heading, runs):
    assert complaints(records(runs, JSON_FILES[heading]), TABLES[heading]) == []


def test_verdicts_have_exactly_the_described_fields(runs):
    files = [path.read_text().splitlines() for path in runs[1].glob("filter/*.jsonl")]
    assert len(files) == 2
    assert complaints([json.loads(lines[0]) for lines in files], TABLES["the first line"]) == []
    verdicts = [json.loads(line) for lines in files for line in lines[1:]]
    assert complaints(verdicts, TABLES["each other line"]) == []


def test_examples_in_the_document_have_described_fields():
    text = DOCUMENT.read_text(encoding="utf-8")
    examples = re.findall(r"^## `([^`]+)`\n(?:(?!^## ).*\n)*?```json\n((?:.*\n)*?)```", text, flags=re.MULTILINE)
    assert len(examples) == 3
    for heading, example in examples:
        said = complaints([json.loads(example)], TABLES[heading])
        assert [each for each in said if not each.endswith("is nowhere")] == [], heading


def test_the_reader_would_see_an_offence():
    entries = [
        Entry("a", "int", "always"),
        Entry("b[].<task>", "text or null", "always"),
        Entry("c", "int", "rarely *"),
    ]
    assert complaints([{"a": 1, "b": [{"x": "y"}, {"z": None}]}], entries) == []
    assert complaints([{"a": True, "b": [{"x": 1}], "d": 2}, {"b": []}], entries) == [
        " is without a", "a is True, and not int", "b[].x is 1, and not text or null", "d is not described",
    ]  # fmt: skip
    assert complaints([{"a": 1}], entries) == ["b[].<task> is nowhere"]


# -- older runs ----------------------------------------------------------------------------------------------------


def test_a_run_without_newer_fields_and_files_still_reports(tmp_path, runs):
    """As in the first version: no fingerprints, no further scores, no filter, drift or events."""
    record = json.loads((runs[0] / "accuracy_matrix.json").read_text())
    del record["fingerprints"]
    for row in record["rows"]:
        row["scores"] = {
            name: {"accuracy": cell["accuracy"], "num_samples": cell["num_samples"]}
            for name, cell in row["scores"].items()
        }
    (tmp_path / "accuracy_matrix.json").write_text(json.dumps(record))
    old, new = figures_of(RunFolder(tmp_path)), figures_of(RunFolder(runs[0]))
    for name in ("learning", "AvgAcc", "forgetting", "probes"):
        assert old[name] == new[name] is not None
    assert old["KL"] is None
