"""What ``sae-lightning finetune`` does, in a checkout: ``python finetune.py``."""

from sae_lightning.commands.finetune import main

if __name__ == "__main__":
    main()
