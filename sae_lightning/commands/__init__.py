"""The command line beside the entry points: ``sae-lightning store …``."""
