"""Vision-language models of transformers behind one interface: ``load_vlm(cfg.vlm).captions(images)``."""

from sae_lightning.vlms.base import VLM
from sae_lightning.vlms.errors import VLMError
from sae_lightning.vlms.load import load_vlm

__all__ = ["VLM", "VLMError", "load_vlm"]
