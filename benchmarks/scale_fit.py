"""Fits the published machine's costs to the published tables: ``scale_fit.py [SECONDS]``.

Prints the costs to be kept in guestfault/scale/costs.py, and how well they do on the points they
were fitted to and on the others.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from guestfault.scale.compare import compare, median_error, worst_error
from guestfault.scale.costs import PUBLISHED_MACHINE
from guestfault.scale.fit import fit


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 300.0
    costs, least = fit(PUBLISHED_MACHINE, seconds)
    for name, value in asdict(costs).items():
        print(f"    {name}={value:.3g},")
    print(f"loss {least:.3f}")
    points = list(compare(costs))
    for label, some in (
        ("fitted", [p for p in points if p.fitted]),
        ("judged", [p for p in points if not p.fitted]),
        ("all", points),
    ):
        worst = worst_error(some)
        print(
            f"{label}: median error {median_error(some):.1%}, worst {worst.error:+.0%}"
            f" ({worst.way.value}, {worst.vcpus} vCPUs)"
        )


if __name__ == "__main__":
    main()
