"""One W&B run a training, which never holds the training up and goes on where an earlier attempt ended."""

from __future__ import annotations

import base64
import contextlib
import json
import netrc
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sae_lightning.saes.artefact import FILES

if TYPE_CHECKING:
    from wandb import Run

QUERY = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()

REMEMBERED = 600  # seconds for which a service that failed is not asked again

_failed: dict[tuple[str, str], tuple[float, str]] = {}  # by address and key: when, and what was wrong


def trouble(patience: float, own: Mapping[str, Any]) -> str:
    """Why no run can be logged online, as the first half of a sentence; empty where the service knows this login.

    The service has ``patience`` seconds to answer; that it failed is remembered, so that the trainings of a sweep, or
    those that share a process, do not wait for it each.
    """
    address, key = login(own)
    if not key:
        return "No W&B login found"
    when, what = _failed.get((address, key), (-REMEMBERED, ""))
    if time.monotonic() - when < REMEMBERED:
        return what
    what = _ask(address, key, patience)
    if what:
        _failed[address, key] = time.monotonic(), what
    return what


def remember(what: str, own: Mapping[str, Any]) -> None:
    """Take the service as failing for a while, because of ``what``."""
    _failed[login(own)] = time.monotonic(), what


def forget() -> None:
    """Ask again next time."""
    _failed.clear()


def own_settings(folder: str | Path) -> dict[str, Any]:
    """What W&B's environment variables and settings files say, by the names of ``wandb.Settings``.

    The files are ``wandb/settings`` in ``folder``, which ``wandb offline`` and ``wandb disabled`` write, and that of
    the user's.
    ValueError for what W&B does not understand.
    """
    import wandb

    made = wandb.Settings()
    made.quiet, made.root_dir = True, str(folder)
    made.settings_system = str(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    ours = {name: getattr(made, name) for name in ("quiet", "root_dir", "settings_system")}
    made.update_from_system_settings()
    made.update_from_env_vars(dict(os.environ))
    own = {name: getattr(made, name) for name in made.model_fields_set}
    return {name: value for name, value in own.items() if name not in ours or value != ours[name]}


def login(own: Mapping[str, Any]) -> tuple[str, str]:
    """Address of the service that ``own_settings`` name, and the key for it: theirs, or what ``wandb login`` stored."""
    import wandb

    address = str(own.get("base_url") or wandb.Settings().base_url)
    if own.get("api_key"):
        return address, str(own["api_key"])
    host = urlparse(address).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return address, ""
    return address, (found[2] or "") if found else ""


def _ask(address: str, key: str, patience: float) -> str:
    """What is wrong, in a thread of its own: looking up a host has no time limit."""
    found = [f"W&B at {address} does not answer within {patience:g} s"]

    def ask() -> None:
        found[0] = _answer(address, key, patience)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return found[0]


def _answer(address: str, key: str, patience: float) -> str:
    token = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    try:
        with urlopen(Request(f"{address.rstrip('/')}/graphql", QUERY, headers), timeout=patience) as reply:
            viewer = (json.load(reply).get("data") or {}).get("viewer")
        return "" if viewer else f"W&B at {address} does not know the API key"
    except HTTPError as error:
        if error.code in (401, 403):
            return f"W&B at {address} refuses the API key"
        return f"W&B at {address} answers with error {error.code}"
    except (OSError, ValueError, AttributeError) as error:
        return f"W&B at {address} does not answer ({getattr(error, 'reason', error)})"


STEP = "trainer/global_step"

PROJECT, PATIENCE, FINISH = "sae-lightning", 5, 60  # where neither the config nor W&B's own settings say it

OFFLINE = ("offline", "dryrun")

_open: set[str] = set()  # ids of the runs of this process

_named: dict[str, Path] = {}  # the training that had an id first

_starting = threading.Lock()  # trainings that share a process open their runs in threads


def open_run(
    options: Mapping[str, Any], folder: Path, config: Mapping[str, Any], tags: Sequence[str] = ()
) -> Run | None:
    """The W&B run of the training in ``folder``, whose name is its id; ``options`` are those of conf/logger/wandb.yaml.

    Options that are null are as W&B's own settings say. Online where these do not forbid it, ``options.offline`` is
    auto and the service answers; else offline, below ``folder``, with one line that says why and how to upload later.
    Several may be open in one process. None where W&B is disabled or cannot even write files. ConnectionError for
    ``offline: false`` where the service cannot be reached.
    """
    try:
        own = own_settings(options["folder"])
    except ValueError as error:
        print(
            f"{folder.name}: W&B's own settings make no sense to it ({_first_line(error)}): going on without.",
            flush=True,
        )
        return None
    mode = {True: "offline", False: "online"}.get(options["offline"], own.pop("mode", "online"))
    if mode == "disabled":
        print(f"{folder.name}: W&B is disabled by its own settings: going on without.", flush=True)
        return None
    settings = _settings(options, own, folder, tags)
    if mode not in OFFLINE:
        why = trouble(settings["init_timeout"], own)
        run = None
        if not why:
            run, why = _init("online", settings, folder, config, own)
        if run is not None:
            return run
        if options["offline"] is False:
            raise ConnectionError(f"{why}, but logger.wandb.offline=false; log in, or choose offline=auto.")
    else:
        why = "logger.wandb.offline=true" if options["offline"] is True else "W&B's own settings say offline"
    later = f"upload later with `wandb sync {settings['root_dir']}/wandb`"
    print(f"{folder.name}: {why}: logging offline; {later}.", flush=True)
    run, why = _init("offline", settings, folder, config, own)
    if run is None:
        print(f"{folder.name}: {why}: going on without; `evaluate.py logger=wandb` logs it later.", flush=True)
    return run


def _settings(options: Mapping[str, Any], own: Mapping[str, Any], folder: Path, tags: Sequence[str]) -> dict[str, Any]:
    """Fields of ``wandb.Settings``: what ``options`` give, else what is W&B's ``own``, else ours; tags are of all."""
    run_id = folder.name + options["suffix"]
    ours = {
        "project": PROJECT, "run_id": run_id, "run_name": run_id, "root_dir": str(folder), "silent": True,
        "console": "off", "init_timeout": PATIENCE, "finish_timeout": FINISH,
    }  # fmt: skip
    given = {
        "project": options["project"], "entity": options["entity"], "run_group": options["group"],
        "init_timeout": options["patience"], "finish_timeout": options["finish"],
        "run_id": options["suffix"] and run_id, "run_name": options["suffix"] and run_id,
    }  # fmt: skip
    made = ours | dict(own) | {name: value for name, value in given.items() if value not in (None, "")}
    if _named.setdefault(made["run_id"], folder) != folder:  # WANDB_RUN_ID is for one training, the first
        made["run_id"] = run_id
    return made | {"run_tags": tuple(dict.fromkeys((*tags, *own.get("run_tags", ()), *options["tags"])))}


def _init(
    mode: str, settings: Mapping[str, Any], folder: Path, config: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[Run | None, str]:
    """The run, or None and the reason."""
    import wandb

    try:
        made = wandb.Settings()
        made.update_from_dict({"resume": "allow" if mode == "online" else None} | dict(settings) | {"mode": mode})
        with _starting:
            run = wandb.init(config=dict(config), reinit="create_new", settings=made)
            _open.add(settings["run_id"])
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
    except Exception as error:  # whatever it is, it is no reason not to train
        _release(settings["run_id"])
        why = f"W&B failed to start a run ({_first_line(error)})"
        if mode == "online":
            remember(why, own)
        return None, why
    return run, ""


def _release(run_id: str) -> None:
    """Give up a run, and restart W&B's service, which may be dead or hold on to the id, unless others are open."""
    import wandb

    with _starting:
        _open.discard(run_id)
        if not _open:
            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class WandbRun(WandbLogger):
    """Lightning's logger around an open run.

    W&B's step is the trainer's; what a resumed training logs again is left out. After an error the run ends as failed.
    An error of W&B itself is said once and ends the logging, not the training.
    """

    def __init__(self, run: Run | None, folder: Path) -> None:
        super().__init__(experiment=run, save_dir=folder, project=run.project if run else None)
        self.run = run
        self.folder = folder

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.run is None or (step is not None and step < self.run.starting_step):
            return
        with self.forgiving("history.csv goes on"):
            self.run.log({**metrics} if step is None else {**metrics, STEP: step}, step=step)

    @contextlib.contextmanager
    def forgiving(self, rest: str) -> Iterator[None]:
        """An error of W&B's inside is said, with what is left, and ends the run, not the training."""
        try:
            yield
        except Exception as error:
            print(f"{self.folder.name}: W&B stopped logging ({_first_line(error)}); {rest}.", flush=True)
            run, self.run = self.run, None
            if run is not None:
                _release(run.id)

    def close(self, values: Mapping[str, Any], artefact: Mapping[str, Any] | None = None) -> None:
        """End the run of a finished training with ``values`` in its summary, and with the SAE where ``artefact`` is."""
        with self.forgiving(f"`evaluate.py logger=wandb` logs {self.folder.name} again"):
            if self.run is not None:
                self.run.summary.update(dict(values))
                if artefact is not None:
                    log_artefact(self.run, self.folder, {**self.run.config, **artefact})
        finish(self.run)
        self.run = None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "failed":
            finish(self.run, 1)
            self.run = None


def finish(run: Run | None, exit_code: int = 0) -> None:
    """End the run; at most ``logger.wandb.finish`` seconds of waiting for its uploads."""
    if run is not None:
        try:
            run.finish(exit_code)
            _open.discard(run.id)
        except Exception as error:
            sync = f"`wandb sync {run.settings.sync_dir}`"
            print(f"W&B did not finish ({_first_line(error)}); send the rest: {sync}.", flush=True)
            _release(run.id)


def log_artefact(run: Run, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Log ``sae.safetensors`` and ``cfg.json`` as an artifact of type sae."""
    import wandb

    artifact = wandb.Artifact(f"sae-{folder.name}", type="sae", metadata=dict(metadata))
    for name in (name for name in FILES if (folder / name).is_file()):
        artifact.add_file(str(folder / name), policy="immutable")  # not copied to a place in the home folder
    run.log_artifact(artifact)
