"""What ``sae-lightning explore`` does, in a checkout: ``python explore.py``."""

from sae_lightning.commands.explore import main

if __name__ == "__main__":
    main()
