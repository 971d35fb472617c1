"""Faults, injected for real: `python -m experiments.faults` breaks runs in every way it can, and compares.

The real command trains a small network on mnist5k, in a process of its own. It is killed, interrupted, starved
of disk space or given damaged files, and started again, fault after fault, until the run is finished. Then the
run is compared with an undisturbed one: results, masks and weights must be equal bit for bit, and the analyses
up to rounding, because the rounding of distances depends on how many rounds are compared in one call.
Needs Linux.

Full disks and read-only file systems need a tmpfs, which root may mount. For other users, a limit on the size
of files and the permissions of folders replace it.
"""

import argparse
import sys
import time

from experiments.reliability import campaign


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chains", type=int, default=8, help="runs to break, 15 times each (default: 8)")
    parser.add_argument("--short", action="store_true", help="one run, broken 7 times")
    parser.add_argument("--seed", type=int, default=0, help="decides where the faults strike (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs (default: 2)")
    arguments = parser.parse_args()
    for name in ("chains", "jobs"):
        if getattr(arguments, name) < 1:
            sys.exit(f"error: --{name} is {getattr(arguments, name)}; it should be at least 1")
    start = time.monotonic()
    outcomes = campaign.run_chains(arguments.chains, arguments.short, arguments.seed, arguments.jobs)
    if not campaign.print_outcomes(outcomes, arguments.seed, time.monotonic() - start):
        sys.exit(1)


if __name__ == "__main__":
    main()
