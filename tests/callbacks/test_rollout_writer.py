"""Rollouts become rows of a file, and SFT learns from it the very tokens that were sampled."""

from __future__ import annotations

import json
from dataclasses import replace

import lightning as L
import pytest
import torch

from cpt_lightning.callbacks import RolloutWriter
from cpt_lightning.data import TaskStream
from cpt_lightning.models import Backbone
from cpt_lightning.models.fingerprint import model_fingerprint
from cpt_lightning.modules import SFT
from cpt_lightning.rollouts import Attempts, Hint, Sampling, Selection
from cpt_lightning.rollouts.selection import FATES
from cpt_lightning.tasks import Columns, FileRows, Prompt, RolloutRows, Task, ToyWorld
from tests.training import sgd

ALL = Selection(correct_only=False, finished_only=False, distinct=False)
ATTEMPTS = Attempts(group_size=3, sampling=Sampling(max_new_tokens=6))


def stream(**options) -> TaskStream:
    """A task with pictures and a system turn, and one without, three rows each."""
    tasks = {
        "bars": Task(ToyWorld("bars"), Prompt(system="Look.", style="think_answer"), num_train=3, num_test=2),
        "facts": Task(ToyWorld("facts"), num_train=3, num_test=2),
    }
    return TaskStream(tasks, probes={"digit": Task(ToyWorld("digit"))}, **{"predict_on": "train"} | options)


def module_on(folder: str, attempts: Attempts | None = ATTEMPTS) -> SFT:
    module = SFT(backbone=Backbone(folder), optimizer=sgd, attempts=attempts)
    module.configure_model()
    # A random model spells every token but those that end a turn: now it ends some.
    module.model.lm_head.weight.data[module.processor.eos_token_id] *= 8
    return module


def trainer_for(folder, *callbacks) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), inference_mode=False, **quiet)


def collect(folder, module: SFT, selection: Selection = ALL, file: str = "rollouts.jsonl", **options) -> list[dict]:
    trainer = trainer_for(folder, RolloutWriter(file, selection))
    assert not trainer.predict(module, stream(**options)), "pictures of all rows stay in memory"
    return list(TaskRows(folder / file))


class TaskRows(list):
    """The lines of a file."""

    def __init__(self, path) -> None:
        super().__init__(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_sft_finds_the_prompts_tokens_and_log_probabilities_of_the_rollout(small_folder, tmp_path, suffix, cache):
    """Prompt ids, pixels and completion ids are equal, so the model gives the target what it was sampled with."""
    module = module_on(small_folder)
    rows = collect(tmp_path, module)
    if suffix == "parquet":
        trainer_for(tmp_path, RolloutWriter("rollouts.parquet", ALL)).predict(module, stream())
    assert len(rows) == 2 * 3 * 3
    assert len({row["num_tokens"] for row in rows}) > 1 and {row["finished"] for row in rows} == {True, False}

    learned, asked = (stream(**options) for options in ({"rollouts": str(tmp_path / f"rollouts.{suffix}")}, {}))
    for each in (learned, asked):
        each.processor = module.processor
    for name in ("bars", "facts"):
        mine = [row for row in rows if row["task"] == name]
        batch = collated(learned, name)
        original = collated(asked, name)
        repeat = [row for row in range(3) for _ in range(3)]
        assert torch.equal(batch.prompts.input_ids, original.prompts.select(repeat).input_ids)
        if name == "bars":
            assert torch.equal(batch.prompts.pixel_values, original.prompts.select(repeat).pixel_values)
        ids = [row[mask].tolist() for row, mask in zip(batch.targets.ids, batch.targets.mask, strict=True)]
        assert ids == [row["completion_ids"] for row in mine]
        with torch.no_grad():
            logprobs = module.logprobs(batch.prompts, batch.targets).sum(dim=1)
        torch.testing.assert_close(logprobs, torch.tensor([row["logprob_sum"] for row in mine]), atol=1e-5, rtol=0)


def collated(data: TaskStream, name: str):
    from cpt_lightning.data import Collate

    return Collate(data.processor)(list(data.examples(name, "train")))


def test_a_row_says_all_that_is_known_of_it_and_rows_come_in_order(small_folder, tmp_path):
    module = module_on(small_folder)
    rows = collect(tmp_path, module)
    sources = [example for name in ("bars", "facts") for example in stream().examples(name, "train")]
    assert [row["row_id"] for row in rows] == [example.row_id for example in sources for _ in range(3)]
    assert [row["draw"] for row in rows] == [0, 1, 2] * 6
    for row, example in zip(rows, [example for example in sources for _ in range(3)], strict=True):
        text = row["messages"][-1]["content"][0]["text"]
        assert row["messages"][:-1] == example.messages and row["answers"] == [example.gold]
        assert row["parts"] == example.reward(text, example.gold)
        assert row["logprob_mean"] * row["num_tokens"] == pytest.approx(row["logprob_sum"])
        assert row["model"] == model_fingerprint(module.model) and row["sampling"]["max_new_tokens"] == 6
    assert len(list((tmp_path / "rollouts_images").iterdir())) == 3, "one picture per row, not per completion"


def test_a_summary_counts_what_was_sampled_and_says_if_rows_were_left_out(small_folder, tmp_path):
    """6 rows, 3 completions each of which the first is kept; then the first 3 rows alone."""
    for name, limit, num in (("all", 1.0, 6), ("some", 2, 3)):
        trainer = trainer_for(tmp_path, RolloutWriter(f"{name}.jsonl", replace(ALL, per_row=1)))
        trainer.limit_predict_batches = limit
        trainer.predict(module_on(small_folder), stream(eval_prompts_per_step=2))
        summary = json.loads((tmp_path / f"{name}_summary.json").read_text())
        rows = TaskRows(tmp_path / f"{name}.jsonl")
        assert (summary["num_completions"], summary["all_rows"]) == (3 * num, limit == 1.0)
        assert summary["verdicts"] == dict.fromkeys(FATES, 0) | {"kept": num, "surplus": 2 * num} and len(rows) == num
        assert summary["model"] == rows[0]["model"] and summary["sampling"] == rows[0]["sampling"]


def test_rollouts_do_not_depend_on_the_size_of_batches(small_folder, tmp_path):
    module = module_on(small_folder)
    one = collect(tmp_path / "one", module, eval_prompts_per_step=2)
    other = collect(tmp_path / "other", module, eval_prompts_per_step=64)
    assert [row["completion_ids"] for row in one] == [row["completion_ids"] for row in other]


def test_a_hint_is_shown_while_sampling_and_stands_in_no_row(small_folder, tmp_path):
    """The hinted prompt is the one that encoding its text and picture anew gives."""
    plain = collect(tmp_path / "plain", module_on(small_folder))
    module = module_on(small_folder, replace(ATTEMPTS, hint=Hint("\nIt is {answer}.")))
    hinted = collect(tmp_path / "hinted", module)
    assert [row["messages"][:-1] for row in hinted] == [row["messages"][:-1] for row in plain]
    assert [row["completion_ids"] for row in hinted] != [row["completion_ids"] for row in plain]

    examples = list(stream().examples("bars", "train"))
    data = stream()
    data.processor = module.processor
    shown = module.attempts.hint.show(module.processor, collated(data, "bars").prompts)
    told = [
        [*example.messages[:-1], {"role": "user", "content": [*example.messages[-1]["content"], {
            "type": "text", "text": f"\nIt is {example.gold}."}]}]
        for example in examples
    ]  # fmt: skip
    expected = module.processor.encode(told, [example.images for example in examples])
    assert torch.equal(shown.input_ids, expected.input_ids) and torch.equal(shown.pixel_values, expected.pixel_values)


def test_other_readers_of_messages_understand_the_rows(small_folder, tmp_path):
    rows = collect(tmp_path, module_on(small_folder))
    task = Task(FileRows(train=str(tmp_path / "rollouts.jsonl"), columns=Columns(answer="answers")))
    examples = list(task.examples("train", "any"))
    assert [example.messages for example in examples] == [row["messages"][:-1] for row in rows]
    assert [example.target for example in examples] == [row["messages"][-1]["content"][0]["text"] for row in rows]


def test_nothing_kept_is_an_error_with_the_counts_and_leaves_no_file(small_folder, tmp_path):
    with pytest.raises(ValueError, match=r"no completion is kept.*: \d+ unfinished, \d+ incorrect; loosen"):
        collect(tmp_path, module_on(small_folder), Selection())
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_an_earlier_file_is_not_overwritten_and_a_module_without_attempts_is_refused(small_folder, tmp_path):
    (tmp_path / "rollouts.jsonl").write_text("kept")
    with pytest.raises(ValueError, match="is there already"):
        collect(tmp_path, module_on(small_folder))
    assert (tmp_path / "rollouts.jsonl").read_text() == "kept"
    with pytest.raises(ValueError, match="attempts"):
        collect(tmp_path / "other", module_on(small_folder, None))
    with pytest.raises(ValueError, match="must end in"):
        RolloutWriter("rollouts.csv")


def test_a_collection_that_breaks_off_leaves_no_file_that_looks_whole_and_begins_anew(
    small_folder, tmp_path, monkeypatch
):
    module = module_on(small_folder)
    whole = collect(tmp_path / "whole", module, eval_prompts_per_step=2)
    with monkeypatch.context() as patch:
        attempt, calls = module.attempt, []

        def killed(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("killed")
            return attempt(*args)

        patch.setattr(module, "attempt", killed)
        with pytest.raises(KeyError):
            collect(tmp_path / "again", module, eval_prompts_per_step=2)
    assert sorted(path.suffix for path in (tmp_path / "again").iterdir() if path.is_file()) == [".part"]
    assert collect(tmp_path / "again", module, eval_prompts_per_step=2) == whole


def test_evaluation_stays_the_tasks_own_and_bad_files_are_refused(small_folder, tmp_path):
    collect(tmp_path, module_on(small_folder))
    file = str(tmp_path / "rollouts.jsonl")
    learned, own = stream(rollouts=file), stream()
    for name in ("bars", "facts", "digit"):
        assert learned.fingerprint(name, "test") == own.fingerprint(name, "test")
    with pytest.raises(ValueError, match="data.rollouts: .*does not exist"):
        stream(rollouts=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="both say what SFT learns"):
        stream(rollouts=file, target="{answer}")
    with pytest.raises(ValueError, match="no rollouts of 'digit', it has those of bars, facts"):
        RolloutRows(file, "digit", ToyWorld("digit")).split("train")


def test_ids_of_another_tokenizer_are_refused_with_the_row(processor):
    ids = processor.encode_targets(["yes"]).ids[0].tolist()
    assert processor.encode_targets(["yes"], [ids]).ids[0].tolist() == ids
    for wrong in (processor.encode_targets(["no"]).ids[0].tolist(), [10**6], []):
        with pytest.raises(ValueError, match="row 7: its token ids do not spell"):
            processor.encode_targets(["yes"], [wrong], ["row 7"])
