"""How much faster compiled engines are than eager PyTorch and than the published acceleration, in one run.

    python benchmarks/speed.py --geometry bench-small --output speed.json
    python benchmarks/speed.py --task mmu --geometry bench-small-27 --output speed_mmu.json

Random weights and random decisions. t2i: one picture, batch of one prompt with guidance. mmu: a 32-token answer about
one picture, and prefill alone. Everything takes turns on the same number of threads; figures are medians over
`--repeats` rounds. `ratios` says "fast over slow": how many times faster. Eager code is held against the peak of matrix
products in PyTorch that was measured right behind it (`share_of_peak`); that of ONNX Runtime, whose kernels are others,
stands with the peaks. What decodes token by token multiplies one row with every weight, which is read from memory for
it: such work is also held against the peak of products of one row (`share_of_attainable`: the time that work of either
kind would take at its peak, over the time it took).

`--bundles DIR` keeps bundles and finished rounds: bundles are used again, and a run that was cut short goes on. Delete
`*.rounds.json` there to measure anew. `--skip bf16` leaves out calls and checks whose name the regular expression is
found in, and bundles that no others need: a processor without bfloat16 instructions takes a hundred times as long.

Before the first round everything runs about twice, to check results, to count work and to warm up. By the work there
is, and supposing two cores that do 180 GFLOP/s, a round takes some 4 minutes for t2i (bench-small) and 1 for mmu
(bench-small-27); building comes before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.answering import answering
from benchmarks.bundles import Bundles, compiler_digest
from benchmarks.drawing import drawing
from benchmarks.geometries import GEOMETRIES
from benchmarks.measuring import machine, parser, report
from benchmarks.rounds import Rounds, dtype_of
from benchmarks.subject import Count

TASKS = {"t2i": drawing, "mmu": answering}
DEFAULT_GEOMETRY = {"t2i": "bench-small", "mmu": "bench-small-27"}


def measure(
    task: str, geometry: str, repeats: int, threads: int, folder: Path, skip: str | None = None
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    config = GEOMETRIES[geometry]
    bundles = Bundles(folder, config)
    subject = TASKS[task](bundles, threads)
    if skip is not None:
        subject = subject.without(skip)
    about = {
        "task": task,
        "geometry": {"name": geometry, **config.to_dict()},
        "threads": threads,
        "machine": machine(),
    }
    code = {"compiler": compiler_digest(), "calls": list(subject.calls)}
    rounds = Rounds(folder, f"{task}-{geometry}", about | code)
    errors = rounds.once("errors", lambda: _counted(subject.checks))
    for name, error in errors.items():
        print(f"  {name}: {error:.2g}", flush=True)
    flops = rounds.once("flops", lambda: _counted(subject.flops))
    one_row = rounds.once("one_row", lambda: _counted(subject.one_row))
    for call in subject.calls.values():  # engines load, and memory is taken
        call()
    rounds.run(subject.calls, repeats)
    seconds = rounds.seconds()

    def attained(name: str, row: dict[str, Any], in_rows: float) -> float:
        return share_of_attainable(name, flops[name], in_rows, row["seconds"][name], row["beside"][name])

    def shares(in_rows: dict[str, float]) -> dict[str, float]:
        """Medians over the rounds, in each against the peaks beside the call."""
        return {
            name: statistics.median(attained(name, row, in_rows.get(name, 0)) for row in rounds.rows)
            for name in flops
        }

    return {
        **about,
        "repeats": repeats,
        "seconds": seconds,
        "build_seconds": bundles.build_seconds,
        "errors": errors,
        "gflops_per_second": {name: work / seconds[name] / 1e9 for name, work in flops.items()},
        "matmul_peak": rounds.peaks(),
        "skipped": skip,
        "share_of_peak": shares({}),
        "share_of_attainable": shares(one_row),
        "ratios": {f"{fast} over {slow}": seconds[slow] / seconds[fast] for fast, slow in subject.pairs},
    }


def _counted(counts: Mapping[str, Count]) -> dict[str, float]:
    return {name: count() for name, count in counts.items()}


def share_of_attainable(
    name: str, work: float, one_row: float, seconds: float, peak: dict[str, float]
) -> float:
    """The seconds that `work` operations take at this machine's peaks, over those that call `name` took.

    `one_row` of them are products of one row. `peak` is in GFLOP/s.
    """
    dtype = dtype_of(name)
    least = (work - one_row) / peak[str(dtype)] + one_row / peak[f"{dtype}, one row"]
    return least / 1e9 / seconds


def arguments() -> argparse.Namespace:
    options = parser(__doc__, repeats=3)
    options.add_argument("--task", choices=TASKS, default="t2i")
    options.add_argument("--geometry", choices=GEOMETRIES)
    options.add_argument("--skip", metavar="REGEX", help="names of calls that are left out")
    options.add_argument("--bundles", type=Path, help="folder that keeps bundles and finished rounds")
    return options.parse_args()


def main() -> None:
    given = arguments()
    geometry = given.geometry or DEFAULT_GEOMETRY[given.task]
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.bundles or Path(scratch)
        report(measure(given.task, geometry, given.repeats, given.threads, folder, given.skip), given.output)


if __name__ == "__main__":
    main()
