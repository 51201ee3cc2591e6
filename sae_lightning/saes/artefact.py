"""An SAE on disk: ``sae.safetensors`` and ``cfg.json`` in one folder, complete without anything else."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_lightning.files import read_json, whole, write_json, write_tensors
from sae_lightning.registry import Registry, discover

VARIANTS: Registry[Any] = Registry("sae.name")  # classes of SAEs by their ``variant``
LAYOUTS: Registry[Any] = Registry("layout")  # what reads SAEs of other packages, which the folder interop adds

FILES = ("sae.safetensors", "cfg.json")
WEIGHTS = (  # of other packages, the likelier first
    "sae.pt", "sae.safetensors", "model.safetensors", "model.pt", "ae.pt", "weights.pt", "autoencoder_final.pt",
    "sae_weights.safetensors", "state_dict.pt",
)  # fmt: skip
CONFIGS = ("config.json", "cfg.json", "config.yaml", "config.yml")
SUFFIXES = (".safetensors", ".pt", ".pth")

SCHEMA = 3  # 1 had W_enc as [d_in, d_sae]; 1 and 2 called the input norm "rms" by the name "unit"

WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class ArtefactError(ValueError):
    """A folder that does not hold a complete SAE artefact."""


class HubError(RuntimeError):
    """The model hub cannot be reached, or it refuses."""


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without what torch.compile, FSDP and data parallelism put before the names of a module's weights."""
    named = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    while named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): tensor for name, tensor in named.items()}
    return named


def read_cfg(folder: Path) -> dict[str, Any]:
    """``cfg.json`` of an artefact or run folder."""
    path = folder / "cfg.json"
    if not path.is_file():
        raise ArtefactError(f"There is no cfg.json in {folder}; expected a run folder with a finished SAE.")
    cfg = read_json(path, "train the run again", ArtefactError)
    if cfg.get("schema") not in (1, 2, SCHEMA):
        raise ArtefactError(f"{path} has schema {cfg.get('schema')}; this version reads schemas 1 to {SCHEMA}.")
    return cfg


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


def download(name: str, revision: str | None = None) -> Path:
    """The file or folder "org/name", "org/name/folder" or "org/name/folder/file", in the hub's cache.

    Of a folder come the files that an SAE's weights and config are called. ArtefactError where it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = name.strip("/").split("/")
    repo_id, inside = "/".join(parts[:2]), Path(*parts[2:])
    folder, files = (inside, WEIGHTS) if inside.suffix not in SUFFIXES else (inside.parent, (inside.name,))
    above = [folder.parent] if folder.name == "checkpoints" else []
    wanted = [folder / file for file in (*files, *CONFIGS, "activation_scaler.json")]
    wanted += [place / config for place in above for config in CONFIGS]
    try:
        root = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=[path.as_posix() for path in dict.fromkeys(wanted)]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtefactError(
            f"'{name}' is no folder here and cannot be had from the model hub ({type(error).__name__}). "
            "Check the name, the connection, and for a private repository the login."
        ) from error
    return Path(root) / inside


def foreign(path: Path) -> bool:
    """Whether ``path`` is a file of weights, or a folder with some that this package has not written."""
    names = [path.name] if path.is_file() else [file.name for file in path.glob("*") if file.suffix in SUFFIXES]
    cfg = path / FILES[1]
    if cfg.is_file():
        return bool(names) and whole(cfg) and b'"schema"' not in cfg.read_bytes()  # of a broken one it is said
    return bool(names) and (names != [FILES[0]] or path.is_file())


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
    shown |= {name: f"{value:.4g}" for name, value in cfg.get("figures", {}).items()}
    data = ModelCardData(
        library_name="sae-lightning", tags=["sparse-autoencoder", "interpretability", cfg["variant"]], pipeline_tag=None
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    text = CARD.format(title=repo_id.rsplit("/", 1)[-1], rows=rows, repo_id=repo_id, d_in=cfg["d_in"])
    path = folder / "README.md"
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
    return path


def put_tensors(path: Path, tensors: dict[str, Tensor], anew: bool = False) -> None:
    """Write tensors into a safetensors file beside those that it holds, or with ``anew`` in place of them."""
    held = {} if anew or not path.is_file() else read_tensors(path)[0]
    write_tensors(path, held | tensors)


def tensor_names(path: Path) -> set[str]:
    """The names of a safetensors file's tensors; none where there is no file, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError):
        return set()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; ArtefactError where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}); make it anew: python evaluate.py runs={path.parent.name}."
        ) from error


class Artefact(nn.Module):
    """What is saved and loaded: the part of ``SAE`` that knows files and the model hub."""

    variant: ClassVar[str]
    later_buffers: ClassVar[dict[str, float]] = {}  # scalars that older artefacts lack, with what they are taken for
    d_in: int
    d_sae: int
    tied: bool

    def settings(self) -> dict[str, object]:
        """Constructor arguments besides d_in, d_sae and the normaliser, as plain values."""
        raise NotImplementedError

    def save(self, folder: str | Path, **record: object) -> None:
        """Write ``sae.safetensors``, then ``cfg.json`` with what rebuilds the SAE and the ``record``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.state_dict())
        if self.tied:
            del tensors["W_enc"]
        write_tensors(folder / FILES[0], tensors, {"variant": self.variant})
        made = {"variant": self.variant, "d_in": self.d_in, "d_sae": self.d_sae, "sae": self.settings()}
        write_json(folder / FILES[1], {"schema": SCHEMA} | made | record)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The SAE in ``folder``, on the CPU in evaluation mode; ArtefactError: what is missing or does not fit.

        A folder, or a file, of another package's weights is read too, where ``interop`` knows its format.
        """
        folder = Path(folder)
        if foreign(folder):
            discover("sae_lightning.interop")
            return LAYOUTS["release"](folder)
        cfg = read_cfg(folder)
        lacking = {"variant", "d_in", "d_sae", "sae"} - set(cfg)
        if lacking:
            raise ArtefactError(
                f"{folder / 'cfg.json'} lacks {', '.join(sorted(lacking))}; it is no SAE of this package."
            )
        try:
            made = VARIANTS[cfg["variant"]]
        except ValueError as error:
            raise ArtefactError(
                f"{folder} holds a '{cfg['variant']}' SAE; known variants: {', '.join(sorted(VARIANTS))}."
            ) from error
        weights = folder / "sae.safetensors"
        if not weights.is_file():
            raise ArtefactError(f"There is no sae.safetensors in {folder}; the run did not finish.")
        try:
            tensors = unwrapped(load_file(weights))
        except SafetensorError as error:
            raise ArtefactError(f"{weights} cannot be read ({error}); it is truncated or not safetensors.") from error
        settings = dict(cfg["sae"])
        if cfg["schema"] < 3 and settings.get("input_norm") == "unit":
            settings["input_norm"] = "rms"
        sae = made(cfg["d_in"], cfg["d_sae"], **settings)
        if cfg["schema"] == 1:
            if "W_enc" not in tensors:
                raise ArtefactError(f"{weights} does not fit its cfg.json: it has no W_enc.")
            tensors["W_enc"] = tensors["W_enc"].T.contiguous()
        tensors = {name: torch.tensor(value) for name, value in sae.later_buffers.items()} | tensors
        if sae.tied and "W_dec" in tensors:
            tensors["W_enc"] = tensors["W_dec"]
        try:
            sae.load_state_dict(tensors)
        except RuntimeError as error:
            raise ArtefactError(f"{weights} does not fit its cfg.json: {error}") from error
        return sae.eval()

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:
        """The SAE in the folder ``name``, or in the hub's repository of that name, in evaluation mode.

        A repository is "org/name"; what follows is a folder or a file in it, as "org/name/folder" for one SAE of a
        release. ArtefactError when neither is there or the files do not fit.
        """
        folder = Path(name) if Path(name).exists() else download(str(name), revision)
        if not (folder / FILES[1]).is_file() and not foreign(folder):
            raise ArtefactError(
                f"There is no SAE (cfg.json) at '{name}'. Of a release that holds several, name one: '{name}/<folder>'."
            )
        return cls.load(folder)

    def push_to_hub(self, repo_id: str, private: bool = False, **record: object) -> str:
        """Upload the SAE with its card to the hub's repository ``repo_id``; returns the commit's address.

        ``record`` is added to ``cfg.json`` (backbone, layer, data, scores …). HubError as in ``upload``.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, **record)
            write_card(Path(folder), repo_id)
            return upload(Path(folder), repo_id, f"Add a {self.variant} SAE", private)
