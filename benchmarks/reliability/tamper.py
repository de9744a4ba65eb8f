"""Whether `ensdef verify` accepts what is honest and finds what is forged.

    python benchmarks/reliability/tamper.py [--quick]

Thirty honest records (three defences, ten attacks, two norms and none) must be verified; every forgery of
`mutations.py` must be rejected for its reason; a thousand images of an ensemble of three ResNet-8 must be verified in
under a minute. Exit status 1 when one of the three is missed. Without --quick about two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bundles import Honest, for_forgers, of_every_kind, of_many_images
from forgery import Forgery
from mutations import MUTATIONS, Mutation

from ensdef.verification import Verification, Verifier

#: Seconds that a thousand images may take.
GOAL = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="One defence instead of three, 100 images.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        honest = for_forgers(folder / "forgers")
        records = of_every_kind(folder / "kinds", ("nat",) if options.quick else ("nat", "adp", "soe"))
        accepted = [Verifier().verify(path) for path in records]
        accepted += [Verifier(data_dir=str(honest.data_dir)).verify(path) for path in (honest.record, honest.sibling)]
        for one in accepted:
            print(f"{one.status:15} {one.path.relative_to(folder)} {'; '.join(map(str, one.failures))}")
        found = 0
        for number, mutation in enumerate(MUTATIONS):
            made = tampered(mutation, honest, folder / f"forged{number}")
            found += rejected(mutation, made)
            told = "; ".join(map(str, made.failures))
            print(f"{'rejected' if rejected(mutation, made) else 'MISSED':10} {mutation.name:55} {told[:160]}")
        count = 100 if options.quick else 1000
        seconds = timed(*of_many_images(folder / "many", count))
    good = sum(one.status == "verified" for one in accepted)
    print(
        f"{good} of {len(accepted)} honest records verified; {found} of {len(MUTATIONS)} forgeries rejected for their "
        f"reasons; {count:,} images verified in {seconds:.1f} s"
    )
    if good < len(accepted) or found < len(MUTATIONS) or seconds > GOAL:
        sys.exit(1)


def tampered(mutation: Mutation, honest: Honest, folder: Path) -> Verification:
    """What verification says of a forgery."""
    forged = Forgery(honest, folder)
    mutation.apply(forged)
    forged.write()
    return Verifier(forged.results, str(forged.data_dir)).verify(forged.path)


def rejected(mutation: Mutation, made: Verification) -> bool:
    """Whether it was found out, and why."""
    return made.status == mutation.status and any(mutation.reason in str(one) for one in made.failures)


def timed(record: Path, photos: Path) -> float:
    """Seconds that the command takes, start included.

    Raises:
        SystemExit: it does not verify the record.
    """
    command: Sequence[str] = [sys.executable, "-m", "ensdef", "verify", str(record), "--data-dir", str(photos)]
    began = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"an honest record was rejected:\n{finished.stdout}{finished.stderr}")
    print(finished.stdout.partition("\n")[0])
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
