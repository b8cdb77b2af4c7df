"""Two ranks remember and merge what one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from cpt_lightning.callbacks import EWC, L2, ModelMerging
from cpt_lightning.data import Replay
from tests.fakes import KillAt, Killed, LinearModule, make_trainer, number_stream
from tests.ranks import run_ranks

METHODS = {
    "l2": partial(L2, 0.5, "base"),
    "ewc": partial(EWC, 50.0, num_rows=5, anchors="every_task"),
    "merging": partial(ModelMerging, "task_arithmetic", 0.7, start="base"),
}


def run(folder: Path, method: str, resume: bool = False, **options) -> None:
    """A run that is stopped within its second task, or the rest of it."""
    module, stream, callbacks = LinearModule(), number_stream(replay=Replay(0.25)), [METHODS[method]()]
    if not resume:
        callbacks.append(KillAt(1, batch=2))
    trainer = make_trainer(folder, stream, callbacks=callbacks, **options)
    if resume:
        trainer.fit(module, stream, ckpt_path=folder / "last.ckpt")
        return
    trainer.validate(module, stream, verbose=False)
    with pytest.raises(Killed):
        trainer.fit(module, stream)


def run_all(folder: Path, strategy: str = "auto", devices: int = 1) -> None:
    """By each method; the second half of a run goes on from the first one's checkpoint."""
    for method in METHODS:
        for resume in (False, True):
            run(folder / method, method, resume, strategy=strategy, devices=devices)


def test_two_ranks_that_were_killed_end_like_one(tmp_path):
    run_all(tmp_path / "one")
    run_ranks(run_all, tmp_path / "two", "ddp", 2)
    for method in METHODS:
        ends = [torch.load(tmp_path / ranks / method / "last.ckpt", weights_only=True) for ranks in ("one", "two")]
        for name, weight in ends[0]["state_dict"].items():
            torch.testing.assert_close(ends[1]["state_dict"][name], weight, atol=1e-5, rtol=1e-4)
        kept = [end["callbacks"][type(METHODS[method]()).__name__]["kept"] for end in ends]
        torch.testing.assert_close(kept[1], kept[0], atol=1e-5, rtol=1e-4)
