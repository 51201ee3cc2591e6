"""The configs of all commands, one choice a file; in an installed package ``sae_lightning.conf``."""
