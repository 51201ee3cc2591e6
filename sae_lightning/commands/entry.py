"""What the six Hydra commands share: settings are checked before heavy imports, and mistakes are sentences.

``HYDRA_FULL_ERROR=1`` shows the traceback of every error.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sae_lightning.registry import import_plugins

if TYPE_CHECKING:
    from omegaconf import DictConfig

Work = Callable[["DictConfig"], None]


def command(name: str, config_name: str | None = None) -> Callable[[Work], Callable[[], None]]:
    """Make the decorated ``work(cfg)`` the command ``name``, whose settings are in ``conf/<config_name>.yaml``.

    ``work`` imports what it needs itself, so that ``--help`` and a mistake in a setting answer at once.
    """

    def decorate(work: Work) -> Callable[[], None]:
        @functools.wraps(work)
        def task(cfg: DictConfig) -> None:
            from hydra.core.hydra_config import HydraConfig
            from hydra.types import RunMode

            from sae_lightning.settings.check import check_settings
            from sae_lightning.settings.places import check_devices, check_places

            hydra = HydraConfig.get()
            with told(name, end=hydra.mode == RunMode.RUN):
                import_plugins()  # here too, as this may be another process than that which composed the config
                check_settings(name, cfg, hydra)
                from sae_lightning.commands.paths import started  # with PyTorch

                cfg = started(cfg)
                check_places(name, cfg)
                check_devices(cfg)
                work(cfg)

        task.command = name  # type: ignore[attr-defined]  # for sweepers, which check all jobs before any of them

        @functools.wraps(work)
        def main() -> None:
            try:
                run(task, name, config_name or name)
            except KeyboardInterrupt:
                if _full():
                    raise
                print(f"{name}: stopped by Ctrl-C; what is finished is kept.", file=sys.stderr, flush=True)
                sys.exit(128 + signal.SIGINT)

        return main

    return decorate


def run(task: Work, name: str, config_name: str) -> None:
    """Run ``task`` as Hydra's main function on what was typed."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        from sae_lightning.commands.help import help_of

        print(help_of(name, config_name, task.__doc__ or sys.modules[task.__module__].__doc__ or "", sys.argv[1:]))
        return
    import hydra
    from hydra._internal import utils

    from sae_lightning.commands.help import CONF

    with told(name, end=True):
        import_plugins()
        check_own_folder()
    sys.argv[1:] = [as_typed(argument, name) for argument in sys.argv[1:]]
    original: Callable[[Callable[[], Any]], Any] = utils.run_and_report

    def report(step: Callable[[], Any]) -> Any:
        """Hydra's own, with our sentence for what goes wrong while a config is composed."""
        with told(name, end=True):
            return step()

    utils.run_and_report = original if _full() else report  # type: ignore[assignment]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()
    finally:
        utils.run_and_report = original  # type: ignore[assignment]


def check_own_folder() -> None:
    """ValueError where the folder of ``--config-dir`` has a file that is named like one of ours which it would hide."""
    from sae_lightning.commands.help import CONF, own_folder

    own = own_folder()
    if own is None or own.resolve() == CONF.resolve():
        return
    hidden = sorted(path.name for path in CONF.glob("*.yaml") if (own / path.name).is_file())
    if hidden:
        raise ValueError(f"{own}/{hidden[0]} is named like one of ours, which it would hide; give it another name.")


@contextmanager
def told(name: str, end: bool) -> Iterator[None]:
    """Turn an error that a sentence explains into that sentence: with ``end`` on stderr and exit status 1, else as an
    exception that Hydra shows without a traceback. Other errors are let through."""
    from hydra.errors import CompactHydraException

    from sae_lightning.commands.sentences import sentence_of

    try:
        yield
    except Exception as error:
        said = None if _full() else sentence_of(error, name)
        if said is None:
            raise
        if end:
            print(said, file=sys.stderr, flush=True)
            sys.exit(1)
        raise CompactHydraException(said) from None


def _full() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def as_typed(argument: str, name: str) -> str:
    """``argument`` in quotes of Hydra's where it is a text (a pattern, a path) that Hydra's grammar does not take.

    So ``runs='batchtopk-[cd]*'`` works as the shell gives it. Options of the Trainer may always be given with a plus,
    which Hydra wants only where conf does not name it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from sae_lightning.settings.names import takes_text

    if argument.startswith("+trainer."):
        argument = f"+{argument}"
    found = re.fullmatch(r"(\+{0,2}([\w.]+)=)(.*)", argument, re.DOTALL)
    if found is None or not takes_text(found[2], name):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        value = found[3].replace("\\'", "\\\\'").replace("'", "\\'")
        return f"{found[1]}'{value}'"
    return argument
