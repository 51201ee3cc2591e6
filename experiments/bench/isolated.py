"""Calling a function in a fresh process that has the heavy imports already, so that no contender inherits another's
memory maps, threads or memory."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

# a child finds its main module among those that the server has imported, and Python remarks on it
warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)

CONTEXT = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Begin the server, which imports in the background the main module and those of ``modules`` that are installed."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    CONTEXT.set_forkserver_preload([*modules, *([main.name] if main else [])])
    forkserver.ensure_running()


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a child of the server; both must be picklable.

    An ImportError is raised here as such, any other failure as RuntimeError with the child's traceback.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    usual = multiprocessing.get_start_method()  # of the contender's own workers
    child = CONTEXT.Process(target=_call, args=(sender, usual, function, args))
    child.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"The process that ran {function.__name__}{args} died with code {child.exitcode}.") from None
    finally:
        receiver.close()
    child.join()
    if kind == "missing":
        raise ImportError(value)
    if kind == "failed":
        raise RuntimeError(f"{function.__name__}{args} failed in its process:\n{value}")
    return value


def _call(sender: Connection, start_method: str, function: Callable[..., Any], args: tuple) -> None:
    multiprocessing.set_start_method(start_method, force=True)
    try:
        sender.send(("done", function(*args)))
    except ImportError as error:
        sender.send(("missing", str(error)))
    except Exception:
        sender.send(("failed", traceback.format_exc()))
    finally:
        sender.close()
