"""Feature stores: extraction, reading and streaming."""

from sae_lightning.features.loader import FeatureLoader
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.store import FeatureStore

__all__ = ["FeatureLoader", "FeatureStore", "StoreError"]
