"""What a run leaves in its folder: how it is written, and read again."""

from cpt_lightning.records.matrix import AccuracyMatrix
from cpt_lightning.records.run import RunFolder

__all__ = ["AccuracyMatrix", "RunFolder"]
