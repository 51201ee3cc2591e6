"""An SAE on the model hub: the artefact's two files and a card that says what they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lightning.saes.artefact import ArtefactError, load, read_cfg

if TYPE_CHECKING:
    from sae_lightning.saes.base import SAE

FILES = ("sae.safetensors", "cfg.json")

CARD = """# {title}

A sparse autoencoder for the features of a vision encoder, trained with sae-lightning.

| | |
|---|---|
{rows}

```python
from sae_lightning.saes import SAE

sae = SAE.from_pretrained("{repo_id}")
codes = sae.encode(features)          # raw features [..., {d_in}] of the encoder's layer
reconstruction = sae(features)
```

`sae.safetensors` holds the weights with the normaliser, `cfg.json` what rebuilds the SAE and how it was trained.
"""


def from_pretrained(name: str | Path, revision: str | None = None) -> SAE:
    """The SAE in the folder ``name``, or in the hub's repository of that name ("org/name"), in evaluation mode.

    ArtefactError when neither is there or the files do not fit.
    """
    if Path(name).is_dir():
        return load(Path(name))
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=list(FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtefactError(
            f"'{name}' is no folder here and cannot be had from the model hub ({type(error).__name__}). "
            "Check the name, the connection, and for a private repository the login."
        ) from error
    return load(Path(folder))


def push_to_hub(sae: SAE, repo_id: str, private: bool = False, record: dict[str, Any] | None = None) -> str:
    """Upload ``sae`` with its card to the hub's repository ``repo_id``; returns the commit's address.

    ``record`` is added to ``cfg.json`` (backbone, layer, data, scores …). Errors of the hub are passed on.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sae.save(folder, **(record or {}))
        write_card(Path(folder), repo_id)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Add a {sae.variant} SAE"))


def write_card(folder: Path, repo_id: str) -> Path:
    """Write ``README.md`` for the artefact in ``folder``, from what its ``cfg.json`` says."""
    from huggingface_hub import ModelCardData

    cfg = read_cfg(folder)
    shown = {"variant": cfg["variant"], "d_in": cfg["d_in"], "d_sae": cfg["d_sae"]} | cfg["sae"]
    shown |= {name: cfg[name] for name in ("backbone", "layer", "data", "seed") if name in cfg}
    data = ModelCardData(
        library_name="sae-lightning", tags=["sparse-autoencoder", "interpretability", cfg["variant"]], pipeline_tag=None
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    text = CARD.format(title=repo_id.rsplit("/", 1)[-1], rows=rows, repo_id=repo_id, d_in=cfg["d_in"])
    path = folder / "README.md"
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}")
    return path
