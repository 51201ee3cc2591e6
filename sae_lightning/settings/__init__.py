"""What may be set: every setting of every command with its type and range, checked before heavy imports."""

from sae_lightning.settings.check import SettingsError, check_settings, mistakes

__all__ = ["SettingsError", "check_settings", "mistakes"]
