"""Faults that need root: file systems that are full, and folders that not even root may write.

    sudo python -m benchmarks.machine_faults [--folder=/mnt/faults]

A small run is started on a tmpfs of each size. It has to end with one sentence and exit status 2, or 0 where the space
is enough. With more space the same command has to end with the results of an undisturbed run. Then a folder of
checkpoints is made immutable (chattr +i), which has to be reported before any training.

Exit status: 0 if all of it is so, 1 otherwise. It unmounts what it mounts.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.random_kills import Case, cases, contents

SIZES_KB = (100, 200, 300, 450, 700, 900, 1200, 2600)
# Starting takes some seconds. A blocked folder must not cost minutes, as it did.
LONGEST = 60


def attempt(case: Case, workdir: Path, statuses: tuple[int, ...]) -> str:
    """Starts a case that a fault ends. Returns what is wrong with its end, or ''."""
    log = workdir.parent.with_suffix('.log')
    log.unlink(missing_ok=True)
    started = time.monotonic()
    status = case.start(workdir, log).wait()
    text = log.read_text()
    problems = [f'exit status {status}'] if status not in statuses else []
    problems += ['a traceback'] if 'Traceback' in text else []
    if status == 2 and sum(line.startswith('aft_jax: ') for line in text.splitlines()) != 1:
        problems.append('not one sentence')
    if status == 2 and time.monotonic() - started > LONGEST:
        problems.append('late')
    print(f'{workdir}: {status}, {text.strip().splitlines()[-1] if text.strip() else "silent"}', flush=True)
    return ', '.join(problems)


def full_disk(case: Case, place: Path, size_kb: int, expected: dict) -> str:
    """Runs a case on a tmpfs of one size, and again with more space. Returns what is wrong, or ''."""
    place.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size_kb}k', 'tmpfs', str(place)], check=True)
    try:
        if problem := attempt(case, place / 'run', (0, 2)):
            return problem
        subprocess.run(['mount', '-o', 'remount,size=1g', str(place)], check=True)
        return attempt(case, place / 'run', (0,)) or ('' if contents(place / 'run') == expected else 'other results')
    finally:
        subprocess.run(['umount', str(place)], check=True)


def immutable(case: Case, workdir: Path) -> str:
    """Runs a case with a folder of checkpoints that cannot be written. Returns what is wrong, or ''."""
    blocked = workdir / 'checkpoints' / 'infect'
    case.finish(workdir, workdir.with_suffix('.log'))
    subprocess.run(['rm', '-r', str(blocked)], check=True)
    blocked.mkdir()
    subprocess.run(['chattr', '+i', str(blocked)], check=True)
    try:
        return attempt(case, workdir, (2,))
    finally:
        subprocess.run(['chattr', '-i', str(blocked)], check=True)


def main() -> int:
    """Tries all faults. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, help='folder on a file system that knows chattr (the temporary one)')
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        case = cases(folder)[0]
        case.finish(folder / 'whole', folder / 'whole.log')
        expected = contents(folder / 'whole')
        faults: dict[str, Callable[[], str]] = {
            f'tmpfs of {size} KB': lambda size=size: full_disk(case, folder / f'{size}', size, expected)  # type: ignore[misc]
            for size in SIZES_KB
        }
        faults['immutable checkpoints'] = lambda: immutable(case, folder / 'immutable')
        for fault, check in faults.items():
            problem = check()
            failures += bool(problem)
            print(f'{fault}: {problem or "right"}', flush=True)
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
