"""Time the analyses of a run: `python -m experiments.benchmark analysis`.

A run of configs/mnist5k.py with trainings of one epoch is analysed repeatedly.
"""

import contextlib
import io
import shutil
import tempfile
import time

import jax

from experiments.benchmarks.tables import print_quantities
from experiments.sweeps.runs import load_config
from imp_jax import analysis, connectivity, runs, training
from imp_jax.experiment import setup


def benchmark_analysis(rounds: int, repeats: int) -> None:
    """Time all analyses of a run of 3 replicates, and a path between two of its networks; print the table."""
    config = load_config("mnist5k")
    config.rounds, config.epochs = rounds, 1
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        runs.run(config, workdir)
        analyses = []
        for _ in range(1 + repeats):
            shutil.rmtree(f"{workdir}/analysis", ignore_errors=True)
            start = time.perf_counter()
            analysis.run(workdir)
            analyses.append(time.perf_counter() - start)
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
            "a path of 20 points over one evaluation": (ratios[1:], "{:.1f}"),
        },
    )
