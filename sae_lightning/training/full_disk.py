"""A disk that is full while training, in one sentence, whoever was writing."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# libraries that say it in words alone: safetensors (with the number), PyTorch's writer of zip files
WORDS = re.compile(
    rf"\(os error ({'|'.join(map(str, NUMBERS))})\)|PytorchStreamWriter failed writing|unexpected pos \d+ vs"
)


class FullDiskError(ValueError):
    """There is no room for what a run writes."""


def is_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, says that a disk is full or a quota used up."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (error.errno in NUMBERS) if isinstance(error, OSError) else WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def names_full_disk(work: Callable[..., Any]) -> Callable[..., Any]:
    """``work(cfg, folder, …)``, whose errors become a FullDiskError where a disk is full; half files are removed."""

    @wraps(work)
    def guarded(cfg: Any, folder: Path, *others: Any, **options: Any) -> Any:
        try:
            return work(cfg, folder, *others, **options)
        except Exception as error:
            if isinstance(error, ValueError) or not is_full(error):  # a ValueError is a sentence already
                raise
            for half in folder.glob("*.partial"):
                half.unlink(missing_ok=True)
            where = getattr(error, "filename", None) or folder
            raise FullDiskError(
                f"Writing {where} failed: the disk is full. Free space there, or set paths.runs to another disk; "
                "the same line goes on from the last checkpoint."
            ) from error

    return guarded
