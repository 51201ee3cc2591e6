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


class HubError(RuntimeError):
    """The model hub cannot be reached, or it refuses."""


def from_pretrained(name: str | Path, revision: str | None = None) -> SAE:
    """The SAE in the folder ``name``, or in the hub's repository of that name, in evaluation mode.

    A repository is "org/name"; what follows is a folder in it, as "org/name/folder" for one SAE of a release.
    ArtefactError when neither is there or the files do not fit.
    """
    folder = Path(name) if Path(name).is_dir() else _download(str(name), revision)
    if not (folder / "cfg.json").is_file():
        raise ArtefactError(
            f"There is no SAE (cfg.json) at '{name}'. Of a release that holds several, name one: '{name}/<folder>'."
        )
    return load(folder)


def _download(name: str, revision: str | None) -> Path:
    """The folder with the artefact's files of "org/name" or "org/name/folder", in the hub's cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = name.strip("/").split("/")
    repo_id, inside = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [f"{inside}/{file}" if inside else file for file in FILES]
    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtefactError(
            f"'{name}' is no folder here and cannot be had from the model hub ({type(error).__name__}). "
            "Check the name, the connection, and for a private repository the login."
        ) from error
    return Path(folder) / inside


def push_to_hub(sae: SAE, repo_id: str, private: bool = False, record: dict[str, Any] | None = None) -> str:
    """Upload ``sae`` with its card to the hub's repository ``repo_id``; returns the commit's address.

    ``record`` is added to ``cfg.json`` (backbone, layer, data, scores …). HubError as in ``upload``.
    """
    with tempfile.TemporaryDirectory() as folder:
        sae.save(folder, **(record or {}))
        write_card(Path(folder), repo_id)
        return upload(Path(folder), repo_id, f"Add a {sae.variant} SAE", private)


def upload(folder: Path, repo_id: str, message: str, private: bool = False, only: list[str] | None = None) -> str:
    """Upload ``folder``, or its files that match ``only``, to the repository ``repo_id``, which is made if need be.

    What is there already with the same content is not sent again. Returns the commit's address. HubError without a
    login or a connection, and when the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError

    if huggingface_hub.get_token() is None:
        raise HubError(
            f"No login at the model hub, so '{repo_id}' cannot be written; call `hf auth login` or set HF_TOKEN."
        )
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, allow_patterns=only)
    except (HTTPError, HFValidationError, OSError) as error:
        said = " ".join(str(error).split())
        raise HubError(
            f"'{repo_id}' could not be written to the model hub ({type(error).__name__}: {said}). "
            "Check the name, the connection, and that the login may write there."
        ) from error
    return str(commit)


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
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
    return path
