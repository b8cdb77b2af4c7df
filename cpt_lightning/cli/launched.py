"""Who began the processes of a run: srun or torchrun, or Lightning itself; and whether they are as many as it is of."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

LARGEST_STEP = 0xFFFFFFF0
"""SLURM numbers steps that srun did not begin (of a batch script, of ``salloc``) from here on."""


@dataclass(frozen=True)
class Launched:
    """What a launcher began of which this process is one.

    Args:
        launcher: Its name.
        num_nodes: Nodes with processes.
        num_processes: Processes on all nodes.
    """

    launcher: str
    num_nodes: int
    num_processes: int


def launched() -> Launched | None:
    """What a launcher began, by the variables that it sets; ``None`` if Lightning is to begin what there is to begin.

    A single process of srun, and what runs in a job without srun, are as outside SLURM.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        num_processes, each = (int(os.environ[f"{name}WORLD_SIZE"]) for name in ("", "LOCAL_"))
        return Launched("torchrun", num_processes // each, num_processes)
    if not 0 <= int(os.environ.get("SLURM_STEP_ID", -1)) < LARGEST_STEP:
        return None
    num_nodes, num_processes = (int(os.environ[f"SLURM_STEP_NUM_{name}"]) for name in ("NODES", "TASKS"))
    return Launched("srun", num_nodes, num_processes) if num_processes > 1 else None


def tell_lightning() -> None:
    """Sets SLURM's variables to what srun began, where Lightning (2.6) reads what the job was given, or something else.

    It takes a process for one of srun's by the job's name, which ``salloc`` calls interactive, and by the job's number
    of tasks, which a batch script has too; ranks meet on the first node of the job, which need not be one of srun's,
    and on a port by the job's number, which two calls of srun have in common.

    Raises:
        ValueError: srun began more processes on one node than on another.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return
    began = launched()
    if began is None or began.launcher != "srun":
        os.environ["SLURM_JOB_NAME"] = "interactive"
        return
    each = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # such as 8(x2), or 8(x2),7
    if not (alike := re.fullmatch(r"(\d+)(\(x\d+\))?", each)):
        raise ValueError(
            f"srun began {each} processes on its nodes, and a run has as many on each: give srun --ntasks-per-node"
        )
    os.environ["SLURM_NTASKS_PER_NODE"] = alike[1]
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        os.environ["SLURM_JOB_NAME"] = "cpt"
    os.environ["SLURM_NODELIST"] = os.environ["SLURM_STEP_NODELIST"]
    port = 15000 + (int(os.environ["SLURM_JOB_ID"]) + 997 * int(os.environ["SLURM_STEP_ID"])) % 10000
    os.environ.setdefault("MASTER_PORT", str(port))


def check_launched(num_nodes: int, num_devices: int) -> None:
    """Refuses a run of more or fewer processes than were begun: it would wait for others, or be begun by each anew.

    Args:
        num_nodes: Of the Trainer.
        num_devices: Of the Trainer, on each node.

    Raises:
        ValueError: They differ.
    """
    began = launched()
    if began is None:
        if num_nodes > 1 and "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"num_nodes={num_nodes}, but nothing began processes on other nodes: have srun or torchrun do that"
            )
        return
    if (began.num_nodes, began.num_processes) == (num_nodes, num_nodes * num_devices):
        return
    raise ValueError(
        f"{began.launcher} began {began.num_processes} process(es) on {began.num_nodes} node(s), but the run is of "
        f"num_nodes={num_nodes} with devices={num_devices} on each; one process for each device is needed: give "
        f"{began.launcher} other numbers, or --trainer.num_nodes and --trainer.devices"
    )


def check_alone(verb: str) -> None:
    """Refuses to do the work of one process in each of several.

    Raises:
        ValueError: A launcher began several.
    """
    began = launched()
    if began is not None and began.num_processes > 1:
        raise ValueError(
            f"{began.launcher} began {began.num_processes} processes, and cpt {verb} is the work of one: do it without "
            f"{began.launcher}, or in one process"
        )
