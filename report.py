"""What ``sae-lightning report`` does, in a checkout: ``python report.py``."""

from sae_lightning.commands.report import main

if __name__ == "__main__":
    main()
