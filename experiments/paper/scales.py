"""The settings of `--scale`: which runs the figures need, at the paper's scale and at smaller ones."""

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

SCALES = {scale.name: scale for scale in (PAPER, MINI, SMOKE)}
