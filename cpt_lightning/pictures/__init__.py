"""What was learned and forgotten, and what the model said, drawn for TensorBoard, reports and notebooks."""

from cpt_lightning.pictures.curves import stream_curves
from cpt_lightning.pictures.matrix import heatmap
from cpt_lightning.pictures.probes import probe_curves
from cpt_lightning.pictures.rollout import rope_positions, token_changes, tree_mask

__all__ = ["heatmap", "probe_curves", "rope_positions", "stream_curves", "token_changes", "tree_mask"]
