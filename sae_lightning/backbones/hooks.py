"""Reading the outputs of some of a model's blocks while it runs, and no more of it than that needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn


class _Enough(Exception):  # noqa: N818 - no error: it leaves a forward pass from which nothing more is wanted
    """Raised inside the last wanted block's hook."""


def block_outputs(
    run: Callable[[], Any], blocks: Sequence[nn.Module], layers: Collection[int], finish: bool
) -> tuple[dict[int, Tensor], Any]:
    """What ``blocks[layer]`` gives for each of ``layers`` during ``run()``, and what ``run()`` returns.

    Without ``finish`` the pass ends after the last wanted block, and None stands for its result. No hook
    stays behind, whatever happens.
    """
    seen: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output
            if not finish and len(seen) == len(layers):
                raise _Enough

        return hook

    handles = []
    try:
        handles += [blocks[layer].register_forward_hook(hook_of(layer)) for layer in layers]
        result = run()
    except _Enough:
        result = None
    finally:
        for handle in handles:
            handle.remove()
    return seen, result
