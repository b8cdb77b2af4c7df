"""The stream as a LightningDataModule."""

import numpy as np
import pytest
import torch

from cpt_lightning.data import TRAINER_OPTIONS, TaskStream
from cpt_lightning.tasks import Task
from tests.fakes import LinearModule, NumberSource, WordProcessor, make_trainer, number_stream

TASK = Task(NumberSource("a"))


def standing_alone(**options) -> TaskStream:
    """A stream as a notebook uses it, without a Trainer."""
    stream = number_stream(**options)
    stream.processor = WordProcessor()
    return stream


def row_ids(loader) -> list[list[str]]:
    return [[example.row_id for example in batch.prompts.examples] for batch in loader]


def fit(tmp_path, stream, module=None, **options):
    module = module or LinearModule()
    trainer = make_trainer(tmp_path, stream, **options)
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    return module


def test_stages_are_the_tasks_in_order_by_default():
    stream = number_stream()
    assert (stream.stages, stream.num_stages, stream.stage_names) == ([["a"], ["b"], ["c"]], 3, ["a", "b", "c"])
    assert (stream.task_names, stream.probe_names) == (["a", "b", "c"], ["p"])


def test_a_list_in_stages_mixes_tasks_and_what_no_stage_learns_is_a_probe():
    stream = number_stream(stages=["c", ["b", "c"]])
    assert stream.stage_names == ["c", "b+c"]
    assert (stream.task_names, stream.probe_names) == (["c", "b"], ["a", "p"])


def test_every_epoch_trains_on_its_own_task(tmp_path):
    module = fit(tmp_path, number_stream(passes={"b": 2}, steps={"c": 1}))
    tasks = [row.split("/")[0] for batch in module.seen for row in batch]
    assert tasks == ["a"] * 12 + ["b"] * 20 + ["c"] * 4  # 10 rows are 3 batches of 4, twice 10 are 5
    assert {row for batch in module.seen[:3] for row in batch} == {f"a/train/{i}" for i in range(10)}


def test_passes_of_a_task_that_is_left_out_do_no_harm():
    """One task of a stream is learned alone by naming it in ``stages``, whatever else the stream says of others."""
    assert number_stream(stages=["a"], passes={"b": 10}).stage_names == ["a"]


def test_a_mixed_stage_draws_from_all_its_tasks(tmp_path):
    module = fit(tmp_path, number_stream(stages=[["a", "b", "c"]], mixing="uniform"))
    assert {row for batch in module.seen for row in batch} == {f"{t}/train/{i}" for t in "abc" for i in range(10)}
    assert any(len({row[0] for row in batch}) > 1 for batch in module.seen)


def test_training_batches_have_targets_and_evaluation_batches_have_not():
    stream = standing_alone()
    training, evaluation = next(iter(stream.train_dataloader())), next(iter(stream.val_dataloader()))
    assert len(training.targets) == 4
    assert evaluation.targets is None and evaluation.prompts.valid.all()


def test_one_loader_evaluates_everything_one_task_per_batch():
    stream = standing_alone(eval_prompts_per_step=4)
    batches = row_ids(stream.val_dataloader())
    assert [batch[0].split("/")[0] for batch in batches] == ["a", "a", "b", "b", "c", "c", "p", "p"]
    assert [row for batch in batches for row in batch if row[0] == "a"] == [f"a/test/{i}" for i in range(6)]
    assert row_ids(stream.predict_dataloader()) == batches


def test_evaluate_on_chooses_the_split_and_test_is_always_the_test_split():
    stream = standing_alone(evaluate_on="val")
    assert {row.split("/")[1] for batch in row_ids(stream.val_dataloader()) for row in batch} == {"val"}
    assert {row.split("/")[1] for batch in row_ids(stream.test_dataloader()) for row in batch} == {"test"}


def test_a_target_for_the_whole_stream_replaces_those_of_the_tasks():
    task = Task(NumberSource("a"), target="it is {answer}")
    stream = TaskStream({"a": task}, target="{answer}!")
    assert stream.examples("a", "train")[1].target == "1!"
    assert TaskStream({"a": task}).examples("a", "train")[1].target == "it is 1"
    assert task.target == "it is {answer}"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_workers_later", [0, 2])
def test_the_loader_goes_on_from_its_state(num_workers, num_workers_later):
    """Two batches taken, the state kept; a new loader with it yields the rest, though workers had read ahead."""
    stream = standing_alone(passes=2, num_workers=num_workers)
    whole = row_ids(stream.train_dataloader())
    loader = stream.train_dataloader()
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(2)]
    state = loader.state_dict()
    resumed = standing_alone(passes=2, num_workers=num_workers_later).train_dataloader()
    resumed.load_state_dict(state)
    assert len(whole) == len(resumed) == 5
    assert row_ids(taken) + row_ids(resumed) == whole


def test_a_state_of_other_data_is_refused_unless_its_stage_was_finished():
    loader = standing_alone().train_dataloader()
    next(iter(loader))
    state = loader.state_dict()
    bigger = {"tasks": {"a": Task(NumberSource("a", num_train=11))}}
    others = {"sizes": bigger, "prompts_per_step": {"prompts_per_step": 5}, "seed_everything": {"seed": 1}}
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"middle of a stage with {name}=.*end of a task"):
            standing_alone(**other).train_dataloader().load_state_dict(state)
    with pytest.raises(ValueError, match=r"after 1 of the \d batches of a stage, which now has no more than 1 "):
        standing_alone(steps=1).train_dataloader().load_state_dict(state)
    list(loader)
    other = standing_alone(prompts_per_step=5).train_dataloader()
    other.load_state_dict(loader.state_dict())
    assert len(row_ids(other)) == 2  # from its start


def test_workers_change_nothing():
    alone, helped = (row_ids(standing_alone(num_workers=n).train_dataloader()) for n in (0, 2))
    assert alone == helped


def test_over_long_rows_are_left_out_of_training_but_not_of_evaluation(tmp_path):
    """Questions are two words; the limit drops none, a limit of one drops all and names a row."""
    stream = standing_alone(max_prompt_tokens=1)
    with pytest.raises(ValueError, match="max_prompt_tokens=1: task 'a', a/train/"):
        next(iter(stream.train_dataloader()))
    assert sum(len(batch) for batch in stream.val_dataloader()) == 6 * 3 + 5


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": {}}, "data.tasks is empty"),
        ({"probes": {"a": TASK}}, "'a' is both a task and a probe"),
        ({"tasks": {"a/b": TASK}}, "'a/b' cannot be the name of a task or probe: '/' has a meaning"),
        ({"tasks": {"a.b": TASK}}, "'a.b' cannot be the name .* '\\.' has a meaning .*; write '_' or '-' in its place"),
        ({"probes": {"..": TASK}}, r"'\.\.' cannot be the name .* '\.' has a meaning"),
        ({"tasks": {"": TASK}}, "'' cannot be the name of a task or probe: it says nothing; give it one"),
        ({"tasks": {1: TASK}}, "1 cannot be the name of a task or probe: it is an int and not text; quote it"),
        ({"probes": {True: TASK}}, "True cannot be the name of a task or probe: it is a bool and not text; quote it"),
        ({"tasks": {None: TASK}}, "None cannot be the name of a task or probe: it is nothing and not text; quote it"),
        ({"tasks": {"a\tb": TASK}}, r"'a\\tb' cannot be the name .* a character that cannot be seen"),
        ({"tasks": {"ä" * 51: TASK}}, "cannot be the name .* 100 bytes are the most; shorten it"),
        ({"stages": []}, "nothing to learn"),
        ({"stages": [[]]}, "nothing to learn"),
        ({"stages": ["a", "bb"]}, "data.stages names 'bb'.*did you mean 'b'"),
        ({"stages": ["a", "xyz"]}, "data.stages names 'xyz'.*there are a, b, c"),
        ({"stages": ["p"]}, "data.stages names 'p'.*there are a, b, c"),
        ({"stages": [["a", "a"]]}, "names a task twice"),
        ({"passes": {"bb": 2}}, "data.passes names 'bb'.*did you mean 'b'"),
        ({"steps": {"cc": 2}}, "data.steps names 'cc'.*did you mean 'c'"),
        ({"stages": [["a", "b"]], "passes": {"a": 2}}, r"data.passes names 'a'.*there are a\+b"),
        ({"passes": 2, "steps": 3}, "data.passes=2 and data.steps=3 both say how long a stage lasts"),
        ({"passes": 0}, "data.passes of every stage is 0; it must be a positive number"),
        ({"passes": "2"}, "data.passes of every stage is '2'; it must be a positive number"),
        ({"passes": float("inf")}, "data.passes of every stage is inf; it must be a positive number"),
        ({"passes": {1: 2}}, "data.passes names 1, which the stream does not have"),
        ({"steps": {"a": -1}}, "data.steps of a is -1"),
        ({"steps": 2.5}, "data.steps of every stage is 2.5; it must be a positive whole number"),
        ({"steps": True}, "data.steps of every stage is True; it must be a positive whole number"),
        ({"prompts_per_step": 0}, "data.prompts_per_step=0 must be at least 1"),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens=0"),
        ({"prompts_per_step": 2.5}, "data.prompts_per_step=2.5 must be a whole number"),
        ({"eval_prompts_per_step": None}, "data.eval_prompts_per_step=None must be a whole number"),
        ({"num_workers": -1}, "data.num_workers=-1 must be at least 0"),
        ({"mixing": 0.0}, "temperature must be a positive number"),
        ({"mixing": None}, "data.mixing=None: a temperature must be a positive number"),
        ({"mixing": "sizes"}, "data.mixing='sizes' is unknown; there are 'size', 'uniform' and temperatures"),
        ({"replay": {"ratio": 0.1}}, r"data.replay=.* is a dict; give a Replay, such as Replay\(ratio=0.1\)"),
        ({"evaluate_on": "train"}, "data.evaluate_on='train' is unknown; there are 'val' and 'test'"),
        ({"predict_on": "all"}, "data.predict_on='all' is unknown; there are 'train', 'val', 'test'"),
        ({"seed": -1}, "data.seed=-1 must be at least 0"),
        ({"seed": 0.5}, "data.seed=0.5 must be a whole number"),
    ],
)
def test_mistakes_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        number_stream(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": [TASK]}, "data.tasks is a list; give a dict of tasks by name"),
        ({"tasks": {"a": "bars2"}}, "data.tasks: 'a' is a str; give a Task"),
        ({"probes": [TASK]}, "data.probes is a list; give a dict"),
        ({"probes": {"p": TASK.source}}, "data.probes: 'p' is a NumberSource; give a Task"),
    ],
)
def test_what_is_no_task_is_refused_at_once(options, message):
    with pytest.raises(TypeError, match=message):
        number_stream(**options)


def test_numbers_of_numpy_are_numbers():
    stream = number_stream(prompts_per_step=np.int64(4), steps=np.int64(3), seed=np.int64(1))
    assert stream.num_steps(0) == 3


def test_the_stream_says_what_it_wants_of_a_trainer():
    """An epoch a stage; and what ``cpt`` sets for every stream (the fakes' Trainer is made of nothing else)."""
    options = number_stream().trainer_options
    assert options["max_epochs"] == 3
    assert {name: value for name, value in options.items() if name != "max_epochs"} == TRAINER_OPTIONS
    options["inference_mode"] = True
    assert number_stream().trainer_options["inference_mode"] is False, "the constant itself is not handed out"


def test_an_empty_task_is_refused_at_setup(tmp_path):
    stream = number_stream(probes={"p": Task(NumberSource("p", num_test=0))})
    with pytest.raises(ValueError, match="task 'p': the test split has no rows"):
        fit(tmp_path, stream)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_epochs": 4}, "max_epochs=4: the stream has 3 stages.*set it to 3"),
        ({"max_epochs": -1}, "max_epochs=-1: the stream has 3 stages"),
        ({"reload_dataloaders_every_n_epochs": 0}, "reload_dataloaders_every_n_epochs must be 1"),
        ({"max_steps": 2}, "trainer.max_steps or max_time .*data.steps says how long tasks are"),
        ({"max_time": {"hours": 1}}, "trainer.max_steps or max_time .*data.steps says how long tasks are"),
    ],
)
def test_a_trainer_that_would_learn_another_stream_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, number_stream(), **options)


def test_without_trainer_and_processor_the_mend_is_named():
    with pytest.raises(RuntimeError, match="set stream.processor"):
        number_stream().train_dataloader()


def test_a_processor_that_was_set_for_another_module_is_refused_until_it_is_taken_back(tmp_path):
    stream = number_stream()
    stream.processor = WordProcessor()
    for verb in ("fit", "validate"):
        with pytest.raises(ValueError, match="stream.processor = None takes the module's"):
            getattr(make_trainer(tmp_path / verb, stream), verb)(LinearModule(), stream)
    stream.processor = None
    module = LinearModule()
    fit(tmp_path, stream, module)
    assert stream.processor is module.processor
    stream.processor = module.processor
    make_trainer(tmp_path / "again", stream).validate(module, stream)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_row_is_named_from_a_worker_too(num_workers):
    class Broken(NumberSource):
        def split(self, split):
            rows = super().split(split)
            rows[3].question = "<image> and <image>"
            return rows

    stream = TaskStream({"a": Task(Broken("a"))}, num_workers=num_workers)
    stream.processor = WordProcessor()
    with pytest.raises(ValueError, match="task 'a', a/train/3"):
        list(stream.train_dataloader())


def test_the_batches_move_to_a_device():
    batch = next(iter(standing_alone().train_dataloader())).to(torch.device("meta"))
    assert batch.prompts.input_ids.is_meta and batch.targets.ids.is_meta


def test_a_stream_asks_every_task_and_probe_in_its_style():
    stream = number_stream(style="think_boxed")
    assert {task.prompt.style for task in stream.everything.values()} == {"think_boxed"}
    assert {task.reward.format for task in stream.everything.values()} == {"think_boxed"}
    assert stream.fingerprint("a", "test") != number_stream().fingerprint("a", "test")


def test_one_text_in_the_place_of_a_list_of_stages_is_refused():
    """Each of its letters would be a stage."""
    with pytest.raises(TypeError, match="data.stages='ab' is text; give a list of tasks by name"):
        number_stream(stages="ab")
