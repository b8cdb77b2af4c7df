"""What was learned and forgotten, drawn for TensorBoard, reports and notebooks: each gives a matplotlib figure."""

from cpt_lightning.pictures.matrix import heatmap, stream_curves

__all__ = ["heatmap", "stream_curves"]
