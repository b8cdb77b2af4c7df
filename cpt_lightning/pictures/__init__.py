"""What was learned and forgotten, drawn for TensorBoard, reports and notebooks: each gives a matplotlib figure."""

from cpt_lightning.pictures.matrix import heatmap, stream_curves
from cpt_lightning.pictures.probes import probe_curves
from cpt_lightning.pictures.rollout import rope_positions, token_changes, tree_mask

__all__ = ["heatmap", "probe_curves", "rope_positions", "stream_curves", "token_changes", "tree_mask"]
