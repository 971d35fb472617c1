"""The table of all config fields: default, meaning, allowed values, and whether a resumed run may change it."""

from imp_jax.config_field import NUMBER, Field, at_least, one_of

# arguments that several fields share
_DEVICES = {"check": lambda value: value >= 1 or value == -1, "words": "at least 1, or -1 for automatic"}
_AT_LEAST_0_AND_FINITE = {"check": lambda value: 0 <= value < float("inf"), "words": "at least 0 and finite"}
_ABOVE_0_AND_FINITE = {"check": lambda value: 0 < value < float("inf"), "words": "above 0 and finite"}
_RESUME = {"may_change_on_resume": True}


def _are_counts(values):
    return all(type(value) is int and value >= 0 for value in values)


def _are_distinct_counts(values):
    return _are_counts(values) and len(set(values)) == len(values)


# All fields by name. `default` makes a config of them, with a group for each prefix such as "dataset.".
FIELDS = {
    "seed": Field(
        0,
        "seed from which all random keys are derived",
        check=lambda value: 0 <= value < 2**32,
        words="from 0 to 2³² − 1",
    ),
    "replicates": Field(
        3,
        "number of repetitions with different random keys, trained at the same time; it does not change the "
        "results of replicate 0",
        **at_least(1),
    ),
    "arms": Field(
        ("imp", "reinit"), "what is trained on the mask of each round; the mask always comes from imp"
    ),
    "rounds": Field(
        25,
        "number of trainings, including the dense one, which is round 0; round n has density "
        "(1 − pruning.fraction)ⁿ",
        **at_least(1),
    ),
    "epochs": Field(25, "number of epochs of each training", **at_least(1)),
    "batch_size": Field(60, "number of training images per step", **at_least(1)),
    "accumulate_steps": Field(
        1,
        "number of equal parts of a batch whose gradients are computed one after the other and added, to save "
        "memory; each part is normalised by its own statistics",
        **at_least(1),
    ),
    "dtype": Field(
        "float32",
        "type of the computation; parameters and optimizer state are always float32",
        **one_of("float32", "bfloat16"),
    ),
    "matmul_precision": Field(
        "default",
        "precision of products of float32: default is that of JAX, TF32 on a GPU; highest is float32",
        **one_of("default", "highest"),
    ),
    "execution": Field(
        "auto",
        "how steps and members are compiled: scan_vmap, scan_unroll, step_vmap, step_unroll, or grouped on a "
        "GPU (streamed sets always run step by step); auto chooses by network and device, tune by timing steps",
    ),
    "rewind_step": Field(
        0,
        "step of the dense training; every round resets the surviving weights to their values at this step; 0 "
        "is the initialisation, None continues from the trained weights",
        **at_least(0, or_none=True),
    ),
    "checkpoint_every_epochs": Field(
        5, "epochs between checkpoints within a round; there is always one at its end", **at_least(1), **_RESUME
    ),
    "checkpoint_every_steps": Field(
        500, "steps between checkpoints within a round, of streamed sets only", **at_least(1), **_RESUME
    ),
    "keep_checkpoints": Field(
        "all",
        "rounds whose checkpoints are kept: all, or ends, the first and the last two",
        **one_of("all", "ends"),
        **_RESUME,
    ),
    "on_divergence": Field(
        "stop",
        "what to do when a member diverges: stop the run, or drop the member and continue without it",
        **one_of("stop", "drop"),
        **_RESUME,
    ),
    "evaluate_epochs": Field(
        False,
        "whether all members are evaluated on the test split, and the validation split if there is one, after "
        "every epoch; a change takes effect with the next round",
        **_RESUME,
    ),
    "dataset.name": Field(
        "mnist5k",
        "a registered set, such as mnist5k, cifar10 or folder (of images by class); another "
        "image-classification set of TFDS; or a dotted path such as their_package.sets:mine",
    ),
    "dataset.data_dir": Field(
        None,
        "folder of the data; None is that of TFDS, ~/tensorflow_datasets",
        check=lambda value: value != "",
        words="the path of a folder, or None for ~/tensorflow_datasets",
        types=(str, type(None)),
        **_RESUME,
    ),
    "dataset.normalize": Field(
        False,
        "whether each channel is scaled to mean 0 and standard deviation 1 over the training set; otherwise, "
        "pixels are scaled to [0, 1]",
    ),
    "dataset.augmentation": Field(
        None,
        "names of augmentations of the training images, such as crop and flip; None is the default of the set "
        "(both for CIFAR and ImageNet)",
        types=(tuple, type(None)),
    ),
    "dataset.labels": Field(
        "true",
        "random replaces the training labels of a set in memory by fixed random ones",
        **one_of("true", "random"),
    ),
    "dataset.subset": Field(
        1.0,
        "fraction of the training images of a set in memory that are kept",
        check=lambda value: 0 < value <= 1,
        words="above 0 and at most 1",
    ),
    "dataset.validation": Field(
        0.0,
        "fraction of the training images of a set in memory that are held out as a validation split",
        check=lambda value: 0 <= value < 1,
        words="at least 0 and below 1",
    ),
    "dataset.blur": Field(
        1,
        "factor by which the images of a set in memory are reduced and enlarged again, which blurs them",
        **at_least(1),
    ),
    "dataset.image_side": Field(
        224,
        "height and width in pixels of the crops of a streamed set; other sets do not use it",
        **at_least(1),
    ),
    "dataset.workers": Field(
        None,
        "number of processes that decode a streamed set: None is one per core, 0 decodes in threads of the "
        "training process; other sets do not use it",
        **at_least(0, or_none=True),
        **_RESUME,
    ),
    "model.name": Field(
        "lenet",
        "lenet, mlp_300_100 (any widths), conv4, vgg11, vgg16, resnet18, resnet34, resnet50, resnet20 (32, 44, "
        "56, 110, …) or wide_resnet28_10 (any depth and factor); a registered name; or a dotted path such as "
        "their_package.nets:VGG11",
    ),
    "model.width": Field(
        1.0,
        "factor by which the numbers of channels or hidden units are multiplied, for quick runs",
        **_ABOVE_0_AND_FINITE,
    ),
    "model.norm_affine": Field(False, "whether the normalisation of ResNets has a learnable scale and bias"),
    "model.norm_momentum": Field(
        0.9,
        "momentum of the running statistics of ResNets: new = momentum · old + (1 − momentum) · batch",
        check=lambda value: 0 <= value < 1,
        words="in [0, 1)",
    ),
    "model.norm_parts": Field(
        1,
        "number of equal parts of a batch with separate BatchNorm statistics (the per-GPU BatchNorm of most "
        "code bases); 1 uses the statistics of the whole batch, over all devices",
        **at_least(1),
    ),
    "optimizer.name": Field("adam", "adam, momentum, sgd, a registered name, or a dotted path"),
    "optimizer.learning_rate": Field(12e-4, "learning rate before the schedule", **_ABOVE_0_AND_FINITE),
    "optimizer.momentum": Field(
        None,
        "heavy-ball momentum of the optimizers momentum and sgd; None is the optimizer's own, 0.9 and 0",
        check=lambda value: value is None or 0 <= value < 1,
        words="in [0, 1), or None",
        types=(float, int, type(None)),
    ),
    "optimizer.weight_decay": Field(
        0.0, "factor of the L2 penalty, added to the gradient of all parameters", **_AT_LEAST_0_AND_FINITE
    ),
    "optimizer.weight_decay_until": Field(
        0.0,
        "density below which there is no weight decay; 0 never turns it off",
        check=lambda value: 0 <= value <= 1,
        words="in [0, 1]",
    ),
    "optimizer.schedule": Field("constant", "constant, step or cosine"),
    "optimizer.milestones": Field(
        (),
        "epochs, below `epochs`, after which the step schedule divides the learning rate by 10",
        check=lambda value: (
            all(isinstance(e, NUMBER) and e > 0 for e in value) and list(value) == sorted(set(value))
        ),
        words="increasing epochs above 0",
    ),
    "optimizer.warmup_epochs": Field(
        0.0,
        "epochs over which the learning rate rises linearly from 0, under any schedule",
        **_AT_LEAST_0_AND_FINITE,
    ),
    "optimizer.finetune": Field(
        False,
        "whether rounds after round 0 train at the last learning rate of the schedule; needs rewind_step None",
    ),
    "mesh.member": Field(
        -1,
        "number of devices along the member axis; -1 is as many as reduce the time of a round; the mesh "
        "changes results by rounding only",
        **_DEVICES,
        **_RESUME,
    ),
    "mesh.data": Field(
        1,
        "number of devices that share each batch (data parallelism); -1 is all that the member axis leaves",
        **_DEVICES,
        **_RESUME,
    ),
    "pruning.score": Field(
        "magnitude",
        "magnitude, random, movement, taylor, fisher, grasp, synflow, a registered name, or a dotted path; the "
        "weights with the lowest scores are pruned",
    ),
    "pruning.images": Field(
        256,
        "number of training images on which a score computes the loss; scores without a loss do not use it",
        **at_least(1),
    ),
    "pruning.fraction": Field(
        0.2,
        "fraction of the surviving weights that is pruned after each round; for one-shot pruning to 30 %, set "
        "rounds to 2 and the fraction to 0.7",
        check=lambda value: 0 < value < 1,
        words="between 0 and 1, both excluded",
    ),
    "pruning.exclude": Field(
        (),
        'name patterns of layers that are never pruned, such as ("projection_*",) for ResNet-50',
        check=lambda value: all(isinstance(name, str) for name in value),
        words="names of layers, such as ('Dense_2',)",
    ),
    "pruning.scope": Field(
        "global",
        "global ranks the scores of all layers together; layer prunes the fraction in each layer; erk and "
        "uniform give layers the densities of Erdős–Rényi kernels or one density, for pruning.network initial",
        **one_of("global", "layer", "erk", "uniform"),
    ),
    "pruning.network": Field(
        "trained",
        "network whose scores give the mask of the next round: trained in the round; dense, trained in round 0 "
        "(one-shot pruning); or initial, not trained at all",
        **one_of("trained", "dense", "initial"),
    ),
    "pruning.steps": Field(
        1,
        "for pruning.network initial: exponential steps in which the mask is found, with new scores in each",
        **at_least(1),
    ),
    "pruning.layer_factors": Field(
        (),
        "with scope layer: pairs of a name pattern and the factor of the fraction in such layers, as "
        '(("Dense_2", 0.5),)',
        check=lambda value: all(
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and type(pair[1]) in NUMBER
            and pair[1] > 0
            for pair in value
        ),
        words="pairs of a name and a factor above 0, such as (('Dense_2', 0.5),)",
    ),
    "pruning.policy": Field(
        "fixed",
        "fixed prunes pruning.fraction after each round; evidence prunes the largest of pruning.fractions that "
        "keeps the network within pruning.barrier of its solution",
        **one_of("fixed", "evidence"),
    ),
    "pruning.fractions": Field(
        (0.2, 0.36, 0.488, 0.5904),
        "for pruning.policy evidence: fractions of which the largest is pruned that evidence allows, or the "
        "first; by default, those of one to four rounds of 0.2",
        check=lambda value: (
            bool(value)
            and all(type(fraction) in NUMBER and 0 < fraction < 1 for fraction in value)
            and list(value) == sorted(set(value))
        ),
        words="rising fractions between 0 and 1, such as (0.2, 0.36)",
    ),
    "pruning.barrier": Field(
        0.02,
        "for pruning.policy evidence: allowed increase of the training error, in [0, 1], on the path from a "
        "solution to its projection on the next mask",
        **_ABOVE_0_AND_FINITE,
    ),
    "retraining.policy": Field(
        "full",
        "epochs of the rounds after round 0: full trains as round 0 does; short trains retraining.epochs; "
        "evidence does so, and from the trained weights, while the last two solutions are connected",
        **one_of("full", "short", "evidence"),
    ),
    "retraining.epochs": Field(
        None,
        "number of epochs of a short round, over which the schedule of the learning rate is compressed; None "
        "for retraining.policy full",
        **at_least(1, or_none=True),
    ),
    "retraining.barrier": Field(
        0.02,
        "for retraining.policy evidence: barrier of the training error, in [0, 1], up to which two solutions "
        "are connected",
        **_ABOVE_0_AND_FINITE,
    ),
    "evidence.images": Field(
        1000, "number of training images on which the policies evidence compute errors", **at_least(1)
    ),
    "branch.name": Field("", "name of a branch, which `imp_jax.branch` sets; empty for a run"),
    "branch.rounds": Field(
        (),
        "rounds on whose masks a branch trains; () is all rounds of the run",
        check=_are_counts,
        words="rounds, counted from 0, such as (1, 5, 10)",
    ),
    "branch.mask_from": Field(
        None,
        "workdir of another run, under whose masks a branch trains; None is the run itself",
        types=(str, type(None)),
    ),
    "repulsion.strength": Field(
        0.0,
        "factor λ_r of the loss J_r over earlier optima: 2 repels, −1 attracts, 0 turns J_r off",
        check=lambda value: abs(value) < float("inf"),
        words="finite",
    ),
    "repulsion.memory": Field(
        "all", "earlier optima that J_r includes: all, or only the last", **one_of("all", "last")
    ),
    "repulsion.dtype": Field(
        "float32",
        "type in which earlier optima are stored; bfloat16 takes half the memory",
        **one_of("float32", "bfloat16"),
    ),
    "instability.rounds": Field(
        (5, 10, 15),
        "rounds in which the ticket is trained a second time, as the arm twin, with other data order and "
        "augmentation",
        check=_are_counts,
        words="rounds, counted from 0, such as (5, 10); rounds after the last one are ignored",
    ),
    "instability.steps": Field(
        (),
        "steps of a training at which the analysis instability lets twins part from imp, in the rounds of "
        "instability.rounds",
        check=_are_distinct_counts,
        words="distinct steps, counted from 0, such as (0, 100)",
        **_RESUME,
    ),
    "instability.noise": Field(
        0.0,
        "norm of the Gaussian noise that perturbs imp at these steps, relative to the norm of the surviving "
        "weights of each layer, in trainings with the data order of imp; 0 is none of these trainings",
        **_AT_LEAST_0_AND_FINITE,
        **_RESUME,
    ),
    "analysis.also": Field(
        (),
        "names of analyses that are computed on request only, because they take long: sharpness, noise, "
        "instability, or a registered one",
        check=lambda value: all(isinstance(name, str) for name in value),
        words="names of analyses on request, such as ('sharpness',)",
        **_RESUME,
    ),
    "analysis.images": Field(
        1000,
        "number of training images on which sharpness and noise are computed, in whole batches",
        **at_least(1),
        **_RESUME,
    ),
    "analysis.noise_rounds": Field(
        (0, 5, 10, 15),
        "rounds in which the gradient noise is computed",
        check=lambda value: value and _are_distinct_counts(value),
        words="distinct rounds, counted from 0, such as (0, 10); rounds after the last one are ignored",
        **_RESUME,
    ),
    "analysis.noise_epochs": Field(
        (0, 1, 5),
        "numbers of epochs of a training after which the gradient noise is computed; 0 is its start",
        check=lambda value: value and _are_distinct_counts(value),
        words="distinct numbers of epochs from 0, such as (0, 1)",
        **_RESUME,
    ),
    "analysis.path_points": Field(
        20,
        "number of points on a linear path, including its ends",
        **at_least(2),
        **_RESUME,
    ),
    "analysis.batch_norm": Field(
        "interpolate",
        "BatchNorm statistics on a path: interpolate those of its ends, or reestimate them on training data",
        **one_of("interpolate", "reestimate"),
        **_RESUME,
    ),
    "analysis.baseline": Field(
        "mean",
        "error from which a barrier is measured: mean or max of the errors at the ends of a path, or the "
        "linear interpolation between them",
        **one_of("mean", "linear", "max"),
        **_RESUME,
    ),
}
