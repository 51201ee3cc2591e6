"""How many images a shard holds: few enough that processes share the work and a kill loses about a minute of it."""

from __future__ import annotations

from sae_lightning.backbones import Backbone

BYTES, IMAGES = 256 << 20, 4096  # at most
MINUTE = 60.0  # seconds
PER_PROCESS = 8  # shards that each process is to have, where that leaves whole batches
OPERATIONS = {"cpu": 3e10, "cuda": 3e12}  # a second, of a slow device


def images_a_shard(n_images: int | None, image_bytes: int, seconds: float, processes: int, batch_size: int) -> int:
    """Images a shard of a store of ``n_images`` (None: not known) that ``processes`` write, each of ``image_bytes``.

    At most 256 MB, 4096 images and a minute's work at ``seconds`` an image; of small data sets less, so that every
    process has some. A whole number of batches where it is more than one.
    """
    most = min(IMAGES, BYTES // image_bytes, int(MINUTE / seconds))
    if n_images is not None:
        share = -(-n_images // processes)
        most = min(most, share, -(-share // (PER_PROCESS * batch_size)) * batch_size)
    return max(1, most - most % batch_size if most > batch_size else most)


def seconds_an_image(backbone: Backbone, device: str) -> float:
    """What an image takes a slow ``device``, by its parameters and patches: never measured, so that shards are the same
    on every machine of a kind.
    """
    operations = 2 * sum(p.numel() for p in backbone.model.parameters()) * backbone.n_patches
    return operations / OPERATIONS.get(device, OPERATIONS["cuda"])
