"""Two ranks remember and merge what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cpt_lightning.callbacks import EWC, L2, ModelMerging
from cpt_lightning.data import Replay
from tests.fakes import KillAt, Killed, LinearModule, make_trainer, number_stream

ROOT = Path(__file__).parents[3]
METHODS = {
    "l2": partial(L2, 0.5, "base"),
    "ewc": partial(EWC, 50.0, num_rows=5, anchors="every_task"),
    "merging": partial(ModelMerging, "task_arithmetic", 0.7, start="base"),
}
SCRIPT = """
import sys
from pathlib import Path
from tests.callbacks.methods.test_methods_two_ranks import run

for method in ("l2", "ewc", "merging"):
    # The second half of the run goes on from the first one's checkpoint.
    for resume in (False, True):
        run(Path(sys.argv[1]) / method, method, resume, strategy="ddp", devices=2)
"""


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


def test_two_ranks_that_were_killed_end_like_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for method in METHODS:
        for resume in (False, True):
            run(tmp_path / "one" / method, method, resume)
        ends = [torch.load(tmp_path / ranks / method / "last.ckpt", weights_only=True) for ranks in ("one", "two")]
        for name, weight in ends[0]["state_dict"].items():
            torch.testing.assert_close(ends[1]["state_dict"][name], weight, atol=1e-5, rtol=1e-4)
        kept = [end["callbacks"][type(METHODS[method]()).__name__]["kept"] for end in ends]
        torch.testing.assert_close(kept[1], kept[0], atol=1e-5, rtol=1e-4)
