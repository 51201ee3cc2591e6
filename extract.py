"""What ``sae-lightning extract`` does, in a checkout: ``python extract.py``."""

from sae_lightning.commands.extract import main

if __name__ == "__main__":
    main()
