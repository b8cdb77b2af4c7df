"""A folder of shards is replaced whole or not at all, is read as data only, and any number of ranks reads it."""

import os
import pickle
import shutil
import signal
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, empty

from cpt_lightning import checkpoint_files, sharded_checkpoints
from cpt_lightning.checkpoint_files import standing
from cpt_lightning.checkpoint_io import AtomicCheckpointIO, check_resumable, read_checkpoint
from cpt_lightning.cli.run_directory import last_checkpoint
from cpt_lightning.export import find_checkpoint
from cpt_lightning.sharded_checkpoints import fill, save_shards
from cpt_lightning.strategy import FSDP2
from tests.fakes import LinearModule, make_trainer, number_stream


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def content(value: float) -> dict:
    state = {"step": torch.tensor(value), "exp_avg": torch.full((5, 2), value + 1), "note": "kept"}
    return {
        "pytorch-lightning_version": "2.6",
        "state_dict": {
            "layer.weight": torch.full((5, 2), value),
            "half": torch.full((3,), value, dtype=torch.bfloat16),
        },
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "loops": {"generator": torch.arange(3)},
    }


@pytest.fixture
def last(tmp_path):
    path = tmp_path / "last.ckpt"
    save_shards(content(1.0), path)
    return path


def same(one, other) -> bool:
    """Whether two checkpoints hold the same, tensors bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, torch.Tensor) else one == other


def assert_holds(path, value: float):
    assert same(read_checkpoint(path), content(value))


def test_what_is_saved_is_read_and_parts_may_stay_on_the_disk(last):
    assert_holds(last, 1.0)
    looked_at = read_checkpoint(last, parts=())
    assert looked_at["state_dict"]["layer.weight"].is_meta
    assert looked_at["state_dict"]["layer.weight"].shape == (5, 2)
    assert torch.equal(looked_at["loops"]["generator"], torch.arange(3))
    weights = read_checkpoint(last, parts=["state_dict"])
    assert torch.equal(weights["state_dict"]["half"], content(1.0)["state_dict"]["half"])
    assert weights["optimizer_states"][0]["state"][0]["exp_avg"].is_meta


def test_a_folder_replaces_a_file_and_a_file_a_folder(last):
    AtomicCheckpointIO().save_checkpoint(content(2.0), last)
    assert last.is_file()
    assert_holds(last, 2.0)
    save_shards(content(3.0), last)
    assert last.is_dir()
    assert_holds(last, 3.0)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


KILLS = {
    "shards written": (sharded_checkpoints.dcp.FileSystemWriter, "write_data", False, 1.0),
    "the rest half written": (sharded_checkpoints.os, "fsync", True, 1.0),
    "all written": (sharded_checkpoints, "put_in_place", True, 1.0),
    "put aside": (checkpoint_files, "sync_folder", True, 2.0),
    "in place": (checkpoint_files.shutil, "rmtree", True, 2.0),
}


def killed(path, owner, name: str, before: bool, times: int = 1) -> None:
    """Saves in a child that is killed before or after it calls a function for the so-manieth time."""
    left, function = [times], getattr(owner, name)

    def wrapped(*args, **kwargs):
        left[0] -= 1
        result = None if before and not left[0] else function(*args, **kwargs)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    if (child := os.fork()) == 0:
        try:
            setattr(owner, name, wrapped)
            save_shards(content(2.0), path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("where", KILLS)
def test_a_kill_while_saving_leaves_the_earlier_or_the_new_folder(last, where):
    """``--ckpt_path last`` and ``cpt export`` find it; the next save clears the rest away."""
    owner, name, before, holds = KILLS[where]
    killed(last, owner, name, before)
    assert last_checkpoint(str(last.parent)) == str(last)
    assert find_checkpoint(last.parent, None) == last
    assert_holds(last, holds)
    save_shards(content(3.0), last)
    assert_holds(last, 3.0)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_kill_between_the_two_steps_of_the_swap_leaves_the_earlier_folder(last):
    """The one moment at which no checkpoint has the name; a kill there twice in a row does no more harm."""
    killed(last, checkpoint_files.os, "replace", before=False)
    for _ in range(2):
        assert not last.exists()
        assert standing(last).name == "last.ckpt.old"
        assert last_checkpoint(str(last.parent)) == str(last)
        assert find_checkpoint(last.parent, None) == last
        assert_holds(last, 1.0)
        killed(last, checkpoint_files.os, "replace", before=True)
    save_shards(content(3.0), last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("step", ["write_data", "finish"])
def test_a_disk_that_is_full_leaves_the_earlier_folder_and_says_so(last, step, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_checkpoints.dcp.FileSystemWriter, step, full)
    with pytest.raises(OSError, match="last.ckpt could not be saved .*No space left.*stood there before is untouched"):
        save_shards(content(2.0), last)
    monkeypatch.undo()
    assert_holds(last, 1.0)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_plugin_that_would_be_passed_over_is_refused():
    class Mine(AtomicCheckpointIO):
        pass

    strategy = FSDP2(save_distributed_checkpoint=True)
    strategy.checkpoint_io = Mine()
    with pytest.raises(ValueError, match="trainer.plugins has a Mine, which save_distributed_checkpoint would not use"):
        strategy.setup(None)


def test_shards_are_not_written_to_an_address():
    with pytest.raises(ValueError, match="s3://bucket/x.ckpt: shards are written to folders only"):
        FSDP2(save_distributed_checkpoint=True).save_checkpoint({}, "s3://bucket/x.ckpt")


def spoil(folder, kind: str) -> None:
    shard, contents, rest = (folder / name for name in ("__0_0.distcp", ".metadata", "meta.pt"))
    whole = shard.read_bytes()
    match kind:
        case "shard cut off":
            shard.write_bytes(whole[: len(whole) // 2])
        case "shard missing":
            shard.unlink()
        case "shard overwritten":
            shard.write_bytes(bytes(len(whole)))
        case "rest cut off":
            rest.write_bytes(rest.read_bytes()[:-200])
        case "rest missing":
            rest.unlink()
        case "contents cut off":
            contents.write_bytes(contents.read_bytes()[:-20])
        case "code in the contents":
            contents.write_bytes(pickle.dumps(Evil(folder.parent / "pwned")))
        case "code in the rest":
            torch.save({**content(1.0), "hyper_parameters": Evil(folder.parent / "pwned")}, rest)
        case "a file elsewhere":
            contents.write_bytes(contents.read_bytes().replace(b"__0_0.distcp", b"../x0.distcp"))
        case "another rest":
            other = content(1.0)
            other["state_dict"]["layer.weight"] = torch.empty(7, 2, device="meta")
            torch.save(other, rest)
        case "Lightning's own":
            torch.save({"pytorch-lightning_version": "2.6"}, rest)


REFUSALS = {
    "shard cut off": "the shard __0_0.distcp is cut off",
    "shard missing": "the shard __0_0.distcp is missing; copy all files",
    "shard overwritten": "is damaged",
    "rest cut off": "meta.pt: the file is cut off",
    "rest missing": "not a checkpoint, it has no meta.pt",
    "contents cut off": ".metadata is damaged",
    "code in the contents": ".metadata is damaged or not DCP's .*_?io.open, and reading it might run code",
    "code in the rest": "meta.pt holds more than tensors .* might run code",
    "a file elsewhere": "names a file elsewhere, ../x0.distcp",
    "another rest": "its shards hold no state_dict.layer.weight of the shape",
    "Lightning's own": "another program's sharded checkpoint",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_is_no_whole_folder_is_refused_in_a_line_that_names_others(last, tmp_path, kind, monkeypatch):
    """Nothing in it has run, even where the environment tells torch to trust files."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    shutil.copytree(last, tmp_path / "bad.ckpt")
    spoil(tmp_path / "bad.ckpt", kind)
    with pytest.raises(ValueError, match=f"bad.ckpt.*{REFUSALS[kind]}.*beside it there are last.ckpt$") as refusal:
        read_checkpoint(tmp_path / "bad.ckpt")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "pwned").exists()


def test_the_danger_is_real(last, tmp_path):
    """DCP's own reader runs what the table of contents holds."""
    spoil(last, "code in the contents")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        sharded_checkpoints.dcp.FileSystemReader(last).read_metadata()
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("rank", range(3))
def test_any_number_of_ranks_reads_its_share(last, rank):
    """Five rows over three ranks, of which this process plays one: 2, 2 and 1; nothing is exchanged."""
    distributed.init_process_group("fake", rank=rank, world_size=3, store=distributed.HashStore())
    try:
        mesh = DeviceMesh("cpu", range(3))
        rows = torch.arange(10.0).reshape(5, 2)
        save_shards_of(rows, last)

        def share(_, meta):
            sharded = meta.shape == (5, 2)
            return (
                empty(5, 2, device_mesh=mesh, placements=[Shard(0)])
                if sharded
                else torch.empty_like(meta, device="cpu")
            )

        filled = fill(last, read_checkpoint(last, parts=()), empty=share)
    finally:
        distributed.destroy_process_group()
    assert torch.equal(filled["state_dict"]["layer.weight"].to_local(), rows[2 * rank : 2 * rank + 2])


def save_shards_of(rows, path):
    """Saves as one process does, whatever process group there is."""
    checkpoint = content(1.0)
    checkpoint["state_dict"]["layer.weight"] = rows
    save = sharded_checkpoints.dcp.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_checkpoints.dcp, "save", lambda *args, **kwargs: save(*args, no_dist=True, **kwargs))
        save_shards(checkpoint, path)


def test_a_run_goes_on_from_shards_as_from_the_file(tmp_path):
    """In one process: the file of the first task, turned into a folder, leads to the same last file."""
    ends = []
    for name in ("file", "shards"):
        stream, folder = number_stream(), tmp_path / name
        trainer, module = make_trainer(folder, stream), LinearModule()
        trainer.validate(module, stream, verbose=False)
        trainer.fit(module, stream)
        first = folder / "1_a.ckpt"
        if name == "shards":
            save_shards(read_checkpoint(first), first)
            check_resumable(read_checkpoint(first, parts=()), first)
        stream = number_stream()
        trainer = make_trainer(folder, stream)
        trainer.fit(LinearModule(), stream, ckpt_path=first)
        ends.append(read_checkpoint(folder / "last.ckpt"))
    assert all(same(ends[0][part], ends[1][part]) for part in ("state_dict", "optimizer_states"))
