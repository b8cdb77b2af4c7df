"""Processes that a launcher began: as many as the run is of, or a word why not.

The variables are those that SLURM 22.05 was seen to set, on two nodes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from cpt_lightning.cli import main
from cpt_lightning.cli.launched import Launched, check_launched, launched, tell_lightning
from tests.test_two_ranks import CONFIG

JOB = {"JOB_ID": "17", "JOB_NAME": "cpt", "NNODES": "2", "NTASKS": "2", "NODELIST": "n[1-2]", "NTASKS_PER_NODE": "1"}
ALLOCATED = {**JOB, "JOB_NAME": "interactive"}
BATCH = {**JOB, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
STEP = {
    **BATCH, "STEP_ID": "0", "STEP_NUM_NODES": "2", "STEP_NUM_TASKS": "2", "STEP_NODELIST": "n[1-2]",
    "STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
ONE_OF_ONE = {"STEP_NUM_NODES": "1", "STEP_NUM_TASKS": "1", "STEP_TASKS_PER_NODE": "1", "NTASKS": "1", "NNODES": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1"}


@pytest.fixture
def job(monkeypatch):
    """Sets the variables of a job for this process, and takes back what is made of them."""

    def set_variables(slurm: dict[str, str], **others: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        monkeypatch.setattr(os, "environ", environment | {f"SLURM_{name}": value for name, value in slurm.items()})
        os.environ.update(others)

    return set_variables


@pytest.mark.parametrize(
    ("slurm", "others", "began"),
    [
        ({}, {}, None),
        (ALLOCATED, {}, None),
        (BATCH, {}, None),
        (STEP, {}, Launched("srun", 2, 2)),
        (STEP | ONE_OF_ONE, {}, None),
        (STEP | {"STEP_ID": str(0xFFFFFFFA)}, {}, None),  # the shell that salloc opens on a node
        ({}, TORCHRUN, Launched("torchrun", 2, 4)),
        (STEP, TORCHRUN, Launched("torchrun", 2, 4)),  # srun began the launchers
    ],
    ids=["no job", "salloc", "batch script", "srun", "srun of one", "shell of salloc", "torchrun", "torchrun by srun"],
)
def test_lightning_begins_what_no_launcher_began(job, slurm, others, began):
    job(slurm, **others)
    assert launched() == began
    tell_lightning()
    assert SLURMEnvironment.detect() == (slurm == STEP and not others)


def test_ranks_of_srun_meet_on_its_own_nodes_and_port(job):
    """The second call of srun in a job of two nodes, two processes on the second one; salloc named the job."""
    on_one = {"STEP_NUM_NODES": "1", "NNODES": "1", "STEP_NODELIST": "n2", "STEP_TASKS_PER_NODE": "2"}
    job(STEP | {"JOB_NAME": "interactive", "STEP_ID": "1"} | on_one)
    tell_lightning()
    assert SLURMEnvironment.detect()
    environment = SLURMEnvironment()
    assert environment.main_address == "n2"
    assert environment.main_port == 15000 + 17 + 997
    environment.validate_settings(num_devices=2, num_nodes=1)


def test_as_many_processes_need_not_be_asked_for_by_node(job):
    """`--ntasks 4` on two nodes, which Lightning refuses."""
    job({name: value for name, value in STEP.items() if name != "NTASKS_PER_NODE"} | {
        "NTASKS": "4", "STEP_NUM_TASKS": "4", "STEP_TASKS_PER_NODE": "2(x2)"
    })  # fmt: skip
    tell_lightning()
    SLURMEnvironment().validate_settings(num_devices=2, num_nodes=2)


def test_nodes_with_unequally_many_processes_are_refused(job):
    job(STEP | {"NTASKS": "3", "STEP_NUM_TASKS": "3", "STEP_TASKS_PER_NODE": "2,1"})
    with pytest.raises(ValueError, match="began 2,1 processes .* give srun --ntasks-per-node"):
        tell_lightning()


@pytest.mark.parametrize(
    ("slurm", "others", "num_nodes", "num_devices", "said"),
    [
        (STEP, {}, 2, 1, None),
        (STEP, {}, 1, 1, r"srun began 2 process\(es\) on 2 node\(s\), .* num_nodes=1 with devices=1"),
        (STEP, {}, 1, 2, "num_nodes=1 with devices=2"),
        (STEP, {}, 2, 2, "num_nodes=2 with devices=2"),
        ({}, TORCHRUN, 2, 2, None),
        ({}, TORCHRUN, 1, 1, r"torchrun began 4 process\(es\) on 2 node\(s\)"),
        (BATCH, {}, 1, 2, None),
        (BATCH, {}, 2, 1, "nothing began processes on other nodes"),
        ({}, {}, 2, 1, "nothing began processes on other nodes"),
        ({}, {"MASTER_ADDR": "n1"}, 2, 1, None),  # begun by hand on each
    ],
)
def test_a_run_is_of_the_processes_that_were_begun(job, slurm, others, num_nodes, num_devices, said):
    job(slurm, **others)
    if said is None:
        check_launched(num_nodes, num_devices)
    else:
        with pytest.raises(ValueError, match=said):
            check_launched(num_nodes, num_devices)


def test_two_processes_do_not_learn_one_run_each(tmp_path, job, capsys):
    """Of a config without a word about nodes and devices; nothing is left behind."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    job(STEP)
    command = ["fit", "-c", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run"), "--trainer.devices=1"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "cpt fit: error: srun began 2 process(es)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["inspect", "plan", "study", "report", "export"])
def test_the_work_of_one_process_is_not_done_twice(job, capsys, verb):
    job(STEP)
    with pytest.raises(SystemExit, match="2"):
        main([verb, str(Path("runs") / "a")])
    assert f"srun began 2 processes, and cpt {verb} is the work of one" in capsys.readouterr().err


SCRIPT = Path(__file__).parents[1] / "configs" / "slurm" / "preemptible.sbatch"


@pytest.mark.parametrize(("status", "requeued"), [(0, ""), (1, ""), (143, "requeue 17")])
def test_the_batch_script_has_its_job_begun_again_where_sigterm_stopped_the_run(tmp_path, status, requeued):
    for name, body in {"srun": f"exit {status}", "scontrol": ""}.items():
        (tmp_path / name).write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/{name}.said\n{body}\n')
        (tmp_path / name).chmod(0o755)
    job = {"JOB_ID": "17", "JOB_NAME": "mine", "NNODES": "2", "NTASKS_PER_NODE": "8", "CPUS_PER_TASK": "4"}
    variables = {f"SLURM_{name}": value for name, value in job.items()} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SCRIPT), "-c", "a b.yaml"], env=variables)
    assert done.returncode == status
    assert (tmp_path / "srun.said").read_text() == (
        "--cpus-per-task 4 --kill-on-bad-exit=1 cpt fit -c a b.yaml --run_dir runs/mine --ckpt_path last "
        "--trainer.num_nodes 2 --trainer.devices 8\n"
    )
    said = tmp_path / "scontrol.said"
    assert (said.read_text().strip() if said.exists() else "") == requeued
