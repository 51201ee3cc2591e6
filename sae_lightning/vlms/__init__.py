"""Vision-language models of transformers behind one interface: ``load_vlm(cfg.vlm).captions(images)``."""

from sae_lightning.vlms.load import load_vlm
from sae_lightning.vlms.vlm import VLM, VLMError

__all__ = ["VLM", "VLMError", "load_vlm"]
