"""A small checkpoint of every format that is read, as its own package writes it, with what that computes.

``CHECKPOINTS[name](folder, d_in, d_sae)`` writes one and gives its path and ``forward``, from features [N, d_in] to
codes [N, d_sae] and the reconstruction: written from what the format's package computes, in one line a step.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize, relu

from sae_lightning.interop import dictionary_learning, overcomplete, saelens
from sae_lightning.saes import BatchTopK, ReLU, TopK

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
Made = tuple[Path, Forward]
CHECKPOINTS: dict[str, Callable[[Path, int, int], Made]] = {}
K, CUT = 5, 0.4


def checkpoint(name: str) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    return lambda make: CHECKPOINTS.setdefault(name, make)


def weights(d_in: int, d_sae: int, seed: int = 0) -> dict[str, Tensor]:
    """``E`` [d_sae, d_in], ``D`` [d_sae, d_in], ``b`` [d_sae], ``o`` [d_in]."""
    g = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    noise = 0.1 * torch.randn(d_sae, d_in, generator=g)
    return {"E": 1.2 * rows + noise, "D": rows, "b": 0.1 * torch.randn(d_sae, generator=g),
            "o": 0.2 * torch.randn(d_in, generator=g)}  # fmt: skip


def largest(pre: Tensor, k: int) -> Tensor:
    """``pre`` with all but each row's k largest set to zero."""
    return torch.zeros_like(pre).scatter(-1, *reversed([*pre.topk(k, dim=-1)]))


def lens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of zero mean and unit deviation (n - 1)."""
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


def saved(path: Path, content: Any, header: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        if header is not None:
            file.write(json.dumps(header).encode() + b"\n")
        torch.save(content, file)
    return path


# --- saev: a line of JSON, then a state dict; the encoder does not subtract b_dec --------------------------
def _saev(schema: int | None, kind: str) -> Callable[[Path, int, int], Made]:
    def make(folder: Path, d_in: int, d_sae: int) -> Made:
        w = weights(d_in, d_sae)
        state = {"W_enc": w["E"].T, "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["o"]}
        width = {"d_vit": d_in, "exp_factor": d_sae // d_in} if (schema or 1) < 3 else {"d_model": d_in, "d_sae": d_sae}
        params = {} if kind == "Relu" else {"top_k": K}
        if schema is None:
            header = {**width, "seed": 0, "l1_coeff": 1e-4}
        elif schema == 1:
            header = {"schema": 1, "cls": kind, "cfg": {**width, **params}, "commit": "c", "lib": "0"}
        else:
            activation = {"cls": kind, "params": params | {"sparsity": {"cls": "NoSparsity", "params": {}}}}
            header = {"schema": schema, "cfg": {**width, "activation": activation}, "commit": "c", "lib": "0"}
        if kind == "BatchTopK" and (schema or 0) > 2:
            state["activation.threshold"] = torch.tensor(CUT)
        path = saved(folder / "sae.pt", state, header).parent

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            pre = x @ w["E"].T + w["b"]
            cut = "activation.threshold" in state
            z = relu(pre) if kind == "Relu" else pre * (pre > CUT) if cut else largest(pre, K)
            return z, z @ w["D"] + w["o"]

        return path, forward

    return make


for _schema, _kind in [(None, "Relu"), (1, "TopK"), (2, "BatchTopK"), (3, "Relu"), (4, "TopK"), (5, "BatchTopK")]:
    checkpoint(f"saev-{_schema}")(_saev(_schema, _kind))


# --- ViSAEBench: sae.pt and config.json; what equals the threshold stays -----------------------------------
def _visaebench(kind: str, names: str) -> Callable[[Path, int, int], Made]:
    def make(folder: Path, d_in: int, d_sae: int) -> Made:
        w = weights(d_in, d_sae)
        config = {"activation": kind, "input_dim": d_in, "hidden_dim": d_sae, "k": K, "threshold": CUT}
        if names == "simple":
            state = {"encoder.weight": w["E"], "encoder.bias": w["b"], "decoder.weight": w["D"], "decoder.bias": w["o"]}
        else:
            state = {"encoder.final_block.0.weight": w["E"], "encoder.final_block.0.bias": w["b"],
                     "dictionary._weights": w["D"], "dictionary.multiplier": torch.tensor(0.3)}  # fmt: skip
        if kind == "jumprelu":
            state["jump_thresholds"] = 0.1 + w["b"].abs()
        saved(folder / "sae.pt", state)
        (folder / "config.json").write_text(json.dumps(config))

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            pre = relu(x @ w["E"].T + w["b"])
            z = {"topk": lambda: largest(pre, K), "batchtopk": lambda: pre * (pre >= CUT),
                 "jumprelu": lambda: pre * (pre > 0.1 + w["b"].abs())}[kind]()  # fmt: skip
            return z, z @ w["D"] + w["o"] if names == "simple" else z @ (w["D"] * torch.tensor(0.3).exp())

        return folder, forward

    return make


for _kind, _names in [("batchtopk", "simple"), ("topk", "overcomplete"), ("jumprelu", "simple")]:
    checkpoint(f"visaebench-{_kind}")(_visaebench(_kind, _names))


# --- sae-for-vlm: a state dict below trainer_0/checkpoints --------------------------------------------------
PLACE = "imagenet_train_activations_clip-vit-base-patch16_4_post_mlp_residual_batch_top_k_20_x2/trainer_0/checkpoints"


@checkpoint("sae-for-vlm")
def _for_vlm(folder: Path, d_in: int, d_sae: int) -> Made:
    w = weights(d_in, d_sae)
    state = {"encoder.weight": w["E"], "encoder.bias": w["b"], "decoder.weight": w["D"].T, "b_dec": w["o"],
             "k": torch.tensor(K), "threshold": torch.tensor(CUT)}  # fmt: skip
    return saved(folder / PLACE / "ae_100000.pt", state), _thresholded(w)


@checkpoint("sae-for-vlm-matroyshka")
def _matroyshka(folder: Path, d_in: int, d_sae: int) -> Made:
    w, sizes = weights(d_in, d_sae), torch.tensor([d_sae // 4, d_sae - d_sae // 4])
    state = {"W_enc": w["E"].T, "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["o"], "k": torch.tensor(K),
             "threshold": torch.tensor(CUT), "group_sizes": sizes}  # fmt: skip
    saved(folder / "trainer_0" / "ae.pt", state)
    trainer = {"dict_class": "MatroyshkaBatchTopKSAE", "activation_dim": d_in, "dict_size": d_sae, "k": K}
    (folder / "trainer_0" / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder / "trainer_0", _thresholded(w)


def _thresholded(w: dict[str, Tensor]) -> Forward:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = relu((x - w["o"]) @ w["E"].T + w["b"])
        return pre * (pre > CUT), (pre * (pre > CUT)) @ w["D"] + w["o"]

    return forward


# --- MSAE: the name says what it is ----------------------------------------------------------------------
def _msae(name: str, levels: bool) -> Callable[[Path, int, int], Made]:
    def make(folder: Path, d_in: int, d_sae: int) -> Made:
        w, mean = weights(d_in, d_sae), torch.linspace(-1, 1, d_in)
        model = {"encoder": w["E"].T, "decoder": w["D"], "latent_bias": w["b"], "pre_bias": w["o"],
                 "latents_activation_frequency": torch.zeros(d_sae, dtype=torch.long)}  # fmt: skip
        content = {"model": model, "mean_center": mean, "scaling_factor": 1.5, "target_norm": 1.0}
        path = saved(folder / f"{d_sae}_{d_in}_{name}_cc3m_ViT-B~16_train_image.pth", content)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            pre = ((x - mean) * 1.5 - w["o"]) @ w["E"].T + w["b"]
            z = relu(pre) if levels else relu(largest(pre, K))
            z = 30 * torch.tanh(z / 30) if "30.0" in name else z
            return z, (z @ w["D"] + w["o"]) / 1.5 + mean

        return path, forward

    return make


checkpoint("msae-nested")(_msae(f"TopKReLU_{K}_RW_False_False_30.0", levels=True))
checkpoint("msae-topk")(_msae(f"TopKReLU_{K}_False_False_0.0", levels=False))


# --- MonoLoss: autoencoder_final.pt ------------------------------------------------------------------------
@checkpoint("monoloss-topk")
def _monoloss_topk(folder: Path, d_in: int, d_sae: int) -> Made:
    w = weights(d_in, d_sae)
    state = {"pre_bias": w["o"], "encoder.weight": w["D"], "latent_bias": w["b"], "decoder.linear.weight": w["D"],
             "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}  # fmt: skip
    config = {"activation": "topk", "topk_k": K, "tied_weights": True, "normalize": True, "n_latents": d_sae}

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        normed, mean, std = lens(x)
        z = relu(largest((normed - w["o"]) @ w["D"].T + w["b"], K))
        return z, (z @ w["D"] + w["o"]) * std + mean

    return _autoencoder(folder, state, config), forward


@checkpoint("monoloss-jumprelu")
def _monoloss_jumprelu(folder: Path, d_in: int, d_sae: int) -> Made:
    w, cut = weights(d_in, d_sae), torch.full((d_sae,), CUT)
    state = {"W_enc": w["E"].T, "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["o"], "jumprelu.log_threshold": cut.log()}

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = relu(x @ w["E"].T + w["b"])
        return pre * (pre > CUT), (pre * (pre > CUT)) @ w["D"] + w["o"]

    return _autoencoder(folder, state, {"model_type": "jumprelu", "normalize": False, "n_latents": d_sae}), forward


def _autoencoder(folder: Path, state: dict[str, Any], config: dict[str, Any]) -> Path:
    return saved(folder / "autoencoder_final.pt", {"epoch": 1, "step": 2, "model_state_dict": state,
                                                   "optimizer_state_dict": {}, "config": config}).parent  # fmt: skip


# --- ViT-Prisma and PatchSAE: the config is an object of a class that is not installed -----------------------
def _object(name: str, module: str, **entries: Any) -> Any:
    """An object whose class can be pickled by name while it is saved."""
    import sys

    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    kind = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    made = kind()
    made.__dict__.update(entries)
    return made


def _forget(root: str) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == root]:
        del sys.modules[name]


@checkpoint("prisma")
def _prisma(folder: Path, d_in: int, d_sae: int) -> Made:
    w = weights(d_in, d_sae)
    state = {"W_enc": w["E"].T, "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["o"]}
    cfg = _object("VisionModelSAERunnerConfig", "not_vit_prisma.sae.config", d_in=d_in, architecture="standard",
                  activation_fn_str="relu", activation_fn_kwargs={}, normalize_activations="layer_norm",
                  model_name="open-clip:laion/CLIP-ViT-B-32", hook_point_layer=4, layer_subtype="hook_resid_post",
                  device=torch.device("cpu"), dtype=torch.float32, cls_token_only=False)  # fmt: skip
    saved(folder / "weights.pt", {"cfg": cfg, "state_dict": state})
    _forget("not_vit_prisma")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        normed, mean, std = lens(x)
        z = relu((normed - w["o"]) @ w["E"].T + w["b"])
        return z, (z @ w["D"] + w["o"]) * std + mean

    return folder, forward


@checkpoint("prisma-gated")
def _prisma_gated(folder: Path, d_in: int, d_sae: int) -> Made:
    w = weights(d_in, d_sae)
    r = 0.3 * w["b"]
    state = {"W_enc": w["E"].T, "b_enc": 0 * r, "W_dec": w["D"], "b_dec": w["o"], "b_gate": w["b"] - 0.3, "r_mag": r,
             "b_mag": w["b"] + 0.1}  # fmt: skip
    config = {"d_in": d_in, "architecture": "gated", "normalize_activations": "none", "hook_point_layer": 4,
              "dtype": {"__type__": "torch.dtype", "value": "torch.float32"}}  # fmt: skip
    saved(folder / "n_images_2600058.pt", state)
    (folder / "config.json").write_text(json.dumps(config))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        a = (x - w["o"]) @ w["E"].T
        z = (a + w["b"] - 0.3 > 0) * relu(a * r.exp() + w["b"] + 0.1)
        return z, z @ w["D"] + w["o"]

    return folder, forward


def _centred(w: dict[str, Tensor], k: int | None = None, bias: bool = True) -> Forward:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = (x - w["o"]) @ w["E"].T + (w["b"] if bias else 0)
        z = relu(pre) if k is None else largest(pre, k)
        return z, z @ w["D"] + w["o"]

    return forward


@checkpoint("patchsae")
def _patchsae(folder: Path, d_in: int, d_sae: int) -> Made:
    w = weights(d_in, d_sae)
    state = {"W_enc": w["E"].T, "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["o"]}
    cfg = _object("ViTSAERunnerConfig", "not_patchsae.sae_training.config", d_in=d_in, gated_sae=False, block_layer=-2,
                  module_name="resid", class_token=False, model_name="openai/clip-vit-base-patch16")  # fmt: skip
    path = saved(folder / "clip-vit-base-patch16_-2_resid_49152.pt", {"cfg": cfg, "state_dict": state})
    _forget("not_patchsae")
    return path, _centred(w)


@checkpoint("clip-scope")
def _clip_scope(folder: Path, d_in: int, d_sae: int) -> Made:
    w = weights(d_in, d_sae)
    state = {"pre_b": w["o"], "enc": w["E"].T, "dec": w["D"]}
    content = {"k": K, "n_features": d_sae, "d_in": d_in, "model_state_dict": state}
    return saved(folder / "22_resid" / "1200013184.pt", content), _centred(w, K, bias=False)


@checkpoint("sparsify")
def _sparsify(folder: Path, d_in: int, d_sae: int) -> Made:
    w = weights(d_in, d_sae)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"encoder.weight": w["E"], "encoder.bias": w["b"], "W_dec": w["D"], "b_dec": w["o"]},
              folder / "sae.safetensors")  # fmt: skip
    config = {"activation": "topk", "k": K, "d_in": d_in, "num_latents": d_sae, "expansion_factor": 2}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder, _centred(w, K)


# --- the layouts that are written too ----------------------------------------------------------------------
def _both_ways(module: Any, kind: Any, **settings: Any) -> Callable[[Path, int, int], Made]:
    def make(folder: Path, d_in: int, d_sae: int) -> Made:
        sae = kind(d_in, d_sae, seed=0, **settings).eval()
        if isinstance(sae, BatchTopK):
            sae.set_cuts(torch.full((d_sae,), CUT))
        module.save(sae, folder)
        return folder, lambda x: (sae.encode(x).to_dense(), sae(x))

    return make


checkpoint("SAELens")(_both_ways(saelens, BatchTopK, k=K))
checkpoint("overcomplete")(_both_ways(overcomplete, TopK, k=K))
checkpoint("dictionary_learning")(_both_ways(dictionary_learning, ReLU))
