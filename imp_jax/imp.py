"""Iterative magnitude pruning: train → record → prune → rewind, round after round (section 2.1).

What is trained in a round is a member, one (arm, replicate) pair: `imp` is the ticket itself, `reinit` the
control, a different random initialisation under the same mask.
In the rounds of `instability.rounds` a `twin` of each ticket trains beside them, with other data order and
augmentation; it leaves a checkpoint and rows of results, and no trace in later rounds.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float
from ml_collections import ConfigDict

from imp_jax import config as configs
from imp_jax import data, figures, masking, models, pruning, records, repulsion, training
from imp_jax.checkpoints import Checkpoints, Round
from imp_jax.config import UserError, choose
from imp_jax.masking import Mask
from imp_jax.members import (
    ARMS,
    Member,
    member_keys,
    members_of,
    where_member,
    with_twins_as_imp,
    without_twins,
)
from imp_jax.repulsion import Optima
from imp_jax.training import Metrics, Variables


class Experiment(NamedTuple):
    """Everything a round needs that no round changes."""

    config: ConfigDict
    members: tuple[Member, ...]
    dataset: data.Dataset  # on the device, unless it is streamed
    recipe: training.Recipe
    score: Callable[..., pruning.Scores]
    learning_rates: Float[np.ndarray, "epochs steps"]


def run(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Train all rounds of `config` into `workdir` and print a summary; `rounds` says what may be raised."""
    trained = sum(1 for _ in rounds(config, workdir))
    if not trained:
        print(f"{workdir} is finished: all {config.rounds} rounds were there, nothing to do")
    workdir = Path(workdir)
    records.print_summary(pd.read_csv(workdir / "results.csv"))
    print(f"results: {workdir / 'results.csv'}")


def rounds(config: ConfigDict, workdir: str | os.PathLike) -> Iterator[list[records.Row]]:
    """The rounds of `config` that `workdir` lacks: each one's rows of results.csv, once it is safely on disk.

    Raises, when the first round is asked for or later:
      UserError: anything wrong with the config, the data or the workdir, before any training and with
        nothing overwritten; a loss that is not finite, with all earlier rounds kept.
    """
    experiment = setup(config)
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(records.open_workdir(workdir, config))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
        finished = checkpoints.rounds()
        results = records.Results(workdir, [row for number in finished for row in checkpoints.rows(number)])
        if finished:
            refresh_figure(results, workdir)  # a run that died may not have come to it
        if len(finished) == config.rounds:
            return
        if finished:
            print(f"{workdir} has rounds 0 to {finished[-1]}; going on with round {finished[-1] + 1}")
            last = checkpoints.restore(finished[-1])
            with_twins = in_round(experiment, finished[-1])
            masks, _ = prune(with_twins, finished[-1], last)
            tickets = reset(with_twins, last)
            optima = recall(experiment, map(checkpoints.restore, finished), masks)
        else:
            tickets = initialize(experiment)
            masks = masking.ones_like(tickets["params"])
            optima = None
        print(_in_words(experiment, tickets["params"]))
        first = len(finished)
        events = records.Events(workdir, experiment.members, first_epoch=first * config.epochs + 1)
        stack.enter_context(contextlib.closing(events))
        display = stack.enter_context(records.Display(config.rounds, config.epochs, first))
        recorder = stack.enter_context(ThreadPoolExecutor(max_workers=1))

        recorded = None

        def on_epoch(number, epoch, metrics, seconds):
            if recorded and recorded.done():
                recorded.result()  # not to train on where nothing can be kept
            done = number * config.epochs + epoch + 1
            loss, accuracy = (metric.mean(0)[: len(experiment.members)] for metric in metrics)  # without twins
            events.write(done, epoch_loss=loss, epoch_accuracy=accuracy)
            display.epoch(number, epoch, metrics.loss.size * config.batch_size, seconds)

        def record(number, networks, rows):
            try:
                checkpoints.save(number, networks, rows)
                results.append(rows)
                refresh_figure(results, workdir)
                events.write((number + 1) * config.epochs, **_columns(rows[: len(experiment.members)]))
                events.flush()
            except Exception as error:  # a full disk is an OSError to some writers, and not to others
                raise UserError(
                    f"cannot record round {number} in {workdir}: {data.in_one_line(error)}; the rounds before "
                    f"it are kept, and once that is mended the same command goes on"
                ) from error
            images = len(rows) * experiment.learning_rates.size * config.batch_size
            display.round(number, rows, images)
            return rows

        for number in range(first, config.rounds):
            start = time.perf_counter()
            with_twins = in_round(experiment, number)
            try:
                networks = train(
                    with_twins, number, tickets, masks, optima, functools.partial(on_epoch, number)
                )
                seconds = time.perf_counter() - start
                masks, thresholds = prune(with_twins, number, networks)
                tickets = reset(with_twins, networks)
                rows = measure(with_twins, number, networks, thresholds, seconds, optima)
                if number + 1 < config.rounds:
                    optima = remember(experiment, optima, networks, masks)
            except UserError:
                if recorded:
                    recorded.result()  # a round that could not be recorded is the graver news
                raise
            if recorded:
                yield recorded.result()
            recorded = recorder.submit(record, number, networks, rows)  # while the next round trains
        yield recorded.result()


def refresh_figure(results: records.Results, workdir: Path) -> None:
    """Draw figures/accuracy.png anew."""
    figure = figures.to_bytes(figures.accuracy(results.table()))
    records.write_atomically(workdir / "figures" / "accuracy.png", figure)


def setup(config: ConfigDict) -> Experiment:
    """Check `config` and load what it names.

    Raises:
      UserError: see `config.validate`; an unknown name; a set that is absent or smaller than a batch; a
        rewind step beyond the training.
    """
    configs.validate(config)
    arms = set(map(str, config.arms))
    if not {"imp"} <= arms <= {"imp", "reinit"} or len(arms) < len(config.arms):
        raise UserError(
            f"arms is {config.arms}; it should hold imp, whose masks all arms use, and reinit or not, none "
            f"twice, written as ('imp', 'reinit'); the rounds of twins are in instability.rounds"
        )
    score = choose(pruning.SCORES, "pruning.score", config.pruning.score)
    optimizer = training.make_optimizer(config)
    choose(training.SCHEDULES, "optimizer.schedule", config.optimizer.schedule)
    models.find(config.model.name)

    dataset = data.load(
        config.dataset.name,
        config.dataset.data_dir,
        augmentation=config.dataset.augmentation,
        image_side=config.dataset.image_side,
        workers=config.dataset.workers,
    )
    examples = dataset.train.examples
    if config.batch_size > examples:
        raise UserError(
            f"batch_size is {config.batch_size}; {config.dataset.name} has {examples} training images, "
            f"so it should be at most {examples}"
        )
    learning_rates = training.learning_rates(config, steps_per_epoch=examples // config.batch_size)
    if (config.rewind_step or 0) >= learning_rates.size:
        raise UserError(
            f"rewind_step is {config.rewind_step}; a training has {learning_rates.size} steps, "
            f"so it should be at most {learning_rates.size - 1}"
        )
    model = models.create(config, dataset.num_classes, dataset.train.image_shape)
    params = models.shapes(model, dataset.train.image_shape)["params"]
    _require_layers(config.pruning.exclude, params)
    return Experiment(
        config=config,
        members=members_of(config),
        dataset=dataset,
        recipe=training.Recipe(
            model=model,
            optimizer=optimizer,
            normalize=data.statistics(dataset) if config.dataset.normalize else data.Normalize(),
            augmentation=dataset.augmentation,
            repulsion_strength=config.repulsion.strength,
            execution=training.choose_execution(config, params),
        ),
        score=score,
        learning_rates=learning_rates,
    )


def in_round(experiment: Experiment, number: int) -> Experiment:
    """The experiment with all members of round `number`."""
    return experiment._replace(members=members_of(experiment.config, number))


def initialize(experiment: Experiment) -> Variables:
    """The random initialisation of every member; reinit has one of its own, kept over the rounds (ours)."""
    keys = member_keys(
        experiment.members,
        experiment.config.seed,
        lambda member: ["reinit" if member.arm == "reinit" else "init"],
    )
    image = jnp.zeros((1, *experiment.dataset.train.image_shape))
    return jax.jit(jax.vmap(lambda key: dict(experiment.recipe.model.init(key, image, train=False))))(keys)


def train(
    experiment: Experiment,
    number: int,
    tickets: Variables,
    masks: Mask,
    optima: Optima | None = None,
    on_epoch: Callable[[int, Metrics, float], None] = lambda epoch, metrics, seconds: None,
) -> Round:
    """Train the tickets of round `number`, θ⊙m for all members, to the end.

    `tickets`, `masks` and `optima` are those of all members but twins, which share imp's. `optima`, of earlier
    rounds (`remember`), repel or attract by `config.repulsion`.

    With `rewind_step=k`, round 0 notes imp's weights at step k, and later rounds put them back at step k: the
    learning rates go on from there, the optimizer starts afresh (Frankle et al. 2020); what imp did before k in
    those rounds is dropped, beside the control, which always starts from its random initialisation (ours).

    Args:
      on_epoch: called after each epoch with its index, its metrics as NumPy arrays, and its seconds.

    Raises:
      UserError: a loss that is not finite.
    """
    config, recipe, split = experiment.config, experiment.recipe, experiment.dataset.train
    epochs, steps = experiment.learning_rates.shape
    rewind_step = config.rewind_step or 0
    rewound = jnp.array([member.arm in ("imp", "twin") for member in experiment.members])
    tickets, masks, optima = with_twins_as_imp(experiment.members, (tickets, masks, optima))
    optima = jax.tree.map(jnp.asarray, optima)  # from the host
    keys = member_keys(
        experiment.members, experiment.config.seed, lambda member: ["data", ARMS[member.arm], number]
    )

    if isinstance(split, data.Streamed):
        batches = split.training_batches(np.asarray(jax.random.key_data(keys)), epochs, config.batch_size)

    states = training.init_states(tickets, masks, optimizer=recipe.optimizer)
    for epoch in range(epochs):
        start = time.perf_counter()
        pieces = []
        cut = rewind_step - epoch * steps
        for first, last in [(0, cut), (cut, steps)] if 0 < cut < steps else [(0, steps)]:
            if rewind_step > 0 and first == cut:
                if number == 0:
                    states = with_twins_as_imp(experiment.members, states)  # they part at step k
                    tickets = where_member(rewound, states.variables, tickets)
                else:
                    fresh = training.init_states(tickets, masks, optimizer=recipe.optimizer)
                    states = where_member(rewound, fresh, states)
            rates = experiment.learning_rates[epoch, first:last]
            if isinstance(split, data.Streamed):
                states, metrics = training.train_on_stream(states, masks, batches, rates, optima, recipe=recipe)
            else:
                options = {"batch_size": config.batch_size, "recipe": recipe}
                states, metrics = training.train_steps(
                    states, masks, split, keys, epoch, first, rates, optima, **options
                )
            pieces.append(metrics)
        metrics = jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)  # the one wait for the device
        _require_finite(experiment, number, epoch * steps, metrics.loss)
        on_epoch(epoch, metrics, time.perf_counter() - start)
    initial = {**tickets, "params": masking.apply(tickets["params"], masks)}
    return Round(initial, states.variables, masks)


def prune(experiment: Experiment, number: int, networks: Round) -> tuple[Mask, Float[np.ndarray, " members"]]:
    """The masks after round `number`, every arm's from its replicate's imp, and each member's own threshold.

    A round's twins are given a threshold, and no mask: no later round trains them.
    """
    members = experiment.members
    masks, thresholds = _prune_members(
        networks.trained["params"],
        networks.mask,
        member_keys(experiment.members, experiment.config.seed, lambda member: ["score", number]),
        jnp.array([members.index(Member("imp", member.replicate)) for member in members]),
        score=experiment.score,
        fraction=experiment.config.pruning.fraction,
        exclude=tuple(experiment.config.pruning.exclude),
    )
    return without_twins(experiment.members, masks), np.asarray(thresholds)


def reset(experiment: Experiment, networks: Round) -> Variables:
    """What the next round's tickets start from: the weights this round started from.

    With `rewind_step=None`, imp goes on from its trained weights; the control is still reset (ours).
    """
    if experiment.config.rewind_step is not None:
        return without_twins(experiment.members, networks.initial)
    goes_on = jnp.array([member.arm == "imp" for member in experiment.members])
    return without_twins(experiment.members, where_member(goes_on, networks.trained, networks.initial))


def remember(experiment: Experiment, optima: Optima | None, networks: Round, masks: Mask) -> Optima | None:
    """The earlier optima for the round that trains under `masks`: `optima` and `networks`, the last result.

    Each arm remembers its own (ours for the control), twins none. None without repulsion.
    """
    config = experiment.config
    if not config.repulsion.strength:
        return None
    arms = slice(len(members_of(config)))  # without twins, which come last
    trained, masks = jax.tree.map(lambda leaf: leaf[arms], (networks.trained["params"], masks))
    most = 1 if config.repulsion.memory == "last" else config.rounds - 1
    return repulsion.remember(optima, trained, masks, most=most, dtype=config.repulsion.dtype)


def recall(experiment: Experiment, finished: Iterable[Round], masks: Mask) -> Optima | None:
    """What `remember` had come to after all of `finished`, when the next round trains under `masks`."""
    if not experiment.config.repulsion.strength:
        return None
    optima, finished = None, iter(finished)
    networks = next(finished)
    for after in finished:
        optima = remember(experiment, optima, networks, after.mask)
        networks = after
    return remember(experiment, optima, networks, masks)


def measure(
    experiment: Experiment,
    number: int,
    networks: Round,
    thresholds: Float[np.ndarray, " members"],
    seconds: float,
    optima: Optima | None = None,
) -> list[records.Row]:
    """Evaluate the trained networks on both splits: the rows of results.csv of a round trained in `seconds`.

    With repulsion, J_r at the end of training too, and the mean cosine with the `optima` the round knew of.

    Raises:
      UserError: a training loss that is not finite, left by the last step.
    """
    dataset, recipe = experiment.dataset, experiment.recipe
    train_loss, train_correct = training.evaluate(networks.trained, dataset.train, recipe=recipe)
    test_loss, test_correct = training.evaluate(networks.trained, dataset.test, recipe=recipe)
    _require_finite(experiment, number, experiment.learning_rates.size, np.asarray(train_loss)[None])
    exclude = tuple(experiment.config.pruning.exclude)
    prunable_weights = masking.size(networks.mask, exclude) // len(experiment.members)
    columns = {
        "density": np.asarray(_survivors(networks.mask, exclude)) / prunable_weights,
        "threshold": thresholds,
        "train_loss": train_loss,
        "train_accuracy": np.asarray(train_correct) / dataset.train.examples,
        "test_loss": test_loss,
        "test_accuracy": np.asarray(test_correct) / dataset.test.examples,
    }
    if optima is not None:
        optima = with_twins_as_imp(experiment.members, optima)
        params, strength = networks.trained["params"], recipe.repulsion_strength
        columns["repulsion"], columns["cosine"] = repulsion.summary(params, optima, strength)
    elif experiment.config.repulsion.strength:
        columns["repulsion"] = np.zeros(len(experiment.members))  # no earlier optimum, no term
    columns = {name: np.asarray(column) for name, column in columns.items()}
    return [
        {"replicate": member.replicate, "arm": member.arm, "round": number}
        | {name: float(str(column[i])) for name, column in columns.items()}  # float32 as 0.1, not 0.10000000149
        | {"seconds": round(seconds, 3)}
        for i, member in enumerate(experiment.members)
    ]


@functools.partial(jax.jit, static_argnames=("score", "fraction", "exclude"))
def _prune_members(params, masks, keys, imp_of, *, score, fraction, exclude):
    def member(params, mask, key):
        return pruning.prune_by_score(score(params, key), params, mask, fraction, exclude)

    masks, thresholds = jax.vmap(member)(params, masks, keys)
    return jax.tree.map(lambda mask: mask[imp_of], masks), thresholds


@functools.partial(jax.jit, static_argnames="exclude")
def _survivors(masks, exclude):
    return jax.vmap(lambda mask: masking.survivors(mask, exclude))(masks)


def _in_words(experiment, params):
    """The network and its data, for the terminal."""
    config, members = experiment.config, len(experiment.members)
    twins = [str(n) for n in sorted(set(config.instability.rounds)) if n < config.rounds]
    trained = f"{members} member{'s' * (members > 1)}"
    if twins:
        trained += f", with {config.replicates} more in round{'s' * (len(twins) > 1)} {', '.join(twins)}"
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) // members
    weights = masking.size(params, config.pruning.exclude) // members
    height, width, channels = experiment.dataset.train.image_shape
    return (
        f"{config.model.name} on {config.dataset.name} ({height} × {width} × {channels}): "
        f"{count:,} parameters, {weights:,} of them weights to prune; {trained}"
    )


def _require_layers(patterns, params):
    """Refuse a pattern of `pruning.exclude` that names no layer with weights, or patterns that name all."""
    prunable = [masking.prunable(params, exclude) for exclude in ((), patterns, *([p] for p in patterns))]
    for pattern, rest in zip(patterns, prunable[2:], strict=True):
        if rest == prunable[0]:
            raise UserError(
                f"pruning.exclude has {pattern!r}, which names no layer to prune; there are {', '.join(params)}"
            )
    if not any(jax.tree.leaves(prunable[1])):
        raise UserError(f"pruning.exclude is {patterns}; it should leave some of {', '.join(params)} to prune")


def _require_finite(experiment, number, first_step, losses):
    """Raise on the first loss of `losses` [steps, members] that is nan or infinite."""
    broken = np.argwhere(~np.isfinite(losses))
    if len(broken):
        step, index = broken[0]
        member = experiment.members[index]
        kept = f"rounds 0 to {number - 1} are kept" if number else "no round was finished"
        raise UserError(
            f"the loss became {losses[step, index]} in round {number}, arm {member.arm}, replicate "
            f"{member.replicate}, at step {first_step + step} of the training; {kept}; a lower "
            f"optimizer.learning_rate ({experiment.config.optimizer.learning_rate}) or a warm-up may help"
        )


def _columns(rows: list[records.Row]) -> dict[str, list[float]]:
    names = [name for name in rows[0] if name not in ("replicate", "arm", "round")]
    return {name: [row[name] for row in rows] for name in names}
