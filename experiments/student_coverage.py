"""How often Student's t covers no difference where there is none: python experiments/student_coverage.py

Question: BCa covers too little of the means of 50 and 200 problems (`cotfaith validate --full`). Does Student's t? The
writer's two samples of chains to 500 problems (validation/calibration.py), 4,000 repeats, each problem's two samples
dealt to the arms at random. About two minutes.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from cotfaith_mech.validation.calibration import written_pool

POOL, SEED, REPEATS, SIZES = 500, 12, 4000, (16, 50, 200)


def main() -> None:
    rng = np.random.default_rng(0)
    pool = written_pool(POOL, SEED)
    for n in SIZES:
        for name, (first, second) in pool.items():
            difference, covered = second - first, 0
            for _ in range(REPEATS):
                drawn = difference[rng.choice(len(difference), n, replace=False)] * np.where(rng.random(n) < 0.5, -1, 1)
                half = scipy.stats.t.ppf(0.975, n - 1) * drawn.std(ddof=1) / np.sqrt(n)
                covered += abs(drawn.mean()) <= half
            print(f"n={n} {name}: {covered / REPEATS:.3f}")


if __name__ == "__main__":
    main()
