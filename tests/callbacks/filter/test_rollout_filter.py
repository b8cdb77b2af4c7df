"""Rows are judged by attempts and learned from if they are kept, also by a run that was killed and resumed."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

from cpt_lightning.callbacks import RolloutFilter, TaskProgressBar
from cpt_lightning.callbacks.signals import Stopped
from cpt_lightning.cli import main
from cpt_lightning.data import Replay
from cpt_lightning.data.sampler import RowRef
from cpt_lightning.modules import PostTraining
from cpt_lightning.rollouts import Sampling
from cpt_lightning.rollouts.sampling import row_generators
from cpt_lightning.tasks import Row, Task
from cpt_lightning.types import Batch
from tests.fakes import KillAt, Killed, LinearModule, NumberSource, make_trainer, number_stream


class TryingModule(LinearModule):
    """Answers odd or even at random, as likely as its layer says."""

    evaluation = Sampling(max_new_tokens=1, temperature=0.0)
    seed = 2

    @property
    def model(self):
        return self.layer

    def __init__(self, kill_at: int | None = None) -> None:
        super().__init__(lr=0.02)
        self.tried: list[str] = []
        self.kill_at = kill_at

    def attempt(self, prompts, group_size, sampling, *key):
        assert sampling.temperature == 1.0
        self.tried += [example.row_id for example in prompts.examples]
        if self.kill_at is not None and len(self.tried) > self.kill_at:
            raise Killed("while judging")
        odd = self.logits(Batch(prompts)).softmax(dim=1)[:, 1].tolist()
        generators = row_generators("cpu", prompts, self.seed, *key)
        texts, scores = [], []
        for chance, generator, example in zip(odd, generators, prompts.examples, strict=True):
            new = [str(int(draw < chance)) for draw in torch.rand(group_size, generator=generator).tolist()]
            texts += new
            scores += [example.reward(text, example.gold) for text in new]
        return None, texts, scores


class Logged(L.Callback):
    """Keeps what was logged when a task ended."""

    def __init__(self) -> None:
        self.ends: list[dict] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.ends.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def run(folder, *, checkpoint=None, callbacks=(), module=None, trainer_options=None, filter_options=None, **stream):
    """A run with a filter, or the rest of one, in ``folder``; returns the module."""
    module = module or TryingModule()
    numbers = number_stream(**{"passes": 1, "prompts_per_step": 2, **stream})
    options = {"mode": "solvable", "completions_per_row": 3, **(filter_options or {})}
    chosen = RolloutFilter(**options)
    trainer = make_trainer(folder, numbers, callbacks=[chosen, *callbacks], **(trainer_options or {}))
    if checkpoint is None:
        trainer.validate(module, numbers, verbose=False)
    trainer.fit(module, numbers, ckpt_path=checkpoint and str(folder / checkpoint))
    return module


def read(folder: Path, task: str) -> tuple[dict, list[dict]]:
    """Header and verdicts without what they took."""
    header, *rows = map(json.loads, (folder / "filter" / f"{task}.jsonl").read_text().splitlines())
    return header, [{name: value for name, value in row.items() if name != "time_s"} for row in rows]


def files(folder: Path) -> dict:
    return {task: read(folder, task) for task in "abc"}


def kept_ids(folder: Path, task: str) -> set[str]:
    return {row["row_id"] for row in read(folder, task)[1] if row["kept"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption, with two of three passes at least: folder, module, what was logged."""
    folder, logged = tmp_path_factory.mktemp("whole"), Logged()
    module = run(folder, callbacks=[logged], filter_options={"lowest": 2})
    return folder, module, logged.ends


def assert_same_end(folder, module, whole):
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, whole[1].state_dict()[name]), name
    assert files(folder) == files(whole[0])


def test_every_row_is_judged_and_those_in_the_window_are_learned_once(whole):
    """One pass of the kept rows of each task in batches of 2, the last filled up from the next pass."""
    folder, module, _ = whole
    assert module.tried == [f"{task}/train/{row}" for task in "abc" for row in range(10)]
    steps = iter(module.seen)
    for task in "abc":
        rows = read(folder, task)[1]
        assert [row["row_id"] for row in rows] == [f"{task}/train/{number}" for number in range(10)]
        assert [row["kept"] for row in rows] == [row["pass_count"] >= 2 for row in rows]
        assert all(row["mean_reward"] == pytest.approx(row["pass_count"] / 3) for row in rows)
        kept = kept_ids(folder, task)
        assert 2 < len(kept) < 10
        seen = [row for _ in range(-(-len(kept) // 2)) for row in next(steps)]
        assert set(seen) == kept
    assert next(steps, None) is None


def test_an_attempt_is_shown_that_passed_if_one_did(whole):
    for row in read(whole[0], "a")[1]:
        odd = row["row"] % 2
        assert row["completion"] == str(odd if row["pass_count"] else 1 - odd)


def test_the_model_judges_as_it_is_when_its_task_begins(whole):
    headers = [read(whole[0], task)[0] for task in "abc"]
    assert len({header["model"] for header in headers}) == 3
    assert [header["stage"] for header in headers] == [0, 1, 2]


def test_kept_share_and_time_are_logged(whole):
    """Ten rows are five steps of two; what is saved are the steps left out, less the time of judging."""
    for task, end in zip("abc", whole[2], strict=True):
        kept = len(kept_ids(whole[0], task))
        assert end["filter/kept_fraction"] == pytest.approx(kept / 10)
        left_out = 5 - -(-kept // 2)
        step_s = (end["filter/saved_s"] + end["filter/time_s"]) / left_out
        assert 0 < end["filter/time_s"] < 5 and 0 < step_s < 1


def test_verdicts_do_not_depend_on_the_batch_they_are_made_in(whole, tmp_path):
    module = run(tmp_path, filter_options={"lowest": 2}, eval_prompts_per_step=3)
    assert_same_end(tmp_path, module, whole)


@pytest.mark.parametrize("kill_at", [4, 8, 14])
def test_a_run_that_is_killed_while_it_judges_goes_on_behind_its_verdicts(kill_at, whole, tmp_path):
    """Batches of four rows: the third, or the second of stage 1, is lost, and what was judged before is not tried."""
    with pytest.raises(Killed):
        run(tmp_path, module=TryingModule(kill_at=kill_at), filter_options={"lowest": 2})
    file = tmp_path / "filter" / f"{'ab'[kill_at // 10]}.judging.jsonl"
    with file.open("a") as half:
        half.write('{"task": "a", "ro')  # as if killed while writing
    checkpoint = "last.ckpt" if kill_at > 10 else None
    module = run(tmp_path, checkpoint=checkpoint, filter_options={"lowest": 2})
    assert_same_end(tmp_path, module, whole)
    done = kill_at // 4 * 4 if kill_at < 10 else 14  # the batches 4 + 4 + 2 of stage 0, then one of 4
    assert len(module.tried) == 30 - done


@pytest.mark.parametrize("stop_at", [5, 15])
def test_a_run_that_is_asked_to_stop_while_it_judges_keeps_the_verdicts_of_the_batch(stop_at, whole, tmp_path):
    """Of four rows each: the second batch of stage 0, or of stage 1, is finished."""

    class Stopping(TryingModule):
        def attempt(self, *args):
            before, attempts = len(self.tried), super().attempt(*args)
            if before < stop_at <= len(self.tried):
                os.kill(os.getpid(), signal.SIGTERM)
            return attempts

    with pytest.raises(Stopped):
        run(tmp_path, module=Stopping(), filter_options={"lowest": 2})
    checkpoint = "last.ckpt" if stop_at > 10 else None
    module = run(tmp_path, checkpoint=checkpoint, filter_options={"lowest": 2})
    assert_same_end(tmp_path, module, whole)
    assert len(module.tried) == 30 - {5: 8, 15: 18}[stop_at]


@pytest.mark.parametrize("kill", [KillAt(0, batch=1), KillAt(1, batch=1), KillAt(1, "on_train_epoch_end")])
def test_a_run_that_is_killed_within_a_task_goes_on_with_its_rows(kill, whole, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[kill], filter_options={"lowest": 2})
    (tmp_path / "filter" / "a.jsonl").rename(tmp_path / "moved")  # the checkpoint knows which rows are kept
    module = run(tmp_path, checkpoint="last.ckpt", filter_options={"lowest": 2})
    (tmp_path / "moved").rename(tmp_path / "filter" / "a.jsonl")
    assert_same_end(tmp_path, module, whole)
    assert [row[0] for row in module.tried] == ["b"] * 10 * (kill.stage == 0) + ["c"] * 10


def test_the_checkpoint_of_a_task_goes_on_too_and_verdicts_of_the_same_model_stand(whole, tmp_path):
    run(tmp_path, filter_options={"lowest": 2})
    module = run(tmp_path, checkpoint="1_a.ckpt", filter_options={"lowest": 2})
    assert_same_end(tmp_path, module, whole)
    assert module.tried == []
    with pytest.warns(UserWarning, match="differ in completions_per_row.*; its rows are judged again"):
        module = run(tmp_path, checkpoint="1_a.ckpt", filter_options={"lowest": 2, "completions_per_row": 4})
    assert len(module.tried) == 20


def test_other_options_within_a_task_are_refused(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAt(1, batch=1)])
    with pytest.raises(ValueError, match="within stage 'b', .* filter.lowest=1, now it is 2; restore it"):
        run(tmp_path, checkpoint="last.ckpt", filter_options={"lowest": 2})
    with pytest.raises(ValueError, match="within stage 'b', .* filter.mode=solvable, now it is None; restore it"):
        run(tmp_path, checkpoint="last.ckpt", filter_options={"mode": None})


def test_a_stage_that_began_without_a_filter_ends_without_one(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAt(1, batch=1)], filter_options={"mode": None})
    module = run(tmp_path, checkpoint="last.ckpt")
    assert module.tried == [f"c/train/{row}" for row in range(10)]


@pytest.mark.parametrize("killed", [None, KillAt(1, batch=1)])
def test_a_stream_that_was_filtered_shows_every_row_to_a_trainer_without_a_filter(killed, tmp_path):
    """A filter that is left in the stream would show the second Trainer the rows that the first one kept."""
    numbers = number_stream(passes=1, prompts_per_step=2)
    chosen = [RolloutFilter("solvable", completions_per_row=3, lowest=2), *([killed] if killed else [])]
    for folder, callbacks in (("filtered", chosen), ("whole", [])):
        module, trainer = TryingModule(), make_trainer(tmp_path / folder, numbers, callbacks=callbacks)
        trainer.validate(module, numbers, verbose=False)
        with pytest.raises(Killed) if killed in callbacks else nullcontext():
            trainer.fit(module, numbers)
    assert len(kept_ids(tmp_path / "filtered", "a")) < 10
    assert len({row for step in module.seen for row in step}) == 3 * 10


@pytest.mark.parametrize("mode", ["random", None])
def test_rows_that_somebody_else_chose_are_chosen_by_them_again(mode, tmp_path):
    """When the filter has gone; one that is off was never there."""
    numbers = number_stream(passes=1, prompts_per_step=2, stages=["a"])
    numbers.choose_rows = own = lambda stage: {"a": [0, 1, 2]}
    trainer = make_trainer(tmp_path, numbers, callbacks=[RolloutFilter(mode, completions_per_row=3)])
    trainer.validate(module := TryingModule(), numbers, verbose=False)
    trainer.fit(module, numbers)
    assert numbers.choose_rows is own
    assert len({row for step in module.seen for row in step}) == (3 if mode is None else len(kept_ids(tmp_path, "a")))


@pytest.mark.parametrize("mode", ["unsolvable", "random"])
def test_controls_learn_from_as_many_rows(mode, whole, tmp_path):
    """Judged with the window [2, 3] of K = 3, as the whole run; the first task's verdicts are therefore the same."""
    cap = {"cap": 4}
    module = run(tmp_path, filter_options={"lowest": 2, "mode": mode, **cap}, stages=["a"], passes=2)
    rows = read(tmp_path, "a")[1]
    assert [row["pass_count"] for row in rows] == [row["pass_count"] for row in read(whole[0], "a")[1]]
    kept = {row["row_id"]: row["pass_count"] for row in rows if row["kept"]}
    assert len(kept) == 4 and {row for batch in module.seen for row in batch} == set(kept)
    assert mode == "random" or max(kept.values()) < 2


def test_replay_takes_kept_rows_of_earlier_tasks(tmp_path):
    """Half of every later batch is old; a resumed run takes the same."""
    options = {"replay": Replay(0.5), "filter_options": {"lowest": 2}}
    module = run(tmp_path / "whole", **options)
    kept = set().union(*(kept_ids(tmp_path / "whole", task) for task in "abc"))
    later = [row for batch in module.seen[-(-len(kept_ids(tmp_path / "whole", "a")) // 2) :] for row in batch]
    assert {row[0] for row in later} == {"a", "b", "c"} and set(later) <= kept
    with pytest.raises(Killed):
        run(tmp_path / "killed", callbacks=[KillAt(2, batch=1)], **options)
    resumed = run(tmp_path / "killed", checkpoint="last.ckpt", **options)
    assert resumed.seen == module.seen[-len(resumed.seen) :]


def test_a_task_that_comes_back_is_judged_again(tmp_path):
    run(tmp_path, stages=["a", "b", "a"])
    first, second = read(tmp_path, "a")[0], read(tmp_path, "a_2")[0]
    assert (first["stage"], second["stage"]) == (0, 2) and first["model"] != second["model"]


def test_with_steps_a_task_has_as_many_and_the_filter_saves_nothing(tmp_path):
    logged = Logged()
    module = run(tmp_path, callbacks=[logged], stages=["a"], passes=None, steps=7)
    assert len(module.seen) == 7
    assert logged.ends[0]["filter/saved_s"] == pytest.approx(-logged.ends[0]["filter/time_s"])


# -- verdicts of another run ---------------------------------------------------------------------------------------


def test_verdicts_of_another_run_are_taken_over(whole, tmp_path):
    """No row is tried; a wider window on the same passes keeps other rows."""
    taken = {"filter_from": str(whole[0])}
    module = run(tmp_path / "same", filter_options={"lowest": 2, **taken})
    assert module.tried == [] and module.seen == whole[1].seen
    run(tmp_path / "wider", filter_options={"lowest": 1, **taken})
    for task in "abc":
        ids = {row["row_id"] for row in read(whole[0], task)[1] if row["pass_count"] >= 1}
        assert kept_ids(tmp_path / "wider", task) == ids
    header = read(tmp_path / "same", "b")[0]
    assert header["filter_from"] == str(whole[0]) and header["lowest"] == 2


def test_verdicts_about_something_else_are_refused_before_the_run(whole, tmp_path):
    taken = {"filter_from": str(whole[0])}
    with pytest.raises(ValueError, match=r"a\.jsonl has completions_per_row=3, this run 4; give this run"):
        run(tmp_path, filter_options={"completions_per_row": 4, **taken})
    with pytest.raises(ValueError, match=r"a\.jsonl has rows=\{'a': '.*'\}, this run"):
        run(tmp_path, filter_options=taken, style="think_boxed")
    with pytest.raises(ValueError, match=r"a\.jsonl has threshold=1.0, this run 0.5"):
        run(tmp_path, filter_options={"threshold": 0.5, **taken})
    with pytest.raises(ValueError, match=r"a\+b\.jsonl is missing; name the folder of a run that judged every stage"):
        run(tmp_path, filter_options=taken, stages=["a", ["a", "b"]])
    assert not (tmp_path / "filter").exists()


# -- refusals ------------------------------------------------------------------------------------------------------


def test_an_empty_result_stops_with_counts_the_file_and_the_mend(tmp_path):
    """No answer of two digits is right: 0 of 10 rows."""

    class Unsolvable(NumberSource):
        def split(self, split):
            return [replace(row, answer="12") for row in super().split(split)]

    tasks = {"a": Task(Unsolvable("a")), "b": Task(NumberSource("b"))}
    error = r"stage 'a': 0 of 10 rows are kept, none of task 'a', .*min_rows=2.*: 10 fewer than 1 passes\. See .*"
    with pytest.raises(ValueError, match=error + r"a\.jsonl, then widen filter.lowest"):
        run(tmp_path, tasks=tasks)
    assert len(read(tmp_path, "a")[1]) == 10
    with pytest.raises(ValueError, match=r"stage 'a\+b': \d+ of 20 rows are kept, none of task 'a', and"):
        run(tmp_path / "mixed", tasks=tasks, stages=[["a", "b"]])


def test_a_nearly_empty_result_stops_too(whole, tmp_path):
    kept = len(kept_ids(whole[0], "a"))
    with pytest.raises(ValueError, match=rf"{kept} of 10 rows are kept, and filter.min_rows={kept + 1} are needed"):
        run(tmp_path, filter_options={"lowest": 2, "min_rows": kept + 1})
    run(tmp_path / "enough", filter_options={"lowest": 2, "min_rows": kept}, stages=["a"])


def test_rows_that_cannot_be_learned_from_are_not_tried_and_say_why(tmp_path):
    """An image of 20 pixels a side, a prompt of five words, and eight rows as usual."""

    class WithOdd(NumberSource):
        def split(self, split):
            rows = list(super().split(split))
            if split == "train":
                from PIL import Image

                rows[3] = replace(rows[3], images=[Image.new("RGB", (20, 60))])
                rows[7] = Row(rows[7].row_id, "a question much too long", rows[7].answer)
            return rows

    tasks = {"a": Task(WithOdd("a"), bad_images="skip")}
    module = run(
        tmp_path, tasks=tasks, max_prompt_tokens=4, filter_options={"lowest": 0}, callbacks=[], prompts_per_step=4
    )
    rows = read(tmp_path, "a")[1]
    assert {row["row"]: row["reason"] for row in rows if not row["kept"]} == {
        3: "image refused",
        7: "longer than max_prompt_tokens=4",
    }
    assert [rows[number]["pass_count"] for number in (3, 7)] == [0, 0]
    assert len(module.tried) == 8 and len({row for batch in module.seen for row in batch}) == 8


def test_answers_count_as_right_from_the_threshold_on_and_in_the_format_only():
    judge = RolloutFilter("solvable", threshold=0.6).judge

    def passes(**scores: float) -> bool:
        return judge._verdict(RowRef("a", 0), "row", None, [("text", {"total": 1.0, **scores})]).pass_count == 1

    assert passes(accuracy=0.6) and not passes(accuracy=0.3)
    assert passes(accuracy=1.0, format=1.0) and not passes(accuracy=1.0, format=0.0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"completions_per_row": 0}, "completions_per_row=0 must be at least 1"),
        ({"lowest": 9}, "lowest=9 and filter.highest=8 must lie in 0 to completions_per_row=8"),
        ({"lowest": 3, "highest": 2}, "in this order"),
        ({"threshold": 0.0}, r"threshold=0.0 must lie in \(0, 1\]"),
        ({"cap": 0}, "cap=0 must be at least 1"),
        ({"filter_from": "run", "mode": None}, "no effect without filter.mode"),
        ({"mode": "unsolvable", "lowest": 0}, "fewer passes than filter.lowest, which is 0"),
    ],
)
def test_options_without_a_meaning_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        RolloutFilter(**{"mode": "solvable", **options})


# -- what a person sees --------------------------------------------------------------------------------------------


def test_the_bar_shows_rows_and_is_silent_where_the_trainers_is(tmp_path, capsys):
    bar = {"trainer_options": {"enable_progress_bar": True}, "callbacks": [TaskProgressBar()], "stages": ["a"]}
    run(tmp_path / "shown", **bar)
    shown = capsys.readouterr().out
    assert "filtering a" in shown and "10/10 rows" in shown and "rows/s" in shown and "% solvable" in shown
    run(tmp_path / "silent", stages=["a"])
    assert "filtering a" not in capsys.readouterr().out


# -- with the real modules -----------------------------------------------------------------------------------------

TOY = """
run_dir: RUN
model:
  class_path: cpt_lightning.modules.MODULE
  init_args:
    evaluation: {max_new_tokens: 16, temperature: 0}
data:
  tasks:
    word2: &toy
      source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}
      reward: {format: think_answer}
      num_train: 6
      num_test: 2
    digit2: {<<: *toy, source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: digit2}}}
  stages: [[word2, digit2]]
  prompts_per_step: 2
filter: {mode: solvable, completions_per_row: 3, lowest: 1, highest: 2, min_rows: 1}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.mark.parametrize("module", ["SFT", "RFT", "MultiTask"])
def test_every_objective_learns_from_kept_rows(module, tmp_path):
    """What the base always solves is left out; passes are those of attempts drawn alike, by any objective."""
    text = TOY.replace("MODULE", module).replace("RUN", str(tmp_path / "run"))
    if module != "SFT":
        text = text.replace("    evaluation", "    group_size: 2\n    sampling: {max_new_tokens: 16}\n    evaluation")
    (tmp_path / "config.yaml").write_text(text)
    main(["fit", "-c", str(tmp_path / "config.yaml")])
    header, rows = read(tmp_path / "run", "word2+digit2")
    assert [row["task"] for row in rows] == ["word2"] * 6 + ["digit2"] * 6
    assert header["sampling"] == {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "prefix": ""}
    assert [row["kept"] for row in rows] == [row["pass_count"] in (1, 2) for row in rows]
    assert {row["pass_count"] for row in rows} == {0, 1, 2, 3}


LORA = [
    "--filter.lowest=0",
    "--model.backbone.tuning=lora",
    "--model.backbone.lora.dropout=0.1",
    "--checkpoint.every_n_steps=1",
]


@pytest.mark.parametrize("along_stream", ["shared", "renewed", "per_task"])
def test_a_real_model_judges_on_where_it_was_killed_and_ends_bit_for_bit_alike(along_stream, tmp_path, monkeypatch):
    """Killed after four of the second stage's six rows; dropout shows that judging draws no global random numbers."""
    text = TOY.replace("MODULE", "RFT").replace("[[word2, digit2]]", "[word2, digit2]").replace("RUN", "unnamed")
    (tmp_path / "config.yaml").write_text(text.replace("    evaluation", "    group_size: 2\n    evaluation"))
    command = ["fit", "-c", str(tmp_path / "config.yaml"), "--data.eval_prompts_per_step=2", *LORA]
    command += [f"--model.backbone.lora.along_stream={along_stream}", "--run_dir"]
    attempt, tried = PostTraining.attempt, []

    def watched(self, prompts, group_size, sampling, *key):
        if group_size == 3:
            tried.extend(example.row_id for example in prompts.examples)
            if dies_at == len(tried):
                raise Killed("while judging")
        return attempt(self, prompts, group_size, sampling, *key)

    monkeypatch.setattr(PostTraining, "attempt", watched)
    dies_at = 0
    main([*command, str(tmp_path / "whole")])
    tried.clear()
    dies_at = 12
    with pytest.raises(Killed):
        main([*command, str(tmp_path / "run")])
    dies_at = 0
    main([*command, str(tmp_path / "run"), "--ckpt_path=last"])
    assert len(tried) == 12 + 2
    ends = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "run")]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(ends[1]["state_dict"][name], weight), name
    for task in ("word2", "digit2"):
        assert read(tmp_path / "run", task) == read(tmp_path / "whole", task)
