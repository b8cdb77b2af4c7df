"""What crosses tasks: the record of learning and forgetting, what the model said, checkpoints, progress."""

from cpt_lightning.callbacks.analysis.drift import Drift
from cpt_lightning.callbacks.analysis.gradient_risk import GradientRisk
from cpt_lightning.callbacks.analysis.influence import Influence
from cpt_lightning.callbacks.analysis.weight_change import WeightChange
from cpt_lightning.callbacks.analysis.weight_distance import WeightDistance
from cpt_lightning.callbacks.checkpoints import TaskCheckpoint
from cpt_lightning.callbacks.continual import ContinualLearning
from cpt_lightning.callbacks.display.completions import CompletionPanel
from cpt_lightning.callbacks.display.progress import SkippedRows, TaskProgressBar
from cpt_lightning.callbacks.display.stream_pictures import StreamPictures
from cpt_lightning.callbacks.exports import TaskExport
from cpt_lightning.callbacks.filter.rollout_filter import RolloutFilter
from cpt_lightning.callbacks.methods.ewc import EWC
from cpt_lightning.callbacks.methods.l2 import L2
from cpt_lightning.callbacks.methods.merging import ModelMerging
from cpt_lightning.callbacks.rollout_writer import RolloutWriter
from cpt_lightning.callbacks.samples import SampleLog
from cpt_lightning.callbacks.scores import TestScores

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
