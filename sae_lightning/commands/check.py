"""``sae-lightning check``: the environment in ten lines, or whether the SAEs of runs are used as they were trained."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Look at the environment, or at runs; status 1 where an SAE does not fit. ValueError or OSError, a sentence."""
    about = (
        "Without runs: versions, processor, kernels, devices, disk and logins, to be pasted where help is asked for. "
        "With runs: compare explained variance, L0 and dead share on 64 pictures with what is stated, and say what "
        "fits better."
    )
    top = argparse.ArgumentParser("sae-lightning check", description=about)
    top.add_argument("run", nargs="*", help="runs: folders, names in --runs, or patterns in quotes")
    top.add_argument("--runs", default="runs", help="where the runs are (runs)")
    top.add_argument("--pictures", help="a folder of pictures; by default those that the run was trained on")
    args = top.parse_args(arguments)
    if args.run:
        return _runs(args)
    for name, said in environment():
        print(f"{name:11}{said}", flush=True)
    return 0


def _runs(args: argparse.Namespace) -> int:
    from sae_lightning.runs.model import preflight
    from sae_lightning.runs.run import Run, chosen_runs
    from sae_lightning.settings.compose import compose_config

    data = None
    if args.pictures is not None:
        data = compose_config(["data=folder", f"data.path={Path(args.pictures).resolve()}"]).data
    fit = True
    for folder in chosen_runs(args.run, Path(args.runs)):
        verdict = preflight(Run(folder), data)
        fit &= verdict.fits
        print(f"{folder}: {verdict.sentence}", flush=True)
    return 0 if fit else 1


PACKAGES = ("torch", "lightning", "hydra-core", "timm", "transformers", "datasets", "wandb")


def environment() -> Iterator[tuple[str, str]]:
    """What an SAE's training and scores may depend on here, a name and a line each. Nothing leaves the machine."""
    import os
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from rich.filesize import decimal

    from sae_lightning import __version__
    from sae_lightning.distributed.limits import cores
    from sae_lightning.files import cache_folder
    from sae_lightning.kernels.native import load_native, takes_half

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} missing"

    yield "package", f"sae-lightning {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield "libraries", ", ".join(map(of, PACKAGES))
    flags = torch.backends.cpu.get_cpu_capability()
    yield "processor", f"{platform.machine()}, {cores()} cores of {os.cpu_count()}, PyTorch uses {flags}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    yield "memory", decimal(memory)
    library = load_native()
    bf16 = ", bfloat16 candidates" if library is not None and takes_half() else ""
    yield (
        "kernels",
        f"compiled C{bf16}" if library is not None else "PyTorch's operators; a C compiler makes them faster",
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "GPUs", f"{', '.join(gpus)} (CUDA {torch.version.cuda})" if gpus else "none"
    disk = shutil.disk_usage(Path.cwd())
    yield "disk", f"{decimal(disk.free)} free of {decimal(disk.total)} here; cache: {cache_folder()}"
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE") if os.environ.get(name)]
    yield (
        "logins",
        f"model hub {_login('hub')}, W&B {_login('wandb')}" + "".join(f", {name} is set" for name in offline),
    )
    extras = [name for name in ("starlette", "peft", "submitit", "visaebench") if _there(name)]
    yield "extras", ", ".join(extras) or "none"


def _there(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _login(where: str) -> str:
    """Whether there are credentials, which are neither shown nor tried."""
    if where == "hub":
        from huggingface_hub import get_token

        return "yes" if get_token() else "no"
    import netrc
    import os

    if os.environ.get("WANDB_API_KEY"):
        return "yes"
    try:
        return "yes" if any("wandb" in host for host in netrc.netrc().hosts) else "no"
    except (OSError, netrc.NetrcParseError):
        return "no"
