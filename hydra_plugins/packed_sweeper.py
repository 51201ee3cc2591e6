"""Where Hydra looks for plugins, in ``hydra_plugins`` of every package; the classes are in ``commands/``."""

from sae_lightning.commands.hydra import OwnConfigsFirst
from sae_lightning.commands.sweeper import CheckedSweeper, PackedSweeper

CheckedSweeper.__module__ = OwnConfigsFirst.__module__ = PackedSweeper.__module__ = __name__  # by which they are found
