"""How users of several libraries keep features on disk and stream them into training.

Every module has the same three names: ``write(features, folder)`` puts synthetic features into an empty folder,
``loader(folder, batch_tokens, **option)`` returns an iterable over one epoch, and ``OPTIONS`` lists settings of the
loader worth comparing; tables show each of them and call the fastest by the peer's name. Batches are float16 tensors
in memory, of about ``batch_tokens`` tokens, [N, D] or, where a library deals in whole images, [images, P, D]. A
library that cannot be imported raises ImportError when it is used.
"""

from __future__ import annotations

from types import ModuleType

from experiments.bench.feature_peers import datasets, litdata, lmdb, memcpy, ours, sequential, torch_pt

PEERS: dict[str, ModuleType] = {
    "ours": ours,
    "sequential": sequential,
    "memcpy": memcpy,
    "torch .pt": torch_pt,
    "datasets": datasets,
    "lmdb": lmdb,
    "litdata": litdata,
}
