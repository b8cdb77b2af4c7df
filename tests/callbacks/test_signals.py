"""A run that is asked to stop ends between batches, where it can go on from."""

import os
import signal

import pytest
import torch
from lightning import Callback

from cpt_lightning.callbacks import TaskCheckpoint
from cpt_lightning.callbacks.signals import Stopped
from tests.fakes import LinearModule, make_trainer, number_stream


class Send(Callback):
    """Sends a signal to this process, at a hook of a stage and batch."""

    def __init__(self, number, hook: str = "train", stage: int = 1, batch: int = 0) -> None:
        self.number, self.here = number, (hook, stage, batch)

    def _maybe(self, trainer, hook, batch_idx):
        if trainer.state.fn == "fit" and (hook, trainer.current_epoch, batch_idx) == self.here:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._maybe(trainer, "train", batch_idx)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self._maybe(trainer, "validation", batch_idx)


def run(folder, *callbacks, resume=False):
    module, stream = LinearModule(), number_stream()
    # Without every_n_steps: what is saved within a task is saved because of the signal, or before the last batch.
    trainer = make_trainer(folder, stream, callbacks=callbacks, checkpoint=TaskCheckpoint())
    if not resume:
        trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream, ckpt_path=str(folder / "last.ckpt") if resume else None)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def assert_same_end(folder, module, whole):
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, whole[1].state_dict()[name])
    for name in ("accuracy_matrix.json", "samples.jsonl"):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "hook, batch, learned", [("train", 0, 4), ("train", 1, 5), ("train", 2, 5), ("validation", 3, 5)]
)
def test_sigterm_and_ctrl_c_end_a_run_that_goes_on_to_the_same_end(tmp_path, whole, number, hook, batch, learned):
    """Three batches a stage: the batch of the signal is finished; a last batch is learned again with its evaluation."""
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, Send(number, hook, batch=batch))
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    module = run(tmp_path, resume=True)
    assert module.seen == whole[1].seen[learned:]
    assert_same_end(tmp_path, module, whole)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_evaluation_alone_ends_with_a_word_and_not_as_if_it_had_succeeded(tmp_path, caplog, verb, number):
    class Here(Callback):
        def on_validation_batch_start(self, *_):
            os.kill(os.getpid(), number)

        on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    trainer = make_trainer(tmp_path, number_stream(), callbacks=[Here()], checkpoint=TaskCheckpoint())
    with caplog.at_level("INFO"), pytest.raises(Stopped) as stopped:
        getattr(trainer, verb)(LinearModule(), number_stream())
    assert stopped.value.code == 128 + number
    assert "start it again" in caplog.text and "to save it" not in caplog.text


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_twice_stops_at_once(tmp_path, whole, caplog):
    """The second is Lightning's: nothing is saved, and what is there is named."""

    class Twice(Send):
        def _maybe(self, *place):
            for _ in range(2):
                super()._maybe(*place)

    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stopped:
        run(tmp_path, Twice(signal.SIGINT, batch=1))
    assert not isinstance(stopped.value, Stopped)
    assert "press Ctrl-C again to stop at once" in caplog.text


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_says_how_to_go_on(tmp_path, whole, caplog):
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        run(tmp_path, Send(signal.SIGINT, batch=1))
    assert f"go on with --ckpt_path {tmp_path / 'last.ckpt'}" in caplog.text


@pytest.mark.usefixtures("interruptible")
def test_before_the_first_checkpoint_the_folder_is_named_in_which_to_begin_anew(tmp_path, whole, caplog):
    """What is judged lies there; as it was typed the run would begin in another. The second Ctrl-C stops at once."""

    class Impatient(Callback):
        def on_train_epoch_start(self, *_):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        run(tmp_path, Impatient())
    assert f"no checkpoint yet: --run_dir {tmp_path} --ckpt_path last begins anew" in caplog.text


def test_a_checkpoint_that_is_refused_is_not_recommended(tmp_path, whole, caplog):
    stream = number_stream(stages=["a", "c", "b"])
    trainer = make_trainer(tmp_path, stream, checkpoint=TaskCheckpoint(dirpath=str(whole[0])))
    with caplog.at_level("INFO"), pytest.raises(ValueError, match="belongs to another stream"):
        trainer.fit(LinearModule(), stream, ckpt_path=str(whole[0] / "1_a.ckpt"))
    assert "go on with" not in caplog.text


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("by_srun", [True, False])
def test_slurm_is_asked_to_start_the_job_anew(tmp_path, whole, monkeypatch, array, accepted, by_srun):
    """A stand-in for `scontrol` writes down what it was asked; Lightning or torchrun may have begun the processes."""
    tools, asked = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ > {asked}\nexit {0 if accepted else 1}\n")
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    job = {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "cpt",
        "SLURM_JOB_ID": "17",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    if not by_srun:
        del job["SLURM_NTASKS"]
    job |= {"SLURM_NODEID": "0"} | ({"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "6"} if array else {})
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    if accepted:
        with pytest.raises(Stopped):
            run(folder, Send(signal.SIGUSR1, batch=0))
    else:
        with pytest.warns(UserWarning, match="did not requeue job"), pytest.raises(Stopped):
            run(folder, Send(signal.SIGUSR1, batch=0))
    assert asked.read_text().split() == ["requeue", "11_6" if array else "17"]
    assert_same_end(folder, run(folder, resume=True), whole)
