"""Checkpoints are replaced whole or not at all, and read as data only."""

import os
import pickle
import resource
import signal
import warnings

import pytest
import torch

from cpt_lightning import checkpoint_io
from cpt_lightning.checkpoint_io import AtomicCheckpointIO, check_resumable, read_checkpoint
from tests.fakes import LinearModule, make_trainer, number_stream

BIG = {"pytorch-lightning_version": "2.6", "weights": torch.arange(300_000)}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def last(tmp_path):
    """A checkpoint with its content."""
    path, content = tmp_path / "last.ckpt", {**BIG, "weights": torch.ones(3)}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def assert_untouched(path):
    assert torch.equal(read_checkpoint(path)["weights"], torch.ones(3))


def test_a_save_replaces_the_file_and_leaves_nothing_else(last):
    AtomicCheckpointIO().save_checkpoint(BIG, last)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(last)["weights"], BIG["weights"])
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_state_that_could_not_be_read_again_is_said_when_it_is_saved_and_named_when_it_is_read(last):
    """Rather than when a run is to go on from it."""
    with pytest.warns(UserWarning, match=r"last.ckpt holds pathlib\.\w+, and no run can go on from it.*state_dict"):
        AtomicCheckpointIO().save_checkpoint({**BIG, "callbacks": {"Mine": {"best": last}}}, last)
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values \(pathlib\.\w+\)"):
        read_checkpoint(last)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["before", "half-way", "written, not yet in place"])
def test_a_kill_while_saving_leaves_the_earlier_file(last, share, monkeypatch):
    """A child is killed at that share of the file; the next save clears its rest away."""

    whole_save = torch.save

    def save(content, file):
        whole_save(content, file)
        file.truncate(int(file.tell() * share))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            monkeypatch.setattr(checkpoint_io.torch, "save", save)
            AtomicCheckpointIO().save_checkpoint(BIG, last)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_untouched(last)
    assert (last.parent / "last.ckpt.part").exists()
    AtomicCheckpointIO().save_checkpoint(BIG, last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_the_earlier_file_and_says_so(last):
    """No file may grow over 100 kB: what the system then does is what it does when the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="last.ckpt could not be saved .*the checkpoint that stood there.*untouched"):
            AtomicCheckpointIO().save_checkpoint(BIG, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def spoiled(tmp_path, kind: str):
    path = tmp_path / "bad.ckpt"
    whole = (tmp_path / "last.ckpt").read_bytes()
    match kind:
        case "cut off":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.touch()
        case "text":
            path.write_text("weights: [1, 2]")
        case "pickle":
            path.write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
        case "code":
            torch.save({**BIG, "hyper_parameters": Evil(tmp_path / "pwned")}, path)
        case "weights alone":
            torch.save({"layer.weight": torch.ones(2)}, path)
    return path


REFUSALS = {
    "cut off": "the file is cut off",
    "empty": "the file is empty",
    "text": "this is not a checkpoint",
    "pickle": "this is not a checkpoint",
    "code": "reading it might run code",
    "weights alone": "is not a checkpoint of a run",
    "missing": "there is no such checkpoint",
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("parts", [(), ("state_dict", "optimizer_states")])
def test_what_is_no_checkpoint_is_refused_in_a_line_that_names_others(last, tmp_path, kind, parts, monkeypatch):
    """Even where the environment tells torch to trust files; nothing in them has run."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = spoiled(tmp_path, kind)
    with pytest.raises(ValueError, match=f"bad.ckpt.*{REFUSALS[kind]}.*last.ckpt$") as refusal:
        read_checkpoint(path, parts=parts)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "pwned").exists()


def test_the_danger_is_real(last, tmp_path):
    """The same file runs its code where it is trusted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        torch.load(spoiled(tmp_path, "code"), weights_only=False)
    assert (tmp_path / "pwned").exists()


def test_every_trainer_with_our_checkpoints_reads_and_writes_so(last, tmp_path):
    """Also when it is told that the file may be trusted."""
    path = spoiled(tmp_path, "code")
    stream = number_stream()
    trainer = make_trainer(tmp_path / "run", stream)
    with pytest.raises(ValueError, match="might run code"):
        trainer.fit(LinearModule(), stream, ckpt_path=path, weights_only=False)
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert not (tmp_path / "pwned").exists()


def test_another_checkpoint_io_of_the_user_stays(tmp_path):
    class Mine(AtomicCheckpointIO):
        pass

    stream = number_stream()
    trainer = make_trainer(tmp_path, stream, plugins=[Mine()], max_epochs=0)
    trainer.fit(LinearModule(), stream)
    assert type(trainer.strategy.checkpoint_io) is Mine


def test_weights_alone_are_not_gone_on_from():
    with pytest.raises(ValueError, match="x.ckpt has no callbacks: .*save_weights_only.*cpt test"):
        check_resumable({"loops": {}}, "x.ckpt")
