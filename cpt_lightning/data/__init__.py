"""The stream of tasks as data: what is shown when, and to which rank."""

from cpt_lightning.data.checks import TRAINER_OPTIONS
from cpt_lightning.data.collate import Collate
from cpt_lightning.data.datamodule import TaskStream
from cpt_lightning.data.loader import StageLoader
from cpt_lightning.data.replay import Replay
from cpt_lightning.data.sampler import EvaluationSampler, RowRef, Share, StageSampler

__all__ = [
    "TRAINER_OPTIONS",
    "Collate",
    "EvaluationSampler",
    "Replay",
    "RowRef",
    "Share",
    "StageLoader",
    "StageSampler",
    "TaskStream",
]
