"""Values of config fields that have no effect with, or contradict, those of other fields."""

from typing import Any

from imp_jax.errors import UserError


def refuse_unused_values(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse values that have no effect with the values of other fields.

    Args:
      values, defaults: of all fields, by name such as "optimizer.schedule".

    Raises:
      UserError: a value has no effect, or contradicts another.
    """
    schedule, milestones = values["optimizer.schedule"], values["optimizer.milestones"]
    epochs, warmup_epochs = values["epochs"], values["optimizer.warmup_epochs"]
    if schedule == "step" and not milestones:
        raise UserError(
            f"optimizer.milestones is (); the schedule step divides the rate at these epochs, so it should "
            f"have at least one, such as ({epochs / 2:g},)"
        )
    if schedule != "step" and milestones:
        raise UserError(
            f"optimizer.milestones is {milestones}; only the schedule step has milestones, and "
            f"optimizer.schedule is {schedule!r}, so it should be ()"
        )
    if milestones and milestones[-1] >= epochs:
        raise UserError(
            f"optimizer.milestones is {milestones}; a training has {epochs} epochs, so they should lie below "
            f"{epochs}"
        )
    if warmup_epochs > epochs:
        raise UserError(
            f"optimizer.warmup_epochs is {warmup_epochs}; a training has {epochs} epochs, so it should be at "
            f"most {epochs}"
        )
    _refuse_contradictions(values)
    _refuse_unused_policies(values, defaults)
    if values["optimizer.weight_decay_until"] and not values["optimizer.weight_decay"]:
        raise UserError(
            f"optimizer.weight_decay_until is {values['optimizer.weight_decay_until']:g}; "
            f"optimizer.weight_decay is 0, so it should be 0"
        )
    _refuse_unused_requests(values, defaults)
    if values["dtype"] != "float32" and values["matmul_precision"] != defaults["matmul_precision"]:
        raise UserError(
            f"matmul_precision is {values['matmul_precision']!r}; dtype is {values['dtype']!r}, and only "
            f"products of float32 have other precisions, so it should be {defaults['matmul_precision']!r}"
        )
    if not values["repulsion.strength"]:
        for field in ("repulsion.memory", "repulsion.dtype"):
            if values[field] != defaults[field]:
                raise UserError(
                    f"{field} is {values[field]!r}; repulsion.strength is 0, so it has no effect and should be "
                    f"{defaults[field]!r}"
                )


def _refuse_contradictions(values):
    network, scope = values["pruning.network"], values["pruning.scope"]
    if network != "initial" and values["pruning.steps"] != 1:
        raise UserError(
            f"pruning.steps is {values['pruning.steps']}; pruning.network is {network!r}, so it should be 1"
        )
    if network != "initial" and scope in ("erk", "uniform"):
        raise UserError(
            f"pruning.scope is {scope!r}; pruning.network is {network!r}, so it should be global or layer"
        )
    if network != "trained" and scope == "layer":
        raise UserError(
            f"pruning.scope is 'layer'; pruning.network is {network!r}, so it should be global"
            + ", erk or uniform" * (network == "initial")
        )
    if network != "trained" and values["rewind_step"] is None:
        raise UserError(
            f"rewind_step is None; pruning.network is {network!r}, whose masks keep weights that the round "
            f"before pruned, so it should be a step"
        )
    if network != "trained" and values["repulsion.strength"]:
        raise UserError(
            f"repulsion.strength is {values['repulsion.strength']:g}; pruning.network is {network!r}, whose "
            f"masks may regain pruned weights, so it should be 0"
        )
    if values["optimizer.finetune"] and values["rewind_step"] is not None:
        raise UserError(
            f"optimizer.finetune is True; rewind_step is {values['rewind_step']}, and weights that are reset "
            f"train from the start of the schedule, so it should be False"
        )


def _refuse_unused_policies(values, defaults):
    """Refuse settings of policies that are not chosen, and policies that contradict other settings."""
    pruning, retraining = values["pruning.policy"], values["retraining.policy"]
    unused = {
        "pruning.fraction": pruning != "fixed",
        "pruning.fractions": pruning != "evidence",
        "pruning.barrier": pruning != "evidence",
        "retraining.epochs": retraining == "full",
        "retraining.barrier": retraining != "evidence",
        "evidence.images": "evidence" not in (pruning, retraining),
    }
    for field, is_unused in unused.items():
        if is_unused and values[field] != defaults[field]:
            policies = f"pruning.policy is {pruning!r} and retraining.policy {retraining!r}"
            raise UserError(
                f"{field} is {values[field]!r}; {policies}, so it has no effect and should be "
                f"{defaults[field]!r}"
            )
    short_epochs = values["retraining.epochs"]
    if retraining != "full" and not (short_epochs and short_epochs < values["epochs"]):
        raise UserError(
            f"retraining.epochs is {short_epochs}; retraining.policy is {retraining!r}, so it should be a "
            f"number of epochs below that of a full training, {values['epochs']}"
        )
    network = values["pruning.network"]
    for field in ("pruning.policy", "retraining.policy"):
        if values[field] == "evidence" and network != "trained":
            raise UserError(
                f"{field} is 'evidence'; pruning.network is {network!r}, whose masks do not come from the "
                f"solution of the round, so it should be {defaults[field]!r}"
            )


def _refuse_unused_requests(values, defaults):
    """Refuse settings of analyses on request that are not requested, or that leave them nothing to compute."""
    requested = values["analysis.also"]
    readers = {
        "analysis.images": ("sharpness", "noise"),
        "analysis.noise_rounds": ("noise",),
        "analysis.noise_epochs": ("noise",),
        "instability.steps": ("instability",),
        "instability.noise": ("instability",),
    }
    for field, names in readers.items():
        if values[field] != defaults[field] and not set(names) & set(requested):
            raise UserError(
                f"{field} is {values[field]!r}; analysis.also does not have {' or '.join(names)}, so it has no "
                f"effect and should be {defaults[field]!r}"
            )
    for name in ("noise", "instability"):
        if name in requested and values["repulsion.strength"]:
            raise UserError(
                f"analysis.also has {name}, which repeats trainings; with J_r they need all earlier optima, so "
                f"repulsion.strength should be 0, and it is {values['repulsion.strength']:g}"
            )
    epochs, noise_epochs = values["epochs"], values["analysis.noise_epochs"]
    if "noise" in requested and max(noise_epochs) > epochs:
        raise UserError(
            f"analysis.noise_epochs is {noise_epochs}; a training has {epochs} epochs, so they should be at "
            f"most {epochs}"
        )
    if "instability" in requested:
        _check_instability(values)


def _check_instability(values):
    rounds, steps, rewind_step = (values[f] for f in ("instability.rounds", "instability.steps", "rewind_step"))
    if not steps:
        raise UserError(
            "instability.steps is (); analysis.also has instability, which trains twins that part from imp at "
            "these steps, so it should have at least one, such as (0, 100)"
        )
    if min(steps) < (rewind_step or 0):
        raise UserError(
            f"instability.steps is {steps}; the trainings of the run start at the rewind step, so they should "
            f"be at least {rewind_step}"
        )
    if all(number >= values["rounds"] for number in rounds):
        raise UserError(
            f"instability.rounds is {rounds}; analysis.also has instability, which trains twins in these "
            f"rounds, so it should have one below {values['rounds']}"
        )
