"""What was learned and forgotten, and what the model said, drawn for TensorBoard, reports and notebooks."""

from cpt_lightning.pictures.curves import stream_curves
from cpt_lightning.pictures.matrix import heatmap

__all__ = ["heatmap", "stream_curves"]
