"""What a run leaves in its folder: how it is written, and read again."""

from cpt_lightning.records.matrix import AccuracyMatrix

__all__ = ["AccuracyMatrix"]
