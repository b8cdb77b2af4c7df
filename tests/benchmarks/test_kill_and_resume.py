"""The script that kills runs, at a small size; and with its means, what else concerns several ranks."""

from __future__ import annotations

import os
import signal

import kill_and_resume as script
import pytest
import torch

from cpt_lightning.checkpoint_io import read_checkpoint

WARNING = "saved on {before} rank(s) and goes on with {now}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "stream.yaml").write_text(script.STREAM)
    assert script.go(folder / "whole", ranks=2)
    return folder


def test_killed_runs_end_like_a_whole_one(tmp_path):
    record = script.kill_and_resume(tmp_path, ranks=1, kills=5, kills_per_run=5)
    assert sum(record["kills"].values()) == 5
    assert record["differences"] == []


def test_a_difference_would_be_seen(tmp_path):
    one = {"weights": [torch.ones(2), torch.zeros(2)], "file": b"text"}
    assert script.differences(one, {"weights": [torch.ones(2), torch.zeros(2)], "file": b"text"}) == []
    other = {"weights": [torch.ones(2), torch.tensor([0.0, 1e-45])], "file": b"texts"}
    assert script.differences(one, other) == ["/weights/1", "/file"]


class Ask(script.Kill):
    """Asks this rank alone to stop, politely."""

    def passing(self, phase: str) -> None:
        if phase == self.phase:
            self.left -= 1
            if self.left == -1:
                os.kill(os.getpid(), signal.SIGTERM)


def test_two_ranks_of_which_one_gets_sigterm_stop_together_and_go_on(whole):
    """In the middle of an update: both finish it, both save, the first says so to the shell."""
    folder = whole / "asked"
    pids = script.start(folder, 2, Ask("update", 4))
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert ends == [128 + signal.SIGTERM, 0]
    assert script.go(folder, ranks=2)
    assert script.differences(script.outcome(whole / "whole"), script.outcome(folder)) == []


@pytest.mark.parametrize("before, now, strategy", [(2, 1, "ddp"), (1, 2, "ddp"), (2, 1, "fsdp2_sharded")])
def test_a_run_goes_on_with_another_number_of_ranks_and_says_what_is_not_exact(whole, before, now, strategy):
    folder = whole / f"from{before}to{now}_{strategy}"
    assert not script.go(folder, before, script.Kill("update", 4), strategy=strategy)
    saved = read_checkpoint(folder / "last.ckpt")
    assert (folder / "last.ckpt").is_dir() == (strategy == "fsdp2_sharded")
    assert len(saved["cpt_lightning"]["random_states"]) == before
    assert script.go(folder, now, strategy=strategy)
    assert len((folder / "accuracy_matrix.json").read_text().split('"after"')) == 1 + 4
    assert WARNING.format(before=before, now=now) in (whole / f"{folder.name}_0.log").read_text()
