"""What ``sae-lightning evaluate`` does, in a checkout: ``python evaluate.py``."""

from sae_lightning.commands.evaluate import main

if __name__ == "__main__":
    main()
