"""The command as a user types it, in a separate process."""

import subprocess
import sys

import pandas as pd

from tests.helpers import ROOT
from tests.helpers.commands import CONFIG, run


def test_help_does_not_import_jax():
    code = (
        "import runpy, sys; sys.argv = ['main', '--help']\n"
        "try: runpy.run_module('imp_jax.main', run_name='__main__')\n"
        "except SystemExit: sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--workdir" in done.stdout


def test_flags_override_config_fields(tmp_path, data_dir):
    code, out, err = run(
        CONFIG,
        f"--workdir={tmp_path}",
        f"--config.dataset.data_dir={data_dir}",
        "--config.rounds=2",
        "--config.epochs=1",
        "--config.batch_size=1000",
        "--config.replicates=1",
        "--config.arms=imp",
        "--config.rewind_step=None",
        "--config.optimizer.name=momentum",
        "--config.optimizer.schedule=step",
        "--config.optimizer.milestones=(0.5,)",
        "--config.optimizer.warmup_epochs=1",
    )
    assert code == 0, err
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2
    assert "Test accuracy in %" in out
    assert f"report:  {tmp_path / 'report.html'}" in out  # the command runs the analyses after the training
    assert set(pd.read_csv(tmp_path / "analysis" / "barriers.csv")["round"]) == {1}
