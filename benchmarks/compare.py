"""Compares the speed of the package with PyTorch, by turns in one process, after a check that both compute the same.

    python -m benchmarks.compare --models=mnist_cnn,preact_resnet18 --batch=128 [--dtype=bfloat16] [--data=FILE.npz]

    --models        mnist_cnn, preact_resnet18, or both
    --batch         images in a step, comma-separated (128)
    --dtype         dtype of the computation: float32 (default), bfloat16, or both; `released` always uses float32
    --benchmarks    some of training_step, pgd7, aft_step, evaluation, aft_epoch, infecting_epoch (all)
    --baselines     released, tuned (both); see benchmarks/torch_reference.py
    --variants      variants of tuned; the fastest is used: eager, compiled, and on a GPU graphs (all)
    --alternations  number of turns; each times ours and the baselines once (5)
    --data          an .npz file with the training images of an epoch; without it the images are noise
    --images        number of images in an epoch (all; 2560 of noise)
    --tf32          on (default) or off: whether a GPU may round float32 products to TF32, on both sides
    --out           the CSV file that the rows are appended to (docs/results/benchmarks.csv)

Ratios are theirs / ours: above 1 ours is faster. docs/benchmarks.md explains what is timed and how.
Exit status: 0 done, 2 a mistake that you can correct.
"""

import argparse
import datetime
import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from aft_jax.cli import Parser, complain
from aft_jax.errors import UserError, user_path
from aft_jax.runtime.allocator import keep_freed_memory
from benchmarks import agreement, flops, task
from benchmarks.ours import Ours
from benchmarks.record import Ceiling, Row, append, table
from benchmarks.task import Task, first_batch
from benchmarks.timing import Ready, alternate, clock, ratio, warm_up

BASELINES = ('released', 'tuned')
DTYPES = ('float32', 'bfloat16')
VARIANTS = {'cpu': ('eager', 'compiled'), 'gpu': ('eager', 'compiled', 'graphs')}
CHECKED_IMAGES = 32


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses and checks the flags.

    Raises:
        UserError: If a flag is wrong.
    """
    parser = Parser(add_help=False)
    parser.add_argument('--models', default=','.join(task.SHAPES))
    parser.add_argument('--batch', default='128')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--benchmarks', default=','.join(task.BENCHMARKS))
    parser.add_argument('--baselines', default=','.join(BASELINES))
    parser.add_argument('--variants', default='')
    parser.add_argument('--alternations', type=int, default=5)
    parser.add_argument('--data', default='')
    parser.add_argument('--images', type=int, default=0)
    parser.add_argument('--tf32', default='on')
    parser.add_argument('--out', default='docs/results/benchmarks.csv')
    flags = parser.parse_args(arguments)
    variants = VARIANTS['cpu' if jax.default_backend() == 'cpu' else 'gpu']
    flags.variants = flags.variants or ','.join(variants)
    known = {'models': task.SHAPES, 'dtype': DTYPES, 'benchmarks': task.BENCHMARKS, 'baselines': BASELINES}
    for field, allowed in (known | {'variants': variants}).items():
        names = [name.strip() for name in getattr(flags, field).split(',')]
        for name in names:
            if name not in allowed:
                raise UserError(f'--{field} has {name!r}; choose from {", ".join(allowed)}.')
        setattr(flags, field, names)
    if flags.tf32 not in ('on', 'off'):
        raise UserError(f'--tf32={flags.tf32} should be on or off.')
    if not all(size.strip().isdecimal() and int(size) > 0 for size in flags.batch.split(',')):
        raise UserError(f'--batch={flags.batch} should be a number of images, or several with commas between them.')
    flags.batch = [int(size) for size in flags.batch.split(',')]
    if flags.alternations < 1 or flags.images < 0:
        raise UserError('--alternations should be at least 1, and --images no less than 0.')
    flags.out = user_path(flags.out, '--out')
    return flags


def set_up(flags: argparse.Namespace) -> str:
    """Configures both frameworks in the same way; returns the device for torch.

    Raises:
        UserError: If torch is not installed, or cannot use the device that jax uses.
    """
    if importlib.util.find_spec('torch') is None:
        raise UserError("torch is not installed; pip install 'aft_jax[parity]', or on a GPU the build for its CUDA.")
    import torch

    from benchmarks import torch_reference

    backend = jax.default_backend()
    if backend == 'gpu' and not torch.cuda.is_available():
        raise UserError('jax uses the GPU and torch cannot; install its CUDA build, or set JAX_PLATFORMS=cpu.')
    if backend not in ('cpu', 'gpu'):
        raise UserError(f'there is no PyTorch to compare with on {backend}; set JAX_PLATFORMS=cpu.')
    torch_reference.prepare(len(os.sched_getaffinity(0)), flags.tf32 == 'on')
    if backend == 'gpu':
        jax.config.update('jax_default_matmul_precision', 'tensorfloat32' if flags.tf32 == 'on' else 'highest')
    return 'cuda' if backend == 'gpu' else 'cpu'


def rounds(dtype: str, flags: argparse.Namespace) -> bool:
    """Whether products are rounded to less than float32."""
    return dtype != 'float32' or (jax.default_backend() == 'gpu' and flags.tf32 == 'on')


def check_in_float32(name: str, images: task.Images, device: str) -> None:
    """Checks in full float32, on a few images, that all sides agree. For runs whose timed computation rounds more.

    Raises:
        UserError: If they do not agree.
    """
    from benchmarks import torch_reference

    few = images._replace(pixels=images.pixels[:CHECKED_IMAGES], labels=images.labels[:CHECKED_IMAGES])
    small = task.make(name, few, len(few.labels), 'float32')
    with torch_reference.without_tf32(), jax.default_matmul_precision('highest'):
        ours = Ours(small)
        for theirs in (torch_reference.Released(small, device), torch_reference.Tuned(small, device)):
            differences = agreement.compare(ours, theirs, *first_batch(small))
            agreement.require(theirs.name, differences, agreement.EXACT)


def baselines(on: Task, flags: argparse.Namespace, device: str) -> dict[str, Any]:
    """Builds the baselines, by name."""
    from benchmarks import torch_reference

    torch_reference.forget_compiled()
    sides: list[Any] = []
    if 'released' in flags.baselines:
        sides.append(torch_reference.Released(on, device))
    if 'tuned' in flags.baselines:
        sides += [torch_reference.Tuned(on, device, variant) for variant in flags.variants]
    return {side.name: side for side in sides}


def race(on: Task, flags: argparse.Namespace, device: str) -> Iterator[Row]:
    """Yields a row for each benchmark and baseline. A variant of `tuned` that fails is named and left out.

    Raises:
        UserError: If a side does not agree with ours.
    """
    sides, batch = {'ours': Ours(on), **baselines(on, flags, device)}, first_batch(on)
    tolerance = agreement.ROUNDED if rounds(on.config.dtype, flags) else agreement.EXACT
    ready: dict[str, dict[str, Ready]] = {name: {} for name in sides}

    def attempt(name: str, does: Callable[[str], None]) -> None:
        try:
            does(name)
        except Exception as error:
            # torch.compile fails in many ways. Sides without it must not fail.
            if name in ('ours', 'released', 'tuned, eager'):
                raise
            print(f'{name} is left out: {type(error).__name__}: {" ".join(str(error).split())[:200]}')
            del sides[name], ready[name]

    def agree(name: str) -> None:
        if name != 'ours':
            differences = agreement.compare(sides['ours'], sides[name], *batch)
            agreement.require(name, differences, tolerance)
            logits, pixels = differences
            print(f'{name} agrees: logits differ by {logits:.1e} of the largest, and {pixels:.2%} of the pixels')

    def prepare(name: str, benchmark: str) -> None:
        if benchmark not in ready[name]:
            ready[name][benchmark] = warm_up(sides[name].work(benchmark))

    # The check of agreement calls these two, so they are compiled first.
    for benchmark in [name for name in ('evaluation', 'pgd7') if name in flags.benchmarks]:
        for name in list(sides):
            attempt(name, partial(prepare, benchmark=benchmark))
    for name in list(sides):
        attempt(name, agree)
    for benchmark in flags.benchmarks:
        for name in list(sides):
            attempt(name, partial(prepare, benchmark=benchmark))
        yield from rows(on, benchmark, {name: ready[name][benchmark] for name in sides}, flags.alternations)


def rows(on: Task, benchmark: str, ready: dict[str, Ready], alternations: int) -> Iterator[Row]:
    """Times one benchmark and yields a row for each baseline; only the fastest variant of `tuned` is timed."""
    tuned = [name for name in ready if name.startswith('tuned')]
    if len(tuned) > 1:
        fastest = min(tuned, key=lambda name: clock(ready[name].work, ready[name].repeats))
        ready = {name: r for name, r in ready.items() if name not in tuned or name == fastest}
    seconds = alternate(ready, alternations)
    epoch = task.TRAININGS.get(benchmark, ('', False))[1]
    images = on.batch * (on.steps if epoch else 1)
    ours = statistics.median(seconds['ours'])
    for name in ready:
        if name != 'ours':
            yield Row(
                benchmark=f'{on.name}/{benchmark}' + (f' of {len(on.images.labels)}' if epoch else ''),
                baseline=name,
                dtype=on.config.dtype,
                batch=on.batch,
                ours=ours,
                theirs=statistics.median(seconds[name]),
                ratio=ratio(seconds[name], seconds['ours']),
                images_a_second=images / ours,
                flops=flops.an_image(on)[benchmark] * images / ours,
                peaks=(ready['ours'].peak, ready[name].peak),
                first=(ready['ours'].first_seconds, ready[name].first_seconds),
            )


def device_name() -> str:
    """Reads the name of the device, such as 'AMD EPYC; 2 cores'."""
    if jax.default_backend() != 'cpu':
        return jax.devices()[0].device_kind
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').is_file() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'{models[0] if models else platform.machine()}; {len(os.sched_getaffinity(0))} cores'


def versions(flags: argparse.Namespace, device: str) -> str:
    """Formats the versions of both frameworks, and on a GPU the rounding."""
    from benchmarks import torch_reference

    rounding = f'; TF32 {flags.tf32}' if device == 'cuda' else ''
    return f'jax {jax.__version__}; {torch_reference.version(device)}{rounding}'


def ceilings(dtypes: Iterable[str]) -> dict[str, Ceiling]:
    """Measures the limit of the device in each dtype."""
    from benchmarks import ceiling

    return {dtype: ceiling.measure(dtype) for dtype in dtypes}


def run(flags: argparse.Namespace) -> None:
    """Checks that the sides agree, times them, appends rows to the CSV file and prints them."""
    device = set_up(flags)
    images = {name: task.read(name, flags.data, flags.images) for name in flags.models}
    shared = {
        'date': datetime.date.today().isoformat(),
        'device': device_name(),
        'versions': versions(flags, device),
        'alternations': flags.alternations,
    }
    append(flags.out, [], shared)  # reports a file that cannot be written before anything is timed
    print(f'{shared["device"]}; {shared["versions"]}')
    limits = ceilings(flags.dtype)
    for dtype, reached in limits.items():
        product, convolution = reached.product / 1e9, reached.convolution / 1e9
        print(f'ceiling, {dtype}: matrix product {product:,.0f} GFLOP/s, convolution {convolution:,.0f} GFLOP/s')
    done: list[Row] = []
    for name in flags.models:
        if any(rounds(dtype, flags) for dtype in flags.dtype):
            check_in_float32(name, images[name], device)
        for batch in flags.batch:
            for dtype in flags.dtype:
                print(f'{name}, batch {batch}, {dtype}', flush=True)
                for row in race(task.make(name, images[name], batch, dtype), flags, device):
                    append(flags.out, [row], shared)
                    done.append(row)
                    print(f'  {row.benchmark}: {row.ratio.median:.2f} times {row.baseline}', flush=True)
    print(table(done, limits))
    print(f'appended to {flags.out}')


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if {'--help', '-h'} & set(arguments):
        print(__doc__)
        return 0
    # Share of a GPU's memory for jax; the rest is for torch. jax reads it when it creates the first array.
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.45')
    try:
        flags = parse(arguments)
        keep_freed_memory()  # for both sides
        run(flags)
    except UserError as error:
        return complain(error)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
