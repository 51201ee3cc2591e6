"""SAEs whose weights were saved from a compiled or wrapped module, in every layout that is read."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lightning.interop import dictionary_learning, overcomplete, saelens
from sae_lightning.saes import SAE
from tests.interop.test_saelens import random_sae, raw_features

PREFIXES = ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]


def put_before_every_name(folder: Path, prefix: str) -> None:
    """Rename the tensors in the folder's one file of weights."""
    for path in folder.glob("*.safetensors"):
        save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    for path in folder.glob("*.pt"):
        torch.save({prefix + name: tensor for name, tensor in torch.load(path, weights_only=True).items()}, path)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", [None, saelens, dictionary_learning, overcomplete])
def test_a_prefix_before_every_name_is_taken_off(layout: ModuleType | None, prefix: str, tmp_path: Path) -> None:
    sae = random_sae("batchtopk")
    sae.save(tmp_path) if layout is None else layout.save(sae, tmp_path)
    put_before_every_name(tmp_path, prefix)
    loaded = SAE.load(tmp_path) if layout is None else layout.load(tmp_path)
    torch.testing.assert_close(loaded(raw_features()), sae(raw_features()))


def test_names_that_only_look_like_a_prefix_stay(tmp_path: Path) -> None:
    sae = random_sae("relu")
    saelens.save(sae, tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["module.W_enc"] = tensors.pop("W_enc")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lacks W_enc; it has .*module\.W_enc"):
        saelens.load(tmp_path)
