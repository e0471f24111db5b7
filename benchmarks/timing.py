"""Times several sides by turns, so that a slow phase of the machine slows all of them."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

# Least duration of a timed block.
LEAST_SECONDS = 0.2
# Pause between two blocks, in which spinning threads of the first go to sleep.
REST_SECONDS = 0.25


class Work(NamedTuple):
    """Work that is timed.

    Attributes:
        run: Function that does the work a number of times, and returns when the device has finished.
        peak: Function that returns the peak bytes of memory beside weights, optimiser and data, or NaN if unknown. It
            may do the work once.
        units: Number of steps or epochs that the work contains.
    """

    run: Callable[[int], None]
    peak: Callable[[], float]
    units: int = 1


class Ready(NamedTuple):
    """Work that has been compiled and warmed up.

    Attributes:
        work: Work to time.
        repeats: Number of repeats in a timed block.
        seconds: First estimate of the seconds of one unit.
        first_seconds: Extra seconds of the first call: tracing, compiling, tuning.
        peak: Peak bytes of memory, as in `Work`.
    """

    work: Work
    repeats: int
    seconds: float
    first_seconds: float
    peak: float


class Ratio(NamedTuple):
    """Ratios theirs / ours of the same turn; above 1 ours is faster."""

    median: float
    least: float
    most: float


def clock(work: Work, repeats: int) -> float:
    """Does the work `repeats` times and returns the seconds of one unit."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        work.run(repeats)
        return (time.perf_counter() - started) / (repeats * work.units)
    finally:
        gc.enable()


def warm_up(work: Work) -> Ready:
    """Does the work until it is compiled, and measures its time and its memory."""
    first = clock(work, 1) * work.units
    peak = work.peak()
    steady = clock(work, 1) * work.units
    repeats = max(1, math.ceil(LEAST_SECONDS / steady))
    return Ready(work, repeats, steady / work.units, max(0.0, first - steady), peak)


def alternate(contestants: Mapping[str, Ready], alternations: int) -> dict[str, list[float]]:
    """Times all contestants once in each turn; returns the seconds of one unit of each, turn by turn."""
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
    """Does work once and returns the rise of this process's memory in bytes; NaN if unknown."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives free memory back to the system, so that its use counts as a rise
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
        before = _status('VmRSS')
        run(1)
        return _status('VmHWM') - before
    except (OSError, AttributeError):
        run(1)
        return math.nan


def _status(field: str) -> float:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f'{field}:'))
