"""The backbone, its processor, what of it is trained, and the embedded tiny base."""

from cpt_lightning.models.adapters import Lora
from cpt_lightning.models.backbone import Backbone, load_backbone
from cpt_lightning.models.quantization import Quantization

__all__ = ["Backbone", "Lora", "Quantization", "load_backbone"]
