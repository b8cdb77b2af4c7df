"""The backbone, its processor, what of it is trained, and the embedded tiny base."""

from cpt_lightning.models.adapters import Lora
from cpt_lightning.models.backbone import Backbone, load_backbone

__all__ = ["Backbone", "Lora", "load_backbone"]
