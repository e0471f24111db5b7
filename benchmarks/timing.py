"""Times pieces of work by turns, so that whatever slows the machine for a while slows all of them."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

# One timed block lasts at least so long.
LEAST_SECONDS = 0.2
# Between two blocks: threads that still spin after the one go to sleep before the other needs the cores.
REST_SECONDS = 0.25


class Work(NamedTuple):
    """Something that is timed.

    Attributes:
        run: Does it so often, and returns when the device has done it.
        peak: Returns the most bytes of memory that it needs beside weights, optimiser and data; may do it once. NaN
            where that cannot be told.
        units: Steps or epochs that are done each time.
    """

    run: Callable[[int], None]
    peak: Callable[[], float]
    units: int = 1


class Ready(NamedTuple):
    """Work that has been compiled and warmed up.

    Attributes:
        work: The work.
        repeats: How often it is done in a timed block.
        seconds: Of one unit, a first estimate.
        first_seconds: What the first time took longer than later ones: tracing, compiling, tuning.
        peak: Bytes.
    """

    work: Work
    repeats: int
    seconds: float
    first_seconds: float
    peak: float


class Ratio(NamedTuple):
    """How many times as long theirs took as ours, turn by turn; above 1 ours is the faster."""

    median: float
    least: float
    most: float


def clock(work: Work, repeats: int) -> float:
    """Returns the seconds of one unit of the work, done `repeats` times."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        work.run(repeats)
        return (time.perf_counter() - started) / (repeats * work.units)
    finally:
        gc.enable()


def warm_up(work: Work) -> Ready:
    """Does the work until it is compiled, and looks at how long it takes and what memory it needs."""
    first = clock(work, 1) * work.units
    peak = work.peak()
    steady = clock(work, 1) * work.units
    repeats = max(1, math.ceil(LEAST_SECONDS / steady))
    return Ready(work, repeats, steady / work.units, max(0.0, first - steady), peak)


def alternate(contestants: Mapping[str, Ready], alternations: int) -> dict[str, list[float]]:
    """Returns the seconds of one unit of each, turn by turn: the first, the second, ..., and the first again."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(alternations):
        for name, ready in contestants.items():
            time.sleep(REST_SECONDS)
            seconds[name].append(clock(ready.work, ready.repeats))
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> Ratio:
    """Compares two contestants within each turn."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def resident_rise(run: Callable[[int], None]) -> float:
    """Does work once, and returns by how many bytes the memory of this process rose meanwhile; NaN if unknown."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, or it would be used without a rise
        Path('/proc/self/clear_refs').write_text('5')  # forgets the highest mark so far
        before = _status('VmRSS')
        run(1)
        return _status('VmHWM') - before
    except (OSError, AttributeError):
        run(1)
        return math.nan


def _status(field: str) -> float:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f'{field}:'))
