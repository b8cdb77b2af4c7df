"""Several nodes, as the README starts them: here two launchers on one machine, each with a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from cpt_lightning.cli import main
from tests.test_two_ranks import CONFIG, ROOT, weights

SHORT = ["--data.steps=2", "--filter.mode=null", "--trainer.enable_progress_bar=false"]
NODES = ["--trainer.num_nodes=2", "--trainer.devices=1"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def by_torchrun(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    words = ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "1", "--rdzv_backend", "c10d"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *words, "--rdzv_endpoint", f"127.0.0.1:{port}"]
    # Without it torch (2.13) gives processes that are begun again the addresses of those before them.
    return [*launcher, "-m", "cpt_lightning"], {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def by_slurm(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """What ``srun`` (22.05) sets for each of its tasks, within ``salloc``, whose first node is not one of this call."""
    names = {"JOB_ID": port, "JOB_NAME": "interactive", "NTASKS": 2, "NNODES": 2, "NODELIST": "elsewhere[1-3]",
             "PROCID": node, "NODEID": node, "LOCALID": 0, "STEP_ID": 1, "STEP_NUM_NODES": 2, "STEP_NUM_TASKS": 2,
             "STEP_TASKS_PER_NODE": "1(x2)", "STEP_NODELIST": "127.0.0.1"}  # fmt: skip
    variables = {f"SLURM_{name}": str(value) for name, value in names.items()}
    return [sys.executable, "-m", "cpt_lightning"], {**variables, "MASTER_PORT": str(port)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "config.yaml").write_text(CONFIG)
    main(["fit", "-c", str(folder / "config.yaml"), "--run_dir", str(folder / "run"), *SHORT, "--trainer.devices=1"])
    return folder / "run"


@contextmanager
def two_nodes(folder: Path, launcher, *options: str) -> Iterator[list[subprocess.Popen]]:
    """A process for each node, which writes ``node_<number>.log``; both are in ``folder/run``."""
    (folder / "config.yaml").write_text(CONFIG)
    port = free_port()
    with ExitStack() as opened:
        nodes = []
        for node in range(2):
            command, variables = launcher(node, port)
            command += ["fit", "-c", str(folder / "config.yaml"), "--run_dir", str(folder / "run"), *SHORT, *NODES]
            log = opened.enter_context((folder / f"node_{node}.log").open("w"))
            nodes.append(
                subprocess.Popen(
                    [*command, *options], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
                )
            )  # fmt: skip
            opened.callback(nodes[-1].kill)
        yield nodes


def check_ended_as(alone: Path, folder: Path, nodes: list[subprocess.Popen]) -> None:
    codes = [node.wait(timeout=200) for node in nodes]
    assert codes == [0, 0], "\n".join((folder / f"node_{node}.log").read_text()[-2000:] for node in range(2))
    matrices = [json.loads((run / "accuracy_matrix.json").read_text())["rows"] for run in (alone, folder / "run")]
    assert matrices[0] == matrices[1]
    one, two = weights(alone), weights(folder / "run")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("launcher", "strategy"), [(by_torchrun, "fsdp2"), (by_slurm, "ddp")])
def test_two_nodes_learn_what_one_process_does(tmp_path, alone, launcher, strategy):
    with two_nodes(tmp_path, launcher, "--trainer.strategy", strategy) as nodes:
        check_ended_as(alone, tmp_path, nodes)
    assert "x 2" in (tmp_path / "node_0.log").read_text(), "each node learned by itself"


def test_torchrun_brings_a_run_back_one_of_whose_processes_was_killed(tmp_path, alone):
    """On either node all are begun again, and go on behind the first step of four."""
    options = ["--trainer.strategy=ddp", "--ckpt_path=last", "--checkpoint.every_n_steps=1"]
    with two_nodes(tmp_path, by_torchrun, *options) as nodes:
        end = time.monotonic() + 120
        while not (tmp_path / "run/last.ckpt").exists():
            assert time.monotonic() < end, (tmp_path / "node_0.log").read_text()[-2000:]
            time.sleep(0.01)
        (process,) = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
        os.kill(int(process), signal.SIGKILL)
        check_ended_as(alone, tmp_path, nodes)
    said = "".join((tmp_path / f"node_{node}.log").read_text() for node in range(2))
    assert "exitcode: -9" in said and said.count("Restored all states") == 1
