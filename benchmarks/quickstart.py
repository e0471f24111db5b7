"""Times `make quickstart` in a fresh clone in an empty directory, installation included.

    python3 benchmarks/quickstart.py

Prints one line of JSON: seconds of the installation, seconds and peak memory of the job, its ACC and ASR, the machine.
"""

import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def timed(command: list[str], directory: Path) -> float:
    """Runs a command and returns the seconds that it took; raises if it fails."""
    started = time.monotonic()
    subprocess.run(command, cwd=directory, check=True)
    return time.monotonic() - started


def main() -> None:
    """Measures the installation and the job, and prints the figures."""
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / 'aft_jax'
        subprocess.run(['git', 'clone', '--quiet', str(ROOT), str(clone)], check=True)
        # The data set is prepared in the clone too, as on a machine that never ran this.
        os.environ['TFDS_DATA_DIR'] = str(Path(name) / 'data')
        install = timed(['make', '--silent', '.venv/.quickstart'], clone)
        job = timed(['make', '--silent', 'quickstart'], clone)
        # Peak of the largest child process, which is the job.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        results = json.loads((clone / 'runs/quickstart/results.json').read_text())
        revision = subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], cwd=clone, check=True, capture_output=True, text=True
        ).stdout.strip()
    scores = {'infected': results['infected']} | results['purified']
    measured = {
        'install_seconds': round(install, 1),
        'job_seconds': round(job, 1),
        'peak_memory_gib': round(peak, 2),
        'scores': {name: {'acc': s['acc'], 'asr': s['asr']} for name, s in scores.items()},
        'revision': revision,
        'cpu_count': os.cpu_count(),
        'machine': platform.machine(),
        'python': platform.python_version(),
    } | {'jax': results['environment']['jax']}
    print(json.dumps(measured))


if __name__ == '__main__':
    main()
