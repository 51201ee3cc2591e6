"""What ``sae-lightning train`` does, in a checkout: ``python train.py``."""

from sae_lightning.commands.train import main

if __name__ == "__main__":
    main()
