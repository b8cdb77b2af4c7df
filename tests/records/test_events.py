"""Event files: what is read of them is what TensorBoard's own reader finds."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cpt_lightning.records.events import Scalars


def write(folder, number, steps, purge_step=None, names=("train/loss", "perf/rows")):
    """A file of a beginning, with a picture and a text beside the scalars; how many bytes it has after each step."""
    with SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=f".{number}") as writer:
        (file,) = folder.glob(f"*.{number}")
        sizes = []
        for step in steps:
            for name in names:
                writer.add_scalar(name, 10 * number + step / 3, step, walltime=60.0 * step)
            writer.add_image("picture", np.full((3, 4, 4), 9, dtype=np.uint8), step)
            writer.add_text("said", "a text", step)
            writer.flush()
            sizes.append(file.stat().st_size)
    return file, sizes


def of_tensorboard(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return {name: entries for name, entries in found.items() if entries}


def test_scalars_are_those_that_tensorboard_reads(tmp_path):
    """Three beginnings: the second goes on at step 2, and the third, which logs one of the names, at step 0."""
    files = [write(tmp_path, 0, range(5))[0], write(tmp_path, 1, range(2, 7), purge_step=2)[0]]
    scalars = Scalars.load(files)
    assert scalars.entries == of_tensorboard(tmp_path)
    assert [step for step, _ in scalars.entries["train/loss"]] == [*range(7)]
    assert scalars.seconds == 60 * 4 + 60 * 4
    files.append(write(tmp_path, 2, range(2), purge_step=0, names=["perf/rows"])[0])
    assert Scalars.load(files).entries == of_tensorboard(tmp_path)
    assert list(Scalars.load(files).entries) == ["perf/rows"]


def test_an_event_that_a_kill_cut_off_is_left_out(tmp_path):
    """At every byte of the last event."""
    file, sizes = write(tmp_path, 0, range(3), names=["train/loss"])
    content = file.read_bytes()
    for size in (0, 5, sizes[1], sizes[1] + 1, sizes[1] + 11, sizes[1] + 30):
        file.write_bytes(content[:size])
        found = [step for step, _ in Scalars.load([file]).entries.get("train/loss", [])]
        assert found == ([0, 1] if size >= sizes[1] else [])


def test_a_broken_file_is_named(tmp_path):
    file, sizes = write(tmp_path, 0, range(3), names=["train/loss"])
    content = bytearray(file.read_bytes())
    content[sizes[0] + 12 : sizes[0] + 20] = b"\xff" * 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is broken at byte {sizes[0]}: take it out"):
        Scalars.load([file])
