"""Time the analyses of a run: `python -m experiments.benchmark analysis`.

A run of configs/mnist5k.py with trainings of one epoch is analysed repeatedly.
"""

import contextlib
import io
import shutil
import tempfile
import time
from pathlib import Path

import jax

from experiments.benchmarks.tables import print_quantities
from experiments.sweeps.runs import load_config
from imp_jax import analysis, connectivity, runs, training
from imp_jax.experiment import setup
from imp_jax.workdir.checkpoints import Checkpoints
from imp_jax.workdir.lock import stored_config
from imp_jax.workdir.results import read_results

# settings of analyses on request: little work, in rounds and epochs that every run of the benchmark has
ON_REQUEST = {
    "noise": {"analysis.noise_rounds": (0,), "analysis.noise_epochs": (0, 1)},
    "instability": {"instability.rounds": (1,), "instability.steps": (0, 30)},
}


def benchmark_analysis(rounds: int, repeats: int) -> None:
    """Time all analyses of a run of 3 replicates, each of them alone, and a path between two networks.

    Those on request are timed too, with the settings `ON_REQUEST`.
    """
    config = load_config("mnist5k")
    config.rounds, config.epochs = rounds, 1
    config.evaluate_epochs = True  # the analysis learning reads them
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        runs.run(config, workdir)
        analyses = []
        for _ in range(1 + repeats):
            shutil.rmtree(f"{workdir}/analysis", ignore_errors=True)
            start = time.perf_counter()
            analysis.run(workdir)
            analyses.append(time.perf_counter() - start)
        alone = {name: _time_alone(name, workdir, repeats) for name in analysis.ANALYSES}
        networks = analysis.load(workdir).round(rounds - 1).trained
    first, *analyses = analyses

    experiment = setup(config, use_mesh=False)
    split, spec = experiment.dataset.train, experiment.spec
    start_network, end_network = (jax.tree.map(lambda leaf, i=i: leaf[i], networks) for i in (0, 1))
    one_member = jax.tree.map(lambda leaf: leaf[:1], networks)
    ratios = []
    for _ in range(1 + 10 * repeats):
        start = time.perf_counter()
        jax.block_until_ready(training.evaluate(one_member, split, spec=spec))
        evaluated = time.perf_counter()
        connectivity.path_metrics(start_network, end_network, split, spec=spec, num_points=20)
        ratios.append((time.perf_counter() - evaluated) / (evaluated - start))
    print_quantities(
        f"analyses of configs/mnist5k.py with 1 epoch, {len(experiment.members)} members, {rounds} rounds",
        {
            "all analyses, figures and report (s)": (analyses, "{:.1f}"),
            "the first time, compilation included (s)": ([first], "{:.1f}"),
            **{
                f"{name}{', on request' if analysis.ANALYSES[name].cost else ''} (s)": (seconds, "{:.1f}")
                for name, seconds in alone.items()
            },
            "a path of 20 points over one evaluation": (ratios[1:], "{:.1f}"),
        },
    )


def _time_alone(name: str, workdir: str, repeats: int) -> list[float]:
    """Time the computation of one table, with the reading of its networks; the first call compiles."""
    config = stored_config(Path(workdir))
    if analysis.ANALYSES[name].cost:
        config.analysis.also, repeats = (name,), 1
        config.update_from_flattened_dict(ON_REQUEST.get(name, {}))
    experiment = setup(config, use_mesh=False)
    seconds = []
    for _ in range(1 + repeats):
        Path(workdir, "analysis", f"{name}.csv").unlink(missing_ok=True)
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            results = read_results(Path(workdir))
            start = time.perf_counter()
            analysis.compute(checkpoints, config, lambda: experiment, Path(workdir), results)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]
