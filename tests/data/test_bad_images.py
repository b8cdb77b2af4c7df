"""Rows whose image is refused: left out of training and counted, in their places but not counted in evaluation."""

import pytest
from torchmetrics import MeanMetric

from cpt_lightning.data import TaskStream
from cpt_lightning.data.sampler import EvaluationSampler, Share
from cpt_lightning.tasks import ImageError, Task
from tests.fakes import LinearModule, NumberSource, WordProcessor, make_trainer, number_stream

BAD = (0, 3, 4)


class WithBadImages(NumberSource):
    """Some rows show a file that is not there."""

    def split(self, split):
        rows = super().split(split)
        for number in BAD:
            rows[number].images = ["gone.png"]
        return rows


def stream_of(bad_images, **options):
    stream = TaskStream({"a": Task(WithBadImages("a"), bad_images=bad_images)}, **options)
    stream.processor = WordProcessor()
    return stream


def numbers(batch):
    return [int(example.row_id.rpartition("/")[2]) for example in batch.prompts.examples]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_leaves_them_out_and_counts_them(num_workers):
    """A pass of 10 rows in batches of 5 meets the three bad ones once."""
    batches = list(stream_of("skip", prompts_per_step=5, num_workers=num_workers).train_dataloader())
    assert sum(batch.num_skipped for batch in batches) == len(BAD)
    assert sorted(row for batch in batches for row in numbers(batch)) == [1, 2, 5, 6, 7, 8, 9]
    assert all(len(batch.targets) == len(batch) for batch in batches)


def test_evaluation_keeps_their_places_without_counting_them():
    """6 rows in batches of 4."""
    batches = list(stream_of("skip", eval_prompts_per_step=4).val_dataloader())
    assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [batch.prompts.valid.tolist() for batch in batches] == [[False, True, True, False], [False, True]]
    assert [batch.num_skipped for batch in batches] == [2, 1]


def test_all_ranks_have_batches_of_the_same_size():
    """Two ranks, 6 rows in batches of 4: each has two rows of the first batch and one of the second, bad or not."""
    loader = stream_of("skip").val_dataloader()
    sizes = []
    for rank in (0, 1):
        sampler = EvaluationSampler({"a": 6}, 4, Share(rank, 2))
        sizes.append([len(loader.dataset[refs]) for refs in sampler])
    assert sizes == [[2, 1], [2, 1]]


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_without_the_policy_the_first_one_stops_the_run(loader):
    with pytest.raises(ImageError, match="task 'a', a/(train|test)/[034]: image 'gone.png' does not exist"):
        list(getattr(stream_of("fail"), loader)())


def test_a_batch_of_bad_images_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(f"{__name__}.BAD", range(6))
    stream = TaskStream({"a": Task(WithBadImages("a", num_train=6), bad_images="skip")}, prompts_per_step=3)
    stream.processor = WordProcessor()
    message = "every row of a batch of 3 has an image that is refused; task 'a', a/train/.: image 'gone.png' does not"
    with pytest.raises(ValueError, match=message):
        next(iter(stream.train_dataloader()))


def test_a_run_goes_through_and_its_accuracy_is_that_of_the_other_rows(tmp_path, monkeypatch):
    seen = []

    class Noted(MeanMetric):
        def update(self, value, weight=1.0):
            seen.append(weight)
            super().update(value, weight)

    monkeypatch.setattr("tests.fakes.MeanMetric", Noted)
    stream = number_stream(tasks={"a": Task(WithBadImages("a"), bad_images="skip")}, probes={})
    trainer, module = make_trainer(tmp_path, stream), LinearModule()
    trainer.validate(module, stream, verbose=False)
    assert seen == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    trainer.fit(module, stream)
    assert {row for batch in module.seen for row in batch}.isdisjoint(f"a/train/{number}" for number in BAD)
