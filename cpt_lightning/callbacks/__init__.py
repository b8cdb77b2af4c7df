"""What crosses tasks: the record of learning and forgetting, what the model said, checkpoints, progress."""

from cpt_lightning.callbacks.checkpoints import TaskCheckpoint
from cpt_lightning.callbacks.completions import CompletionPanel
from cpt_lightning.callbacks.continual import ContinualLearning
from cpt_lightning.callbacks.drift import Drift
from cpt_lightning.callbacks.ewc import EWC
from cpt_lightning.callbacks.exports import TaskExport
from cpt_lightning.callbacks.gradient_risk import GradientRisk
from cpt_lightning.callbacks.influence import Influence
from cpt_lightning.callbacks.l2 import L2
from cpt_lightning.callbacks.merging import ModelMerging
from cpt_lightning.callbacks.progress import SkippedRows, TaskProgressBar
from cpt_lightning.callbacks.rollout_filter import RolloutFilter
from cpt_lightning.callbacks.rollout_writer import RolloutWriter
from cpt_lightning.callbacks.samples import SampleLog
from cpt_lightning.callbacks.scores import TestScores
from cpt_lightning.callbacks.stream_pictures import StreamPictures
from cpt_lightning.callbacks.weight_change import WeightChange
from cpt_lightning.callbacks.weight_distance import WeightDistance

__all__ = [
    "EWC",
    "L2",
    "CompletionPanel",
    "ContinualLearning",
    "Drift",
    "GradientRisk",
    "Influence",
    "ModelMerging",
    "RolloutFilter",
    "RolloutWriter",
    "SampleLog",
    "SkippedRows",
    "StreamPictures",
    "TaskCheckpoint",
    "TaskExport",
    "TaskProgressBar",
    "TestScores",
    "WeightChange",
    "WeightDistance",
]
