"""Whether a stream goes on with the record of a checkpoint, and what of it that record does not know yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning import LightningModule, Trainer

from cpt_lightning.checkpoint_io import record_of


def check_stream(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Refuses a stream that does not begin with the one that a record is of, or that measures it otherwise.

    Raises:
        ValueError: Stages were changed other than by new ones behind them; a task or probe is no longer evaluated, or
            evaluated otherwise. Earlier checkpoints do not say how.
    """
    stream, stages = trainer.datamodule, record["stages"]
    if stream.stages[: len(stages)] != stages:
        raise ValueError(
            f"the checkpoint belongs to another stream: its stages are {stages}, now they are {stream.stages}. New "
            "stages may stand behind those that it had: --data.tasks.NAME adds a task, where the tasks of a later -c "
            "take the place of all. For another stream, begin a new run from the model: `cpt export` it, and name the "
            "folder as backbone.path"
        )
    if gone := [name for name in (*record["tasks"], *record["probes"]) if name not in stream.everything]:
        raise ValueError(
            f"the checkpoint belongs to another stream: {', '.join(gone)} was evaluated, and is missing now. Probes "
            "may be added, and not taken away"
        )
    for name, before in record.get("fingerprints", {}).items():
        if before != (now := stream.fingerprint(name, stream.evaluate_on)):
            raise ValueError(
                f"'{name}' is evaluated otherwise than in the checkpoint (fingerprint {before}, now {now}), and "
                "the matrix would mix two measurements: restore its prompt, reward, rows and data.evaluate_on, or "
                "begin a new run"
            )


def answers_of(pl_module: LightningModule) -> dict[str, Any]:
    """How evaluations draw answers, an entry per option; none of a module that does not say."""
    if (sampling := getattr(pl_module, "evaluation", None)) is None:
        return {}
    return {**asdict(sampling), "forced_prefix": getattr(pl_module, "forced_prefix", None)}


def check_answers(pl_module: LightningModule, record: Mapping[str, Any]) -> None:
    """Refuses to go on where answers are drawn otherwise than those of a record; earlier ones do not say how.

    Raises:
        ValueError: Names the option.
    """
    before = record.get("answers", {})
    for name, now in answers_of(pl_module).items():
        if before.get(name, now) != now:
            option = name if name == "forced_prefix" else f"evaluation.{name}"
            raise ValueError(
                f"{option} is {now!r}, in the checkpoint it is {before[name]!r}, and the matrix would mix two "
                "measurements: restore it, or begin a new run"
            )


def new_to(trainer: Trainer, record: Mapping[str, Any]) -> str:
    """What a stream has that a record knows nothing of, in words; empty if it is the same stream."""
    stream, known = trainer.datamodule, {*record["tasks"], *record["probes"]}
    stages = stream.stage_names[len(record["stages"]) :]
    kinds = {"stage": stages, "probe": [name for name in stream.probe_names if name not in known]}
    return " and ".join(f"{kind}{'s' * (len(names) > 1)} {', '.join(names)}" for kind, names in kinds.items() if names)


def unmeasured(trainer: Trainer, checkpoint: Mapping[str, Any]) -> list[str]:
    """Tasks and probes that the model of a checkpoint is to be asked before ``fit`` goes on from it.

    They are those that came to the stream later, if the checkpoint stands at the end of a stage that is not the last.
    Within one there are none, for its end asks everything.
    """
    record = record_of(checkpoint)
    if record is None:
        return []
    num_learned, stream = len(record["rows"]), trainer.datamodule
    if not checkpoint["epoch"] < num_learned < stream.num_stages:
        return []
    return [name for name in stream.asked if name not in record["rows"][-1]]
