"""LightningModules, one per objective, on one shared backbone."""

from cpt_lightning.modules.base import PostTraining
from cpt_lightning.modules.multitask import MultiTask
from cpt_lightning.modules.on_policy_sft import OnPolicySFT
from cpt_lightning.modules.rft import RFT
from cpt_lightning.modules.schedules import TaskSchedule
from cpt_lightning.modules.sft import SFT

__all__ = ["RFT", "SFT", "MultiTask", "OnPolicySFT", "PostTraining", "TaskSchedule"]
