"""What crosses tasks: the record of learning and forgetting, what the model said, checkpoints, progress."""

from cpt_lightning.callbacks.checkpoints import TaskCheckpoint
from cpt_lightning.callbacks.continual import ContinualLearning
from cpt_lightning.callbacks.matrix import AccuracyMatrix
from cpt_lightning.callbacks.progress import SkippedRows, TaskProgressBar
from cpt_lightning.callbacks.rollout_filter import RolloutFilter
from cpt_lightning.callbacks.samples import SampleLog

__all__ = [
    "AccuracyMatrix",
    "ContinualLearning",
    "RolloutFilter",
    "SampleLog",
    "SkippedRows",
    "TaskCheckpoint",
    "TaskProgressBar",
]
