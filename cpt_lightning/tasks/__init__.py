"""What is learned, how it is asked, and where its rows come from."""

from cpt_lightning.rewards import Reward, RewardPart
from cpt_lightning.tasks.columns import Columns
from cpt_lightning.tasks.hub import HubRows, Join
from cpt_lightning.tasks.images import ImageError, load_image
from cpt_lightning.tasks.jigsaw import Jigsaw
from cpt_lightning.tasks.memory import MemoryRows
from cpt_lightning.tasks.prompts import Prompt
from cpt_lightning.tasks.rollout_rows import RolloutRows
from cpt_lightning.tasks.rows import SPLITS, LazySequence, Row, Source, Split
from cpt_lightning.tasks.sources import FileRows, TableRows
from cpt_lightning.tasks.task import SkippedRow, Task
from cpt_lightning.tasks.toy import ToyWorld
from cpt_lightning.tasks.vqa import EasyVQA

__all__ = [
    "SPLITS",
    "Columns",
    "EasyVQA",
    "FileRows",
    "HubRows",
    "ImageError",
    "Jigsaw",
    "Join",
    "LazySequence",
    "MemoryRows",
    "Prompt",
    "Reward",
    "RewardPart",
    "RolloutRows",
    "Row",
    "SkippedRow",
    "Source",
    "Split",
    "TableRows",
    "Task",
    "ToyWorld",
    "load_image",
]
