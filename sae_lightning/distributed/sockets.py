"""A folder in which processes can open sockets to each other: TMPDIR's name may be too long for that.

Of a socket's address 107 bytes are left, and jobs on clusters have long TMPDIRs; some file systems have no sockets.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from multiprocessing.connection import Listener
from multiprocessing.util import Finalize

ELSEWHERE = ("/tmp", "/var/tmp", "/dev/shm")


def without_sockets() -> str | None:
    """Why multiprocessing cannot open sockets here, neither in TMPDIR nor ELSEWHERE; None where it can from now on."""
    fault = _fault()
    if fault is None:
        return None
    kept: dict[str, str] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    for place in ELSEWHERE:
        try:
            folder = tempfile.mkdtemp(prefix="pymp-", dir=place)
        except OSError:
            continue
        kept["tempdir"] = folder  # where multiprocessing.util.get_temp_dir looks first
        if _fault() is None:
            Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
            return None
        del kept["tempdir"]
        shutil.rmtree(folder, ignore_errors=True)
    return fault


def _fault() -> str | None:
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        return str(error)
    return None
