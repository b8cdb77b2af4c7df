"""Rows to batches, with the embedded base's real processor."""

import pytest
import torch
from PIL import Image

from cpt_lightning.data import Collate
from cpt_lightning.rewards import Reward
from cpt_lightning.tasks import ToyWorld
from cpt_lightning.types import Example


def example(text: str, images: int = 0, target: str | None = "red", row_id: str = "row") -> Example:
    pictures = [Image.new("RGB", (84, 84), "navy") for _ in range(images)]
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return Example("colours", row_id, [{"role": "user", "content": content}], "red", Reward(), pictures, target)


def test_single_image_multi_image_and_text_rows_mix(processor):
    batch = Collate(processor)([example("what?", images) for images in (1, 0, 3)])
    prompts = batch.prompts
    assert prompts.images_per_prompt == [1, 0, 3]
    assert prompts.image_grid_thw.shape == (4, 3)
    assert len(batch) == 3 and batch.num_skipped == 0 and prompts.valid is None
    assert processor.decode(batch.targets) == ["red"] * 3
    assert (batch.targets.ids[:, -1] == processor.eos_token_id).all()


def test_a_batch_says_the_same_as_its_rows_alone(processor):
    examples = [example("which colour is the circle in the middle?", 1), example("what?", 0)]
    together = Collate(processor)(examples).prompts
    for row, each in enumerate(examples):
        alone = Collate(processor)([each]).prompts
        kept = together.select([row])
        assert torch.equal(kept.input_ids, alone.input_ids)
        assert together.examples[row].row_id == each.row_id


def test_images_leave_the_batch_as_pictures_but_not_the_callers_rows(processor):
    row = example("what?", 1)
    batch = Collate(processor)([row])
    assert batch.prompts.examples[0].images == [] and len(row.images) == 1
    assert batch.prompts.examples[0].gold == "red"


def test_over_long_prompts_are_left_out_and_counted(processor):
    short, long = example("what?"), example("what? " * 50, images=1)
    limit = int(Collate(processor)([short]).prompts.lengths)
    batch = Collate(processor, max_prompt_tokens=limit)([long, short, long])
    assert batch.num_skipped == 2 and len(batch) == 1
    assert batch.prompts.examples[0].messages == short.messages
    assert batch.prompts.input_ids.shape == (1, limit)
    assert batch.prompts.pixel_values is None
    assert len(batch.targets) == 1


def test_a_batch_of_over_long_prompts_is_an_error_that_names_limit_and_row(processor):
    collate = Collate(processor, max_prompt_tokens=3)
    with pytest.raises(ValueError, match=r"max_prompt_tokens=3: task 'colours', file.json:7 has \d+ tokens; raise"):
        collate([example("what? " * 9, row_id="file.json:6"), example("what?", row_id="file.json:7")])


def test_targets_need_every_row_to_have_one(processor):
    assert Collate(processor)([example("what?"), example("what?", target=None)]).targets is None
    assert Collate(processor, with_targets=False)([example("what?")]).targets is None


def test_an_error_of_encoding_names_the_row(processor):
    broken = example("what?", images=1, row_id="file.json:3")
    broken.images.clear()
    with pytest.raises(ValueError, match="task 'colours', file.json:3: 1 places for an image"):
        Collate(processor)([example("what?"), broken])


def test_validity_travels_with_the_rows(processor):
    batch = Collate(processor)([example("what?"), example("what? what?")], valid=[True, False])
    assert batch.prompts.valid.tolist() == [True, False]


def test_toy_rows_fit_the_base(processor):
    """A toy picture is 9 visual tokens, so a prompt is short."""
    from cpt_lightning.tasks import Task

    rows = Task(ToyWorld("word2")).examples("train", "word2")
    batch = Collate(processor)(rows[:3])
    assert (batch.prompts.input_ids == processor.image_token_id).sum(dim=1).tolist() == [9, 9, 9]
    assert processor.decode(batch.targets) == [row.gold for row in rows[:3]]
