"""The analysis agreement: whether networks give the same classes, and what their ensembles gain."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Int

from imp_jax import figures, training
from imp_jax.analysis.distances import is_compared
from imp_jax.analysis.registry import RunInputs, complete_rows, register
from imp_jax.data import Split
from imp_jax.figures import LABELS, STYLES, Figure
from imp_jax.members import Member
from imp_jax.runtime.execution import vmap_or_unroll_members
from imp_jax.similarity import ensemble_accuracy, prediction_agreement
from imp_jax.training import TrainSpec, Variables

_KEYS = ("replicate", "arm", "round_a", "replicate_b", "arm_b", "round_b")
_KINDS = ("Successive rounds", "Replicates of an arm", "IMP and another arm")
_TWIN_STYLE = {**STYLES["imp"], "linestyle": ":", "markerfacecolor": "white"}


def compute_agreement(inputs: RunInputs) -> list[tuple]:
    """Compare the predictions of pairs of networks on the test set (Evci et al. 2020b).

    The pairs are: two rounds of a member; and in each round, replicates of an arm, and imp with its twin and
    with each other arm of its replicate. Twins are only compared with imp. With `keep_checkpoints=ends`, two
    rounds are compared if they are adjacent or one is round 0.

    Columns:
      replicate, arm, round_a: the first network.
      replicate_b, arm_b, round_b: the second network.
      agreement: the share of test images to which both give the same class.
      ensemble_accuracy: test accuracy of the mean of their softmax probabilities.
      mean_accuracy: mean of their two test accuracies.

    The last three are in [0, 1], and nan for networks whose logits are nan.
    """
    return complete_rows(inputs, "agreement", _list_pairs(inputs), functools.partial(_compare_pairs, inputs))


def _list_pairs(inputs) -> Iterator[tuple]:
    """Yield the key of each pair whose networks are on disk."""
    rounds = sorted(inputs.rounds.items())
    for (a, members), (b, others) in itertools.combinations_with_replacement(rounds, 2):
        if is_compared(inputs.config, a, b):
            pairs = _pairs_in_round(members) if a == b else _same_members(members, others)
            for first, second in pairs:
                yield first.replicate, first.arm, a, second.replicate, second.arm, b


def _same_members(members, others):
    return [(member, member) for member in members if member.arm != "twin" and member in others]


def _pairs_in_round(members):
    members = sorted(members, key=lambda member: (member.arm != "imp", member))  # imp first
    for first, second in itertools.combinations(members, 2):
        are_replicates = first.arm == second.arm != "twin"
        if are_replicates or (first.arm == "imp" and first.replicate == second.replicate):
            yield first, second


def _compare_pairs(inputs, keys) -> dict[tuple, list[float]]:
    """Return the values of each pair, except those with a network that cannot be read."""
    rounds = {number for key in keys for number, _ in _networks_of(key)}
    networks = {number: inputs.load_round(number) for number in sorted(rounds)}
    names = [(number, member) for number, members in networks.items() for member in members]
    positions = {name: position for position, name in enumerate(names)}
    readable = [key for key in keys if all(name in positions for name in _networks_of(key))]
    if not readable:
        return {}
    pairs = np.array([[positions[name] for name in _networks_of(key)] for key in readable])
    groups = [
        tuple(network.variables for network in members.values()) for members in networks.values() if members
    ]
    test = inputs.experiment.dataset.test
    counts, correct = np.zeros(pairs.shape), np.zeros(len(names))
    for logits, labels in _logits_by_batch(groups, test, inputs.experiment.spec):
        shares, accuracies = _compare(logits, labels, pairs)
        # rounded, because shares in float32 times the number of examples are nearly integers
        counts += np.rint(len(labels) * np.asarray(shares, float))
        correct += np.rint(len(labels) * np.asarray(accuracies, float))
    values = np.column_stack([counts, correct[pairs].mean(1)]) / test.examples
    return dict(zip(readable, values.tolist(), strict=True))


def _networks_of(key):
    """Return the round and member of both networks of a pair."""
    replicate, arm, round_a, replicate_b, arm_b, round_b = key
    return (round_a, Member(arm, replicate)), (round_b, Member(arm_b, replicate_b))


def _logits_by_batch(
    groups: Sequence[tuple[Variables, ...]], split: Split, spec: TrainSpec
) -> Iterator[tuple[Float[Array, "networks batch classes"], Int[Array, " batch"]]]:
    """Yield the logits of all networks, and the labels, for one batch of the split after the other.

    A split is decoded once, and memory holds the logits of one batch only. Networks of a group are evaluated
    together.
    """
    batch_size = min(split.evaluation_batch_size, split.examples)
    batches, numbers = split.evaluation(batch_size, None), range(-(-split.examples // batch_size))
    apply_to_batch = training.programs(spec.execution.unroll).apply_to_batch
    for number, batch in zip(numbers, batches.one_by_one(), strict=False):
        logits = [apply_to_batch(_apply_networks, networks, batch, number, spec=spec) for networks in groups]
        _, labels, valid = batch.load(number)
        count = int(np.sum(valid))  # padding comes last
        yield jnp.concatenate(logits)[:, :count], labels[:count]


def _apply_networks(networks, images, labels, valid, *, spec):
    """Compute the logits of each network: [networks, batch, classes]."""
    del labels, valid
    apply = functools.partial(spec.apply, train=False)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    return vmap_or_unroll_members(apply, (0, None), spec.execution)(stacked, images)


@jax.jit
def _compare(
    logits: Float[Array, "networks batch classes"], labels: Int[Array, " batch"], pairs: Int[Array, "pairs 2"]
) -> tuple[Float[Array, "pairs 2"], Float[Array, " networks"]]:
    """Compute the agreement and the ensemble accuracy of each pair, and the accuracy of each network."""

    def compare_pair(pair):
        return jnp.stack([prediction_agreement(*logits[pair]), ensemble_accuracy(logits[pair], labels)])

    def accuracy(network):
        return ensemble_accuracy(network[None], labels)

    # one after the other: the probabilities of all ensembles at once may not fit in memory
    return jax.lax.map(compare_pair, pairs), jax.lax.map(accuracy, logits)


@figures.use_default_style
def draw_agreement(run: Any) -> Figure | None:
    """Draw the agreement of pairs of networks, and what their ensembles gain, over density.

    A column shows one kind of pair; None for a run without pairs.

    Args:
      run: an `analysis.Run`.
    """
    table = _describe_pairs(run)
    kinds = [kind for kind in _KINDS if (table["kind"] == kind).any()]
    if not kinds:
        return None
    figure = Figure(figsize=(0.6 + 2.7 * len(kinds), 5.2), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
    lines = {}
    for column, kind in zip(panels.T, kinds, strict=True):
        column[0].set_title(kind, fontsize="medium")
        for arm, rows in table[table["kind"] == kind].groupby("arm_b", observed=True):
            style = _TWIN_STYLE if arm == "twin" else STYLES.get(arm, {})
            for axes, value in zip(column, ("agreement", "gain"), strict=True):
                figures.draw_mean(axes, rows, value, 100, label=_name_of(arm), **style)
            lines[_name_of(arm)] = column[0].containers[-1]
        for axes in column:
            figures.density_axis(axes, table["density"].min())
        column[0].set_xlabel("")
        column[1].axhline(0, color="black", linewidth=0.8, zorder=1)
    panels[0, 0].set_ylabel("Same class (% of test images)")
    panels[1, 0].set_ylabel("Gain of the ensemble\n(points of test accuracy)")
    figures.label_below(figure, lines)
    return figure


def describe_agreement(run: Any) -> str:
    """Return the sentence of the report, for the round nearest to a density of 10 %, with a twin if one has.

    Args:
      run: an `analysis.Run`.
    """
    table = _describe_pairs(run).dropna(subset=["agreement", "gain"])
    if table.empty:
        return ""
    table = table[table["arm"] == table["arm"].min()]  # imp, except in a branch without it
    if (table["arm_b"] == "twin").any():
        table = table[table["round_b"].isin(table["round_b"][table["arm_b"] == "twin"])]
    density = figures.nearest_density(table["density"])
    pairs = table[table["density"] == density].groupby(["kind", "arm_b"], observed=True)
    names = {_KINDS[0]: "successive rounds of {}", _KINDS[1]: "replicates of {}", _KINDS[2]: "IMP and {}"}
    parts = [
        f"{100 * means.agreement:.1f} % and {100 * means.gain:+.2f} points for "
        f"{names[kind].format(_name_of(arm))}"
        for (kind, arm), means in pairs[["agreement", "gain"]].mean().iterrows()
    ]
    return (
        f"At {100 * density:.3g} % density, the share of test images with the same class and the gain of the "
        f"ensemble are {', '.join(parts)}."
    )


def _name_of(arm):
    return "twin (other data order)" if arm == "twin" else LABELS.get(arm, arm)


def _describe_pairs(run) -> pd.DataFrame:
    """Return the pairs of a round or of adjacent rounds, with their kind, density, and gain of the ensemble."""
    table = run.agreement
    table = table[table["round_b"] - table["round_a"] <= 1]
    kinds = np.select(
        [table["round_a"] < table["round_b"], table["arm"] == table["arm_b"]], _KINDS[:2], _KINDS[2]
    )
    arms = pd.CategoricalDtype(run.results["arm"].unique(), ordered=True)  # for the order of lines
    return table.assign(
        arm=table["arm"].astype(arms),
        arm_b=table["arm_b"].astype(arms),
        kind=pd.Categorical(kinds, _KINDS, ordered=True),
        density=table["round_b"].map(figures.densities(run.results)).astype(float),
        gain=table["ensemble_accuracy"] - table["mean_accuracy"],
    ).query("density > 0")


register(
    "agreement",
    compute_agreement,
    columns=(*_KEYS, "agreement", "ensemble_accuracy", "mean_accuracy"),
    needs="run",
    description="share of test images to which two networks give the same class, test accuracy of their "
    "ensemble, and mean of their test accuracies (all from 0 to 1); for two rounds of a member and, within a "
    "round, for replicates of an arm and for `imp` with its twin and with other arms",
    figure=draw_agreement,
    caption="Share of test images to which two networks give the same class, and how much more accurate the "
    "mean of their probabilities is than they are on average; mean of the pairs, bars from minimum to maximum.",
    sentence=describe_agreement,
)
