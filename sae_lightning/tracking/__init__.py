"""Scores and pictures of evaluated runs in the loggers that trainings write to."""

from sae_lightning.tracking.publish import publish
from sae_lightning.tracking.scores import GOALS, scores_of

__all__ = ["GOALS", "publish", "scores_of"]
