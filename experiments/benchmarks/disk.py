"""Measure the size of checkpoints: `python -m experiments.benchmark disk`.

Networks of random weights are saved as the rounds of each config of table 1 would be.
"""

import contextlib
import os
import tempfile

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from experiments.paper.networks import TABLE_1_CONFIGS
from experiments.sweeps.networks import compute_variable_shapes
from experiments.sweeps.runs import load_config
from imp_jax import divergence, masking, training
from imp_jax.experiment import make_optimizer
from imp_jax.workdir.checkpoints import Checkpoints, MidRoundState, RoundNetworks

SHOWN_ROUNDS = (0, 5, 10, 20)


def benchmark_disk(rounds: int) -> None:
    """Save checkpoints of each config, pruned by 20 % per round, and print their sizes."""
    shown = [number for number in SHOWN_ROUNDS if number < rounds]
    headings = [*(f"round {number}" for number in shown), f"{rounds} rounds", "state within a round"]
    table = Table("MB", "members", *headings)
    rng = np.random.default_rng(0)
    for name in TABLE_1_CONFIGS:
        config = load_config(name)
        members = config.replicates * len(config.arms)
        sizes, state = measure_checkpoints(config, members, rounds, rng)
        cells = [*(sizes[number] for number in shown), sum(sizes), state]
        table.add_row(name, str(members), *(f"{megabytes:,.1f}" for megabytes in cells))
    Console(soft_wrap=True).print(table)


def measure_checkpoints(
    config: ConfigDict, members: int, rounds: int, rng: np.random.Generator
) -> tuple[list[float], float]:
    """Return the MB of each round's checkpoint, and those of the state saved within a round."""
    shapes = compute_variable_shapes(config)

    def draw_tree(draw, tree):
        return jax.tree.map(lambda leaf: jax.numpy.asarray(draw((members, *leaf.shape))), tree)

    initial, trained = (draw_tree(lambda s: rng.normal(size=s).astype(np.float32), shapes) for _ in range(2))
    mask, prunable = masking.ones_like(initial["params"]), masking.prunable(shapes["params"])
    sizes = []
    for number in range(rounds):
        if number:
            survive = draw_tree(lambda s: rng.random(s) < 0.8, shapes["params"])
            mask = jax.tree.map(lambda m, s, p: m & s if p else m, mask, survive, prunable)
        ticket, optimum = ({**v, "params": masking.apply(v["params"], mask)} for v in (initial, trained))
        with tempfile.TemporaryDirectory() as workdir:
            os.mkdir(f"{workdir}/checkpoints")
            with contextlib.closing(Checkpoints(workdir)) as checkpoints:
                next_masks = jax.tree.map(lambda leaf: leaf[: config.replicates], mask)
                checkpoints.save(number, RoundNetworks(ticket, optimum, mask), [], next_masks=next_masks)
                sizes.append(folder_megabytes(f"{workdir}/checkpoints"))
                if number == 0:
                    states = training.init_states(
                        optimum, mask, spec=training.TrainSpec(None, make_optimizer(config))
                    )
                    history = divergence.init_history(members)
                    checkpoints.save_progress(0, MidRoundState(1, ticket, states, history, 0.0), steps=2)
                    state = folder_megabytes(f"{workdir}/progress")
    return sizes, state


def folder_megabytes(folder: str) -> float:
    """Return the MB of all files in a folder."""
    files = (f"{parent}/{name}" for parent, _, names in os.walk(folder) for name in names)
    return sum(os.path.getsize(path) for path in files) / 1e6
