"""The paper's claims, measured: `python -m experiments.claims --root=runs/mini`.

Each claim is tested by a few quantities, measured once per replicate, and the values that it predicts for them.
The table is printed, and written as Markdown to `claims.md` in the folder of the runs.
"""

import argparse
import sys

from absl import logging

from experiments.paper import claims_report
from experiments.sweeps.sweep import Sweep
from imp_jax import cli
from imp_jax.errors import UserError, user_path
from imp_jax.workdir.files import write_atomically


def main() -> None:
    cli.replace_unprintable()
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="folder of the runs, as for experiments.run")
    scale_help = "paper, midi, mini or smoke (default: the one that has runs in the folder)"
    parser.add_argument("--scale", help=scale_help)
    arguments = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    try:
        root = user_path(arguments.root, "--root").absolute()
        scale = claims_report.choose_scale(root, arguments.scale)
        sweep, runs = Sweep(root), claims_report.list_claim_runs(scale)
        sweep.check_configs_match(runs)
        finished = sweep.load_finished(runs)
        if not finished:
            raise UserError(f"nothing that the claims are about has been run in {root} yet")
        claims_report.print_claims(scale, finished)
        write_atomically(root / "claims.md", claims_report.format_claims(scale, finished) + "\n")
        print(f"claims: {root / 'claims.md'}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
