"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = "slurm-wlm munge"
CONF = """ClusterName=sae
SlurmctldHost={host}
SlurmctldAddr=127.0.0.1
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=30
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs={cpus} RealMemory={memory}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs={cpus} RealMemory={memory}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The daemons that are not installed."""
    return [name for name in DAEMONS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    """PATH with the folders of daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start the daemons with all their files in ``folder``, name them in SLURM_CONF, and stop them at the end.

    To be called as root, as slurmd must be. RuntimeError with the end of the logs when the nodes do not come up.
    """
    os.environ["PATH"] = search_path()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    port, port1, port2 = free_ports(3)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2
    (folder / "slurm.conf").write_text(
        CONF.format(
            host=socket.gethostname().split(".")[0], port=port, port1=port1, port2=port2, folder=folder, user="root",
            cpus=os.cpu_count(), memory=memory,
        ),
        encoding="utf-8",
    )  # fmt: skip
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n", encoding="utf-8")
    try:
        start(
            "munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        start("slurmctld", "-c")
        for node in ("node1", "node2"):
            start("slurmd", "-N", node)
        deadline = time.monotonic() + 60
        while said("sinfo", "-h", "-o", "%D %t") != "2 idle":
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{p.name}:\n{p.read_text(encoding='utf-8')[-1500:]}" for p in sorted(folder.glob("*.log"))
                )
                raise RuntimeError(f"The nodes did not come up within a minute.\n{logs}")
            time.sleep(0.5)
        yield
    finally:
        for name in ("slurmd-node1", "slurmd-node2", "slurmctld", "munged"):
            stop(folder / f"{name}.pid")


def start(*command: str) -> None:
    """Start a daemon, which goes to the background by itself."""
    subprocess.run(command, check=True)


def stop(pidfile: Path) -> None:
    """End the daemon that ``pidfile`` names and wait for it."""
    with suppress(OSError, ValueError):
        pid = int(pidfile.read_text(encoding="utf-8"))
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)


def said(*command: str) -> str:
    """What a command prints, without blanks around it; empty when it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
