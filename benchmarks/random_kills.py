"""Kills runs with SIGKILL at random moments, resumes them, and compares every result with an undisturbed run.

    python -m benchmarks.random_kills --out=docs/results/random_kills [--kills=25] [--seed=0] [--cases=run-1,sweep-4]

The four cases are a run (quickstart made small: infect, FT, AFT, on 448 images of noise) and a sweep of three such
runs, each with 1 and with 4 virtual CPU devices. A case is first carried out once without a kill. Then it is carried
out in new directories. Each start is killed at a moment drawn between its beginning and the time that a whole run
takes, `--per_run` times in a directory before it may end.

Equal must be: all of results.json but the seconds, all lines of metrics.jsonl, the arrays of poison.npz and of the kept
checkpoints of each stage, config.json, and the table of the sweep. kills.csv gets a row for each kill as soon as its
directory is compared.

Exit status: 0 if nothing differs, 1 otherwise.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
# Arguments that make the quickstart small: two thirds of a start are then work, and not compilation.
SMALL: dict[str, int | float | str] = {
    'batch_size': 16,
    'clean_share': 0.2,
    'train.epochs': 3,
    'ft.epochs': 4,
    'model.factory': 'tests.toys:small_network',
    'aft.reference_steps': 25,
    'aft.steps': 25,
    'aft.pgd_steps': 1,
    'aft.universal': 'linf,rectangle',
    'aft.per_image': 'linf',
    'run.log_every': 5,
    'run.checkpoint_every': 10,
}
TABLE = """
from aft_jax.config import table_config
from configs import quickstart

def get_config():
    experiments = {}
    for attack in ('badnets', 'blend', 'sig'):
        config = experiments[attack] = quickstart.get_config(attack)
        config.dataset = 'npz:%s'
        config.update_from_flattened_dict(%r)
    return table_config(experiments, label_modes='all2one', seeds=(0,), stages=('infect', 'purify'), defenses='ft,aft')
"""
COLUMNS = ('case', 'devices', 'directory', 'kill', 'after_seconds', 'stage', 'step', 'differences')


class Case(NamedTuple):
    """A command and its number of devices.

    Attributes:
        name: Name in kills.csv: run or sweep.
        devices: Number of virtual CPU devices.
        arguments: Arguments of the command, without --workdir.
    """

    name: str
    devices: int
    arguments: list[str]

    def start(self, workdir: Path, log: Path) -> subprocess.Popen:
        """Starts the command; its output goes to `log`."""
        command = [sys.executable, *self.arguments, f'--workdir={workdir}']
        environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(self.devices)}
        with log.open('a') as output:
            return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def finish(self, workdir: Path, log: Path) -> float:
        """Carries the command out to its end, and returns the seconds; raises if it fails."""
        started = time.monotonic()
        if status := self.start(workdir, log).wait():
            raise SystemExit(f'{self.name} with {self.devices} devices ended with {status}; see {log}')
        return time.monotonic() - started


def cases(folder: Path) -> list[Case]:
    """Builds the four cases, with their data and their table in `folder`."""
    labels = np.arange(512) % 4
    images = np.random.default_rng(5).integers(0, 200, (512, 12, 12, 1)) + 14 * labels[:, None, None, None]
    arrays: dict[str, np.ndarray] = {'images': images.astype(np.uint8), 'labels': labels}
    splits = {'train': slice(448), 'test': slice(448, None)}
    np.savez(
        folder / 'data.npz',
        **{f'{split}_{name}': arrays[name][part] for split, part in splits.items() for name in arrays},
    )
    (folder / 'table.py').write_text(TABLE % (folder / 'data.npz', SMALL))
    fields = [f'--config.{name}={value}' for name, value in SMALL.items()]
    run = ['-m', 'aft_jax.main', f'--config={ROOT}/configs/quickstart.py', f'--config.dataset=npz:{folder}/data.npz']
    run += [*fields, "--config.stages=('infect','purify')"]
    sweep = ['-m', 'aft_jax.sweep', f'--config={folder}/table.py']
    return [Case(name, n, arguments) for name, arguments in (('run', run), ('sweep', sweep)) for n in (1, 4)]


def contents(workdir: Path) -> dict[str, Any]:
    """Reads everything of a work directory, or of a sweep's, that must not depend on kills, by path."""
    found: dict[str, Any] = {}
    for path in sorted(workdir.rglob('*')):
        name = str(path.relative_to(workdir))
        if path.name == 'results.json':
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name == 'metrics.jsonl':
            # The stages that a sweep or a run resumes are rewritten at the end of the file.
            found[name] = sorted(path.read_text().splitlines())
        elif path.name == 'config.json':
            found[name] = json.loads(path.read_text())
        elif path.name == 'poison.npz':
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.name == 'table.csv':
            found[name] = [row | {'seconds': ''} for row in csv.DictReader(path.read_text().splitlines())]
        elif path.name.isdigit() and (path / 'state').is_dir():
            found[name] = arrays_of(path)
        elif path.name.endswith('.damaged'):
            found[name] = 'set aside'
    return found


def arrays_of(checkpoint: Path) -> dict[str, tuple[str, bytes]]:
    """Reads the arrays of a checkpoint with Orbax alone: dtype and bytes by path."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    import jax
    import orbax.checkpoint as ocp

    checkpointer = ocp.StandardCheckpointer()
    stored = checkpointer.metadata(checkpoint / 'state').item_metadata.tree
    template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored)
    state = checkpointer.restore(checkpoint / 'state', template)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): (str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in leaves}


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """Removes the seconds from the content of a results.json."""
    return {k: without_times(v) if isinstance(v, dict) else v for k, v in results.items() if k != 'seconds'}


def progress(workdir: Path) -> tuple[str, int | str]:
    """Reads the stage and the step of the last whole line of metrics that was written; ('', '') before the first."""
    files = sorted(workdir.rglob('metrics.jsonl'), key=lambda path: path.stat().st_mtime_ns)
    lines = files[-1].read_bytes().splitlines(keepends=True) if files else []
    whole = [json.loads(line) for line in lines if line.endswith(b'\n')]
    if not whole:
        return '', ''
    run = files[-1].parent.name if files[-1].parent != workdir else ''
    return f'{run}:{whole[-1]["stage"]}'.lstrip(':'), whole[-1]['step']


def broken(
    case: Case, folder: Path, expected: tuple[dict[str, Any], float], options: argparse.Namespace
) -> Iterator[dict]:
    """Kills a case `options.kills` times at random moments, and yields a row for each kill.

    Args:
        case: Case.
        folder: Folder of the work directories.
        expected: Contents of an undisturbed run, and its seconds.
        options: Flags.
    """
    generator = np.random.default_rng([options.seed, case.name == 'sweep', case.devices])
    kills, directory = 0, 0
    while kills < options.kills:
        workdir, log, rows = folder / f'{directory}', folder / f'{directory}.log', []
        for _ in range(min(options.per_run, options.kills - kills)):
            moment = float(generator.uniform(0, expected[1]))
            process = case.start(workdir, log)
            try:
                process.wait(moment)
                break  # it was faster than its kill
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            kills += 1
            stage, step = progress(workdir)
            values = case.name, case.devices, directory, kills, round(moment, 2), stage, step
            rows.append(dict(zip(COLUMNS[:-1], values, strict=True)))
        case.finish(workdir, log)
        actual = contents(workdir)
        names = expected[0].keys() | actual.keys()
        differing = sorted(name for name in names if expected[0].get(name) != actual.get(name))
        for row in rows:
            yield row | {'differences': ' '.join(differing)}
        directory += 1


def main() -> int:
    """Runs the cases and writes kills.csv. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder for kills.csv')
    parser.add_argument('--kills', type=int, default=25, help='kills of each case')
    parser.add_argument('--per_run', type=int, default=5, help='kills of a directory before it may end')
    parser.add_argument('--compiled', default='', help='folder of compiled programs, to be used again')
    parser.add_argument('--seed', type=int, default=0, help='seed of the moments')
    parser.add_argument('--cases', default='run-1,run-4,sweep-1,sweep-4', help='comma list')
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    differing = 0
    with tempfile.TemporaryDirectory() as name, (options.out / 'kills.csv').open('a', newline='') as file:
        folder = Path(name)
        os.environ['JAX_COMPILATION_CACHE_DIR'] = options.compiled or str(folder / 'compiled')
        os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if not file.tell():
            writer.writeheader()
        for case in cases(folder):
            if f'{case.name}-{case.devices}' not in options.cases.split(','):
                continue
            place = folder / f'{case.name}-{case.devices}'
            place.mkdir()
            case.finish(place / 'first', place / 'log')  # compiles
            seconds = case.finish(place / 'whole', place / 'log')
            expected = contents(place / 'whole')
            print(
                f'{case.name}, {case.devices} devices: {seconds:.1f} s undisturbed, {len(expected)} files', flush=True
            )
            for row in broken(case, place, (expected, seconds), options):
                writer.writerow(row)
                file.flush()
                differing += bool(row['differences'])
                print(row, flush=True)
    print(f'{differing} kills with differences')
    return 1 if differing else 0


if __name__ == '__main__':
    sys.exit(main())
