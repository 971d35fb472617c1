"""Estimate how long the paper's sweeps take on many devices, and what a member costs a device."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from experiments.paper import catalogue
from experiments.paper.networks import TABLE_1_CONFIGS
from experiments.paper.scales import PAPER
from experiments.sweeps import cost
from experiments.sweeps.networks import compute_variable_shapes
from experiments.sweeps.runs import Run, load_config
from imp_jax.experiment import make_optimizer

DEVICE_COUNTS = (1, 8, 64)


class Plan(NamedTuple):
    """How a sweep is distributed over devices."""

    seconds: float
    data: int  # the mesh of each run
    member: int
    concurrent_runs: int


class MemberSize(NamedTuple):
    """What one member of a config costs a device."""

    parameters: int
    state_bytes: int
    summed_bytes: int  # summed over devices in each step, if they divide a batch


def find_fastest_plan(runs: Sequence[Run], devices: int, device: dict, max_data: int = 1) -> Plan | None:
    """Find the fastest way to train `runs` of one network on `devices`.

    Each run has a mesh of its own, and as many runs are concurrent as there are meshes. A round takes as long
    as the device with the most members needs. The estimate is a lower bound: it assumes that dividing a batch
    has no overhead and that the input keeps up.

    Args:
      device: the throughput of one device, an entry of `cost.read_throughput`.
      max_data: the largest number of devices that may divide a batch.

    Returns: None if the network was not measured.
    """
    run_seconds = max((cost.estimate_seconds(run, device) or 0 for run in runs), default=0)
    if not run_seconds:
        return None
    run = max(runs, key=lambda run: cost.estimate_seconds(run, device))
    config = run.config
    members_per_round = [config.replicates * len(config.arms)] * config.rounds
    for number in set(config.instability.rounds):
        if number < config.rounds:
            members_per_round[number] += config.replicates  # twins
    plans = []
    for member in range(1, min(devices, max(members_per_round)) + 1):
        for data in range(1, min(max_data, devices // member) + 1):
            if config.batch_size % data:
                continue
            concurrent_runs = min(devices // (member * data), len(runs))
            turns = -(-len(runs) // concurrent_runs)
            members_per_device = sum(-(-members // member) for members in members_per_round)
            share = members_per_device / sum(members_per_round) / data
            plans.append(Plan(turns * share * run_seconds, data, member, concurrent_runs))
    return min(plans)


def print_plans() -> None:
    """Print the time of figure 1 and of the ResNet-50 table on 1, 8 and 64 devices of each measured kind."""
    title = "Time on 1, 8 and 64 devices (concurrent runs, mesh member × data of each)"
    table = Table("sweep", "batches", "device", *map(str, DEVICE_COUNTS), title=title)
    for name, max_data, batches in (
        ("fig1", 1, "whole"),
        ("fig1", max(DEVICE_COUNTS), "divided, at best"),
        ("tablec", 1, "whole"),
        ("tablec", max(DEVICE_COUNTS), "divided, at best"),
    ):
        runs = catalogue.FIGURES[name].runs(PAPER)
        for kind, device in cost.read_throughput().items():
            cells = []
            for count in DEVICE_COUNTS:
                plan = find_fastest_plan(runs, count, device, max_data)
                mesh = f" ({plan.concurrent_runs}, {plan.member} × {plan.data})" if plan else ""
                cells.append(f"{cost.format_duration(plan and plan.seconds)}{mesh}")
            table.add_row(f"{name}, {len(runs)} runs", batches, kind, *cells)
    Console(soft_wrap=True, width=160).print(table)


def print_member_sizes() -> None:
    """Print what a member of each config costs its device."""
    table = Table(
        "network",
        "parameters",
        "state (MB)",
        "summed over devices in a step (MB)",
        title="One member: memory on its device, and bytes summed in a step if devices divide its batch",
    )
    for name in TABLE_1_CONFIGS:
        size = compute_member_size(name)
        megabytes = (f"{count / 1e6:,.1f}" for count in (size.state_bytes, size.summed_bytes))
        table.add_row(name, f"{size.parameters:,}", *megabytes)
    Console(soft_wrap=True).print(table)


def compute_member_size(name: str) -> MemberSize:
    """Compute what a member of `configs/NAME.py` costs its device."""
    config = load_config(name)
    shapes = compute_variable_shapes(config)
    moments = jax.eval_shape(make_optimizer(config).init, shapes["params"])

    def count_bytes(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    statistics = {name: leaves for name, leaves in shapes.items() if name != "params"}
    # weights, moments, gradient and mask; the ticket stays on the host
    state_bytes = count_bytes(shapes) + count_bytes(moments) + count_bytes(shapes["params"]) + parameters
    summed_bytes = count_bytes(shapes["params"]) + count_bytes(statistics) + 8  # 8: loss and accuracy
    return MemberSize(parameters, state_bytes, summed_bytes)
