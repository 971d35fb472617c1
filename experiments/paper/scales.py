"""The settings of `--scale`: which runs the figures need, at the paper's scale and at smaller ones.

The settings of `midi` were fixed on 2026-11-28, before any run of the network concerned was trained, from the
measurements below on mnist5k_scenes. Those of (a) and (b) are of ResNet-8 at width 0.5.

(a) Learning rate and schedule. Validation accuracy in % of the dense network at batch size 64, the mean of 3
replicates, with a fifth of the training images held out:

    learning rate          0.03   0.1    0.2    0.3    0.5
    6 epochs, step (4, 5)  46.7   74.0   74.4   72.4   65.8
    6 epochs, cosine              65.9   72.2   71.3   66.3
    8 epochs, step (5, 7)  59.5   80.4   81.3   80.0
    8 epochs, cosine       49.5   79.1   76.9   82.2

A run of 8 epochs takes too long, so `midi` trains 6 epochs with the step schedule at 0.2.

(b) Batch sizes. Error barrier on the training set between two trainings of the same dense network, in points
(in parentheses: with re-estimated statistics of the normalisation), for two networks, and their test accuracy:

    batch size             16               64               128              256
    6 epochs, barrier      73, 77 (69, 63)  70, 66 (37, 27)  50, 26 (31, 10)  40, 10 (11, 3)
    6 epochs, accuracy, %  71 to 84         65 to 81         64 to 68         37 to 51

A stable batch size should have a barrier below 2 points. No batch size at which the network trains has one:
with a learning rate of 0.05 and 12 epochs, batch size 256 has 3 (1) points, and an accuracy of 41 %. The
paper's stable batch size of 2048 trains on 4 million images, that of `midi` on 24,000. So the unstable batch
size is the smallest one, and the stable one is the largest whose mean accuracy is within 15 points of the
best: 128. *Its dense networks are unstable too.*

The same for Conv-4 at width 0.25, 8 epochs, cosine. Validation accuracy is 86.4 % with a learning rate of
0.01, and 85.9 % with 0.03; with 0.1 the network does not train:

    batch size             16               64               128              256
    barrier                44, 82           15, 30           13, 35           15, 12
    accuracy, %            86 to 91         83 to 85         58 to 77         28 to 64

Weight decay of ResNet-8: the sum of learning rate × weight decay over all steps is that of figure 7 in the
paper.
"""

import dataclasses

from experiments.sweeps.runs import Run, make_run


@dataclasses.dataclass(frozen=True)
class Scale:
    """The runs and numbers that the figures are defined with."""

    name: str
    resnet20: Run  # figures 1 to 11 and 15, at various batch sizes and warm-ups
    batch_sizes: tuple[int, ...]  # figures 1, 2, 6, 9 to 11: from unstable to stable
    fig4_batch_sizes: tuple[int, ...]
    semistable: int  # batch size of figure 7
    stable: int  # batch size of figures 3, 5, 8 and 15
    warmup_epochs: float
    weight_decay: float  # of figure 7, where it is compared with none
    rewind_step: int  # of the rewound run that attraction is compared with (section 3.1)
    lenet: Run  # figures 14, 17 to 20
    conv4: Run  # figures 13, 16 and 23
    conv4_destabilised: Run  # figures 12, 21 and 22
    conv4_restabilised: Run
    one_shot: Run  # table of appendix C
    low_rate: float  # learning rate of its second row
    trunk: Run  # the run with whose masks the controls of `experiments.literature` train
    trunk_rounds: tuple[int, ...]  # the rounds of these masks
    at_initialisation: Run  # pruned by other scores before any training
    effort: Run  # imp alone, whose rounds `experiments.literature.effort` shortens
    short_epochs: int  # of a short round
    evidence_rounds: int  # of a run that may prune more than `pruning.fraction` after a round

    @property
    def unstable(self) -> int:
        """The batch size at which IMP fails."""
        return self.batch_sizes[0]

    def make_resnet20_run(self, batch_size: int, **fields) -> Run:
        """Return ResNet-20's run at a batch size, without warm-up, with other `fields`."""
        return self.resnet20.with_overrides(batch_size=batch_size, **fields)


def _halve(run):
    """Return the run with densities from 100 to 0.8 %, each half of the one before."""
    return run.with_overrides(rounds=8, pruning__fraction=0.5, instability__rounds=())


_EVERY_THIRD = tuple(range(3, 25, 3))  # densities from 51 to 0.47 %


def _without_controls(run):
    """Return the run with imp alone."""
    return run.with_overrides(arms=("imp",), instability__rounds=())


_CONV4 = make_run("conv4", {})
_DESTABILISED = _CONV4.with_overrides(
    batch_size=16,
    optimizer__weight_decay=0.01,
    optimizer__schedule="step",
    optimizer__milestones=(55, 65),
)

PAPER = Scale(
    name="paper",
    resnet20=make_run("resnet20", {}),
    batch_sizes=(128, 256, 512, 1024, 2048, 4096),
    fig4_batch_sizes=(128, 1024, 2048),
    semistable=512,
    stable=2048,
    warmup_epochs=10.0,
    weight_decay=1e-5,
    rewind_step=2000,  # (ours) the smallest step in Frankle et al. 2020a at which ResNet-20 is stable
    lenet=make_run("lenet", {}),
    conv4=_CONV4,
    conv4_destabilised=_DESTABILISED,
    conv4_restabilised=_DESTABILISED.with_overrides(batch_size=512),  # (ours) the paper gives no value
    one_shot=make_run("resnet50", {}),
    low_rate=0.1,
    trunk=make_run("resnet20", {"batch_size": 2048}),
    trunk_rounds=_EVERY_THIRD,
    at_initialisation=_halve(make_run("resnet20", {"batch_size": 2048})),
    effort=_without_controls(make_run("resnet20", {"batch_size": 2048, "optimizer.weight_decay": 0.0})),
    short_epochs=25,
    evidence_rounds=22,
)

# LeNet on mnist5k stands for all networks. A learning rate of 0.02 makes it unstable at batch size 20: the
# error barrier between two trainings of a ticket is 34, 19 and 4 points in rounds 5, 10 and 15. At batch size
# 600 it is at most half a point.
_LENET = make_run("mnist5k", {"epochs": 20})
_UNSTABLE = make_run("mnist5k", {"optimizer.learning_rate": 0.02})

MINI = Scale(
    name="mini",
    resnet20=_UNSTABLE,
    batch_sizes=(20, 60, 200, 600),
    fig4_batch_sizes=(20, 60, 600),
    semistable=200,
    stable=600,
    warmup_epochs=2.0,
    weight_decay=1e-4,
    rewind_step=200,
    lenet=_LENET,
    conv4=_LENET,
    conv4_destabilised=_UNSTABLE.with_overrides(batch_size=20),
    conv4_restabilised=_UNSTABLE.with_overrides(batch_size=600),
    one_shot=_UNSTABLE.with_overrides(batch_size=20, rounds=2, arms=("imp",), pruning__fraction=0.7),
    low_rate=0.005,
    trunk=make_run("mnist5k", {}),
    trunk_rounds=_EVERY_THIRD,
    at_initialisation=_halve(make_run("mnist5k", {})),
    effort=_without_controls(make_run("mnist5k", {})),
    short_epochs=3,
    evidence_rounds=22,
)

_RESNET8 = make_run("resnet8_scenes", {})
_NARROW_CONV4 = make_run("conv4_scenes", {})
_STABLE_RESNET8 = _RESNET8.with_overrides(batch_size=128)

_DESTABILISED_NARROW_CONV4 = _NARROW_CONV4.with_overrides(
    batch_size=16,
    optimizer__weight_decay=0.01,
    optimizer__schedule="step",
    optimizer__milestones=(6, 7),
)

MIDI = Scale(
    name="midi",
    resnet20=_RESNET8,
    batch_sizes=(16, 64, 128),
    fig4_batch_sizes=(16, 64, 128),
    semistable=64,
    stable=128,
    warmup_epochs=1.0,
    weight_decay=1e-4,
    rewind_step=250,
    lenet=_LENET,
    conv4=_NARROW_CONV4,
    conv4_destabilised=_DESTABILISED_NARROW_CONV4,
    conv4_restabilised=_DESTABILISED_NARROW_CONV4.with_overrides(batch_size=64),
    one_shot=_RESNET8.with_overrides(rounds=2, arms=("imp",), pruning__fraction=0.7, instability__rounds=()),
    low_rate=0.05,
    trunk=_STABLE_RESNET8,
    trunk_rounds=(2, 4, 6, 8, 10, 12),  # densities from 41 to 0.47 %
    at_initialisation=_halve(_STABLE_RESNET8),
    effort=_without_controls(_STABLE_RESNET8),
    short_epochs=2,
    evidence_rounds=12,
)

_TINY = make_run(
    "mnist5k",
    {
        "model.width": 0.1,
        "replicates": 2,
        "rounds": 4,
        "epochs": 1,
        "batch_size": 500,
        "instability.rounds": (1, 2, 3),
        "analysis.path_points": 3,
    },
)

SMOKE = Scale(
    name="smoke",
    resnet20=_TINY,
    batch_sizes=(250, 500),
    fig4_batch_sizes=(250, 500),
    semistable=250,
    stable=500,
    warmup_epochs=1.0,
    weight_decay=1e-4,
    rewind_step=2,
    lenet=_TINY,
    conv4=_TINY,
    conv4_destabilised=_TINY.with_overrides(batch_size=250),
    conv4_restabilised=_TINY,
    one_shot=_TINY.with_overrides(rounds=2, arms=("imp",), pruning__fraction=0.7),
    low_rate=0.005,
    trunk=_TINY,
    trunk_rounds=(1, 3),
    at_initialisation=_TINY.with_overrides(rounds=3, pruning__fraction=0.5, instability__rounds=()),
    effort=_without_controls(_TINY.with_overrides(epochs=2)),
    short_epochs=1,
    evidence_rounds=3,
)

SCALES = {scale.name: scale for scale in (PAPER, MIDI, MINI, SMOKE)}
