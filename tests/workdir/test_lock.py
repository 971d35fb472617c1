"""The lock of a workdir, and which workdirs are refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from filelock import FileLock

from imp_jax import config as configs
from imp_jax.errors import UserError
from imp_jax.workdir.lock import open_workdir


def open_and_close(path, config):
    with open_workdir(path, config) as workdir:
        return workdir


def test_a_workdir_refuses_another_config(tmp_path):
    config = configs.default()
    workdir = open_and_close(tmp_path / "a" / "b", config)
    assert json.loads((workdir / "config.json").read_text())["pruning"] == {
        "score": "magnitude",
        "fraction": 0.2,
        "exclude": [],
        "images": 256,
        "scope": "global",
        "layer_factors": [],
        "network": "trained",
        "steps": 1,
        "policy": "fixed",
        "fractions": [0.2, 0.36, 0.488, 0.5904],
        "barrier": 0.02,
    }
    open_and_close(workdir, config)
    config.rounds = 3
    stored = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a run of another config: rounds is 25 there and 3 here"):
        open_and_close(workdir, config)
    assert (workdir / "config.json").read_bytes() == stored


def test_unusable_workdirs_are_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "run"):
        with pytest.raises(UserError, match="cannot write to workdir"):
            open_and_close(path, configs.default())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.csv").touch()
    with pytest.raises(UserError, match=r"holds results but no config.json"):
        open_and_close(tmp_path / "foreign", configs.default())
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["results.csv"]
    for content in ("{", "[]"):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "config.json").write_text(content)
        with pytest.raises(UserError, match="cannot read"):
            open_and_close(tmp_path / "damaged", configs.default())


def test_a_workdir_has_one_writer(tmp_path):
    with (
        open_workdir(tmp_path, configs.default()),
        pytest.raises(UserError) as error,
    ):
        open_and_close(tmp_path, configs.default())
    assert str(error.value).startswith(f"process {os.getpid()} on {socket.gethostname()} is writing to")
    open_and_close(tmp_path, configs.default())  # the lock is released


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    code = (
        "import os, signal; from imp_jax import config; from imp_jax.workdir.lock import open_workdir\n"
        f"with open_workdir({str(tmp_path)!r}, config.default()):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / ".holder").exists()
    open_and_close(tmp_path, configs.default())
    assert not (tmp_path / ".holder").exists()


def test_a_briefly_held_lock_does_not_stop_a_run(tmp_path):
    """`experiments.run status` takes the lock for an instant, to see whether it is free."""
    lock = FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    release = threading.Timer(0.3, lock.release)
    release.start()
    open_and_close(tmp_path, configs.default())
    release.join()


def test_a_path_that_orbax_cannot_read_back_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"with \[ in it, which Orbax cannot read back"):
        open_and_close(tmp_path / "try[1]", configs.default())
    assert not any(tmp_path.iterdir())
