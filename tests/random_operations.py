"""Sequences of random operations on `Llama` objects, as tests/test_state_machine.py makes them, and any number of them.

    python tests/random_operations.py --sequences 10000 --kept done.txt

They come in lots of 250, each with its number as the seed; finished lots are noted in the file, so that a second call
goes on. Ends at the first fault, with the shortest sequence that shows it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from test_state_machine import Reading

LOT = 250  # sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=10000)
    parser.add_argument("--steps", type=int, default=20, help="most operations of a sequence")
    parser.add_argument("--kept", type=Path, required=True, help="file that names the finished lots")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    limits = settings(
        max_examples=LOT,
        stateful_step_count=args.steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    done = set(args.kept.read_text().split()) if args.kept.exists() else set()
    began = time.monotonic()
    for lot in range(-(-args.sequences // LOT)):
        if str(lot) in done:
            continue
        run_state_machine_as_test(hypothesis.seed(lot)(Reading), settings=limits)
        with args.kept.open("a") as file:
            file.write(f"{lot}\n")
        errors = ", ".join(f"{kind} {error:.1e}" for kind, error in sorted(Reading.worst.items()))
        print(
            f"{(lot + 1) * LOT} sequences, no fault, {time.monotonic() - began:.0f} s; errors at most {errors}",
            flush=True,
        )


if __name__ == "__main__":
    main()
