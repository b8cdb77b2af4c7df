"""Several nodes, as the README starts them: here two launchers on one machine, each with a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
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
    words = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *words, "--rdzv_endpoint", f"127.0.0.1:{port}"]
    return [*launcher, "-m", "cpt_lightning"], {}


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


@pytest.mark.parametrize(("launcher", "strategy"), [(by_torchrun, "fsdp2"), (by_slurm, "ddp")])
def test_two_nodes_learn_what_one_process_does(tmp_path, alone, launcher, strategy):
    (tmp_path / "config.yaml").write_text(CONFIG)
    run, port, nodes = tmp_path / "run", free_port(), []
    with ExitStack() as opened:
        for node in range(2):
            command, variables = launcher(node, port)
            command += ["fit", "-c", str(tmp_path / "config.yaml"), "--run_dir", str(run), *SHORT, *NODES]
            log = opened.enter_context((tmp_path / f"node_{node}.log").open("w"))
            nodes.append(
                subprocess.Popen(
                    [*command, "--trainer.strategy", strategy], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
                )
            )  # fmt: skip
            opened.callback(nodes[-1].kill)
        codes = [node.wait(timeout=200) for node in nodes]
    assert codes == [0, 0], "\n".join((tmp_path / f"node_{node}.log").read_text()[-2000:] for node in range(2))
    assert "x 2" in (tmp_path / "node_0.log").read_text(), "each node learned by itself"
    matrices = [json.loads((folder / "accuracy_matrix.json").read_text())["rows"] for folder in (alone, run)]
    assert matrices[0] == matrices[1]
    one, two = weights(alone), weights(run)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)
