"""A real Slurm cluster of one node, on this machine; needs root and Debian's slurm-wlm and munge."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Describe why Slurm cannot run on this machine; "" if it can."""
    absent = [name for name in DAEMONS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if absent:
        return f"{', '.join(absent)} not installed; on Debian: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "its daemons must be started as root"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Start Slurm; yield the environment variables for its commands. Its daemons end with the context."""
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    port, slurmd_port = _free_ports(2)
    host, cpus = socket.gethostname().split(".")[0], os.cpu_count()
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, port=port, slurmd_port=slurmd_port, folder=folder, cpus=cpus)
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munge = f"--key-file={key} --socket={folder}/munge.socket --log-file={folder}/munge.log".split()
    munge += f"--pid-file={folder}/munge.pid --seed-file={folder}/munge.seed --force --foreground".split()
    daemons = []
    try:
        with open(folder / "output", "w") as output:
            for command in (["munged", *munge], ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
                options = {"env": os.environ | environment, "stdout": output, "stderr": output}
                daemons.append(subprocess.Popen(command, start_new_session=True, **options))
                if command[0] == "munged":
                    _wait_for((folder / "munge.socket").exists, "munged", folder)
        _wait_for(lambda: "idle" in _sinfo(environment), "the node", folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--me"], env=os.environ | environment, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _sinfo(environment):
    command = ["sinfo", "--noheader", "--format=%T"]
    listed = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return listed.stdout


def _wait_for(is_ready, name, folder, seconds=30):
    deadline = time.monotonic() + seconds
    while not is_ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in (folder / "output", *folder.glob("*.log")))
            raise TimeoutError(f"{name} of Slurm did not start:\n{logs}")
        time.sleep(0.2)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
