"""Estimates the cost of data parallelism: counts collectives in compiled steps, and estimates two TPU slices on paper.

    python benchmarks/scaling.py [--paper_only] [--csv=docs/results/scaling.csv]

Nothing here runs on a TPU. The steps are compiled, not run, for virtual CPU devices: PreActResNet18, 32x32x3, ten
classes, `configs/cifar10.py`. docs/scaling.md explains the model and shows the tables.
"""

import argparse
import contextlib
import csv
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from aft_jax.adversarial.pgd import perturb
from aft_jax.attacks.training import attack_settings, standard_training
from aft_jax.config import as_options, default_config, resolve
from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses.aft_universal_options import UniversalAftOptions, pgd_of
from aft_jax.defenses.aft_universal_step import aft_step
from aft_jax.models import build, logits_function
from aft_jax.runtime.sharding import batch_sharding, make_mesh, replicated
from aft_jax.training import calls, state
from aft_jax.training.optimiser import sgd
from aft_jax.training.state import Step

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
# '-start' is left out: the result of an asynchronous collective is the result of its '-done'.
LINE = re.compile(rf'^\s*(?:ROOT )?%?\S+ = (.*?) ({"|".join(KINDS)})(?:-done)?\(', re.MULTILINE)
ARRAY = re.compile(r'([a-z]+(\d*)\w*)\[([\d,]*)\]')

SIDE, CLASSES, TRAIN_IMAGES = 32, 10, 50_000
BATCHES = tuple(2**k for k in range(7, 14))
MODEL_FLOPS_UTILISATION = 0.4  # assumed, not measured
HOP_SECONDS = 1e-6  # assumed: "typically around 1us", https://jax-ml.github.io/scaling-book/sharding/
# The same page measured a small all-gather over three hops: 8 us instead of 3.
SLOW_HOP_SECONDS = HOP_SECONDS * 8 / 3
WORTH_IT = 0.7


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: One of KINDS.
        arrays: Number of arrays that it carries.
        bytes: Size of its result on one device.
        name: Operation of the source that it comes from.
    """

    kind: str
    arrays: int
    bytes: int
    name: str


def collectives(text: str) -> list[Collective]:
    """Reads the collectives from the text of an HLO module; a collective in a loop counts once."""
    found = []
    for match in LINE.finditer(text):
        types = ARRAY.findall(match[1])
        size = sum(math.prod(int(n) for n in shape.split(',') if n) * (int(bits or 8) // 8) for _, bits, shape in types)
        line = text[match.start() : text.find('\n', match.end())]
        name = re.search(r'op_name="([^"]*)"', line)
        found.append(Collective(match[2], len(types), size, name[1] if name else ''))
    return found


def purpose(collective: Collective) -> str:
    """Names the purpose of a collective in a partitioned program, from the operation that it comes from."""
    backward = 'transpose(' in collective.name
    if collective.kind != 'all-reduce':
        return f'{collective.kind}: {collective.name.rsplit("/", 1)[-1]}'
    if 'BatchNorm' in collective.name:
        return 'BatchNorm, backward' if backward else 'BatchNorm, forward'
    if backward:
        return 'weight gradients'
    return 'loss and metrics' if collective.bytes <= 4 else f'all-reduce: {collective.name}'


class Programs(NamedTuple):
    """A compiled step: the partitioned program before and after the passes of the backend."""

    partitioned: str
    optimised: str
    compiled: Any


@contextlib.contextmanager
def never_kept() -> Iterator[None]:
    """Turns the persistent compilation cache off, because a program from the cache writes no dump."""
    name = 'jax_persistent_cache_min_compile_time_secs'
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def compiled(function: Any, *arguments: Any) -> Programs:
    """Compiles a jitted function for abstract arguments."""
    lowered = function.lower(*arguments)
    with never_kept(), tempfile.TemporaryDirectory() as name:
        options = {'xla_dump_to': name, 'xla_dump_hlo_pass_re': 'spmd-partitioning'}
        program = lowered.compile(compiler_options=options)
        (partitioned,) = Path(name).glob('*after_spmd-partitioning*')
        return Programs(partitioned.read_text(), program.as_text(), program)


class Subject(NamedTuple):
    """A classifier to compile, with abstract arrays in place of its variables.

    Attributes:
        config: Resolved config.
        module: Classifier.
        variables: Pytree of shapes.
        shape: Shape of one image, [H, W, C].
    """

    config: ml_collections.ConfigDict
    module: nn.Module
    variables: Any
    shape: tuple[int, int, int]


def subject(width: int = 64, dtype: str = 'bfloat16', side: int = SIDE) -> Subject:
    """Builds PreActResNet18 as in configs/cifar10.py, optionally narrower."""
    config = default_config()
    # Half of each batch has per-image perturbations, the other half is distilled from the infected model.
    config.aft_released.update({'adversarial_share': 0.5, 'distillation': 1.0, 'random_start': True, 'clip': True})
    config.aft_released.max_grad_norm = 1.0
    config.model.name, config.model.width, config.dtype = 'preact_resnet', width, dtype
    config.augment.crop, config.augment.flip = 4, True
    config = resolve(config)
    return describe(config, build(config, CLASSES), (side, side, 3))


def describe(config: ml_collections.ConfigDict, module: nn.Module, shape: tuple[int, int, int]) -> Subject:
    """Computes the shapes of a classifier's variables."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.float32))
    return Subject(config, module, variables, shape)


def abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def compile_step(mesh: Mesh, on: Subject, step: Step, before: Any, batch: int, fixed: Any = None) -> Programs:
    """Compiles a training step as the training loop does, with the data set on the devices."""
    data = {
        'images': jax.ShapeDtypeStruct((TRAIN_IMAGES, *on.shape), jnp.uint8),
        'labels': jax.ShapeDtypeStruct((TRAIN_IMAGES,), jnp.int32),
    }
    indices = jax.ShapeDtypeStruct((1, 1, batch), jnp.int32)
    return compiled(calls.compile_steps(mesh, step, None), before, data, fixed, indices, abstract_key())


def training(mesh: Mesh, on: Subject, batch: int) -> Programs:
    """Compiles the step that trains on a poisoned data set."""
    optimiser = sgd(0.01, 'cosine', 1000, momentum=0.9, weight_decay=5e-4)
    before = jax.eval_shape(lambda v: state.create(v, optimiser), on.variables)
    settings = attack_settings(on.config, (TRAIN_IMAGES, *on.shape))
    infecting = standard_training(None, on.module, optimiser, before, settings)
    return compile_step(mesh, on, infecting.step, before, batch)


def adversarial_tuning(mesh: Mesh, on: Subject, batch: int, **changes: Any) -> Programs:
    """Compiles an adversarial step of AFT, perhaps with other options."""
    section = on.config.aft_released
    optimiser = sgd(0.03, 'cosine', 1000, momentum=0.9, weight_decay=5e-4, max_grad_norm=section.max_grad_norm)
    before = jax.eval_shape(lambda v: state.create(v, optimiser), on.variables)
    step = partial(
        aft_step,
        module=on.module,
        optimiser=optimiser,
        options=as_options(UniversalAftOptions, section)._replace(**changes),
        augmentation=as_options(AugmentOptions, on.config.augment),
    )
    return compile_step(mesh, on, step, before, batch, fixed=on.variables)


def attack(mesh: Mesh, on: Subject, batch: int) -> Programs:
    """Compiles PGD alone, on a batch that is divided among the devices."""

    def run(variables, images, labels, key):
        model = logits_function(on.module, variables)
        return perturb(model, images, labels, key, pgd_of(as_options(UniversalAftOptions, on.config.aft_released)))

    whole, cut = replicated(mesh), batch_sharding(mesh, 0)
    images = jax.ShapeDtypeStruct((batch, *on.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    function = jax.jit(run, in_shardings=(whole, cut, cut, whole), out_shardings=cut)
    return compiled(function, on.variables, images, labels, abstract_key())


class Network(NamedTuple):
    """The sizes of a classifier.

    Attributes:
        parameters: Number of parameters.
        norms: Number of BatchNorm layers.
        channels: Number of channels of all BatchNorm layers together.
        forward: FLOPs of one image, two for each multiplication with its addition.
        first: FLOPs of the first layer.
        outputs: Number of values that the convolutions write for one image.
    """

    parameters: int
    norms: int
    channels: int
    forward: float
    first: float
    outputs: int


def measure(on: Subject) -> Network:
    """Counts the parameters, and the work of the convolutions and dense layers."""

    def layers(variables, images):
        keep = lambda module, _: isinstance(module, nn.Conv | nn.Dense)  # noqa: E731
        return on.module.apply(variables, images, capture_intermediates=keep, mutable=['intermediates'])[1]

    image = jax.ShapeDtypeStruct((1, *on.shape), jnp.float32)
    outputs = flatten_dict(jax.eval_shape(layers, on.variables, image)['intermediates'])
    kernels = flatten_dict(on.variables['params'])
    sizes = {path[:-1]: math.prod(out[0].shape) for path, out in outputs.items()}
    flops = {path: 2 * size * math.prod(kernels[*path, 'kernel'].shape[:-1]) for path, size in sizes.items()}
    means = [leaf for path, leaf in flatten_dict(on.variables['batch_stats']).items() if path[-1] == 'mean']
    return Network(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(on.variables['params'])),
        norms=len(means),
        channels=sum(leaf.size for leaf in means),
        forward=sum(flops.values()),
        first=flops['stem',],
        outputs=sum(sizes.values()),
    )


class Work(NamedTuple):
    """The work of a step: FLOPs for an image of the batch, and the number of passes that read or write each weight."""

    flops: float
    passes: int


def work(network: Network, config: ml_collections.ConfigDict) -> dict[str, Work]:
    """Computes the work of the two steps. A backward pass costs two forward passes, one of them for its input."""
    step = Work(3 * network.forward - network.first, 3)  # training does not compute the gradient of the images
    o = config.aft_released
    share = o.adversarial_share
    # PGD; a forward pass on its examples; the infected model's predictions on the rest.
    further = share * (2 * o.pgd_steps + 1) + (1 - share) * (o.distillation > 0)
    passes = 2 * o.pgd_steps + 1 + (share < 1 and o.distillation > 0)
    return {'training': step, 'AFT': Work(step.flops + further * network.forward, step.passes + passes)}


class Slice(NamedTuple):
    """A TPU slice. Figures of one chip are Google's; docs/scaling.md names the pages.

    Attributes:
        name: Accelerator type.
        axes: Number of chips along each axis.
        wraps: Whether each axis is a ring.
        flops: Peak bfloat16 FLOP/s of a chip.
        memory: Bytes of HBM of a chip.
        bandwidth: Bytes a second between HBM and the chip.
        links: Bytes a second that a chip can send over all its links together.
    """

    name: str
    axes: tuple[int, ...]
    wraps: bool
    flops: float
    memory: float
    bandwidth: float
    links: float

    @property
    def chips(self) -> int:
        return math.prod(self.axes)

    @property
    def hops(self) -> int:
        """The hops of an all-reduce: there and back along every axis."""
        return 2 * sum(n // 2 if self.wraps else n - 1 for n in self.axes)


V5E = partial(Slice, wraps=False, flops=197e12, memory=16e9, bandwidth=819e9, links=200e9)
V5P = partial(Slice, flops=459e12, memory=95 * 2**30, bandwidth=2765e9, links=600e9)
# Slices of each kind, smallest to largest; the last one is estimated in full.
SLICES = (
    (V5E('one chip', (1, 1)), V5E('v5e-4', (2, 2)), V5E('v5e-8', (2, 4)), V5E('v5e-16', (4, 4))),
    (
        V5P('one chip', (1, 1, 1), wraps=False),
        V5P('v5p-8', (2, 2, 1), wraps=False),
        V5P('v5p-16', (2, 2, 2), wraps=False),
        V5P('v5p-32', (2, 2, 4), wraps=False),
        V5P('v5p-64', (2, 4, 4), wraps=False),
        V5P('v5p-128', (4, 4, 4), wraps=True),  # 128 TensorCores, two a chip
    ),
)


class Estimate(NamedTuple):
    """Seconds of the parts of one step, which run one after the other without overlap.

    Attributes:
        compute: Seconds of the FLOPs, at the assumed utilisation.
        weights: Extra seconds for reading the weights, beyond `compute`.
        update: Seconds of the optimiser, which updates all parameters on every chip.
        statistics: Seconds of BatchNorm's all-reduces, one forward and one backward a layer.
        gradients: Seconds of the all-reduce of the gradients.
    """

    compute: float
    weights: float
    update: float
    statistics: float
    gradients: float

    @property
    def step(self) -> float:
        return sum(self)

    @property
    def efficiency(self) -> float:
        """The share of `compute` in the step."""
        return self.compute / self.step

    @property
    def largest(self) -> str:
        """The name of the part that takes the most time."""
        return max(self._fields, key=lambda name: getattr(self, name))


def estimate(on: Slice, network: Network, step: Work, batch: int, hop: float = HOP_SECONDS) -> Estimate:
    """Estimates one step on a slice.

    Args:
        on: Slice to estimate.
        network: Sizes of the classifier.
        step: Work of the step.
        batch: Images of a step on all chips together.
        hop: Seconds that a message takes from a chip to its neighbour.
    """
    parameters = 4 * network.parameters
    compute = step.flops * batch / on.chips / (on.flops * MODEL_FLOPS_UTILISATION)
    # Without a ring half of the links are idle.
    rate = on.links * (1 if on.wraps else 0.5)
    reduce_all = on.hops * hop
    return Estimate(
        compute=compute,
        weights=max(0.0, step.passes * parameters / on.bandwidth - compute),
        update=5 * parameters / on.bandwidth,  # reads gradient, parameters, momentum; writes the latter two
        statistics=2 * network.norms * reduce_all,
        gradients=2 * (on.chips - 1) / on.chips * parameters / rate + reduce_all,
    )


def memory(network: Network, images: float) -> dict[str, float]:
    """Estimates the bytes of a chip's memory in AFT, with `images` images on the chip."""
    return {
        'parameters, momentum, gradients, infected model': 16 * network.parameters,
        'data set': TRAIN_IMAGES * (SIDE * SIDE * 3 + 4),
        # bfloat16: output of a convolution, after BatchNorm and after ReLU; and one of them in float32.
        'activations': images * network.outputs * (3 * 2 + 4),
    }


def print_counts(title: str, programs: Programs) -> None:
    """Prints the purposes of a program's collectives, and the collectives after the CPU's passes."""
    print(f'\n{title}')
    partitioned, optimised = collectives(programs.partitioned), collectives(programs.optimised)
    for name in sorted({purpose(c) for c in partitioned}):
        own = [c for c in partitioned if purpose(c) == name]
        print(f'  {name:32s} {len(own):4d} of {sum(c.bytes for c in own):12,d} bytes')
    for kind in KINDS:
        own = [c for c in optimised if c.kind == kind]
        if own:
            print(f'  compiled for CPUs: {kind:19s} {len(own):4d} of {sum(c.bytes for c in own):12,d} bytes')
    if not partitioned and not optimised:
        print('  no collective')


def print_compiled(steps: dict[str, Work], batch: int) -> None:
    """Compiles the steps and prints their collectives and FLOPs."""
    four = make_mesh(jax.devices()[:4])
    full, single = subject(), subject(dtype='float32')
    programs = {'training': training(four, single, batch), 'AFT': adversarial_tuning(four, full, batch)}
    print_counts(f'training step, float32, 4 devices, batch {batch}', programs['training'])
    print_counts(f'training step, bfloat16, 4 devices, batch {batch}', training(four, full, batch))
    print_counts(f'PGD alone, bfloat16, 4 devices, batch {batch}', attack(four, full, batch))
    print_counts(f'AFT step, bfloat16, 4 devices, batch {batch}', programs['AFT'])
    for count in (16, 64):
        mesh = make_mesh(jax.devices()[:count])
        narrow = adversarial_tuning(mesh, subject(width=4), 8192, pgd_steps=1)
        print_counts(f'AFT step, width 4, PGD-1, {count} devices, batch 8192', narrow)
    print()
    for name, program in programs.items():
        analysis = program.compiled.cost_analysis()['flops'] / (batch // 4)
        temporary = program.compiled.memory_analysis().temp_size_in_bytes
        print(f'{name}: GFLOP an image on paper {steps[name].flops / 1e9:.3f}, by XLA {analysis / 1e9:.3f};', end=' ')
        print(f'temporary memory on a CPU device with {batch // 4} images {temporary / 1e6:.0f} MB')


def print_paper(network: Network, steps: dict[str, Work]) -> list[dict[str, Any]]:
    """Prints the estimates and returns them as rows."""
    rows = []
    for slices in SLICES:
        whole = slices[-1]
        print(f'\n{whole.name}: {whole.chips} chips, an all-reduce takes {whole.hops} hops')
        new = [row(slices, network, kind, step, batch) for kind, step in steps.items() for batch in BATCHES]
        print('  '.join(new[0]))
        for values in new:
            print('  '.join(f'{value:>{len(name)}}' for name, value in values.items()))
        rows += new
        needed = memory(network, BATCHES[-1] / whole.chips)
        parts = ', '.join(f'{part} {size / 1e6:,.0f}' for part, size in needed.items())
        print(f'MB of memory a chip in AFT at batch {BATCHES[-1]}: {parts}; it has {whole.memory / 1e6:,.0f}')
    return rows


def row(slices: Sequence[Slice], network: Network, kind: str, step: Work, batch: int) -> dict[str, Any]:
    """Computes the row of one step on the last of the slices, which is the largest."""
    whole = slices[-1]
    here = estimate(whole, network, step, batch)
    slow = estimate(whole, network, step, batch, SLOW_HOP_SECONDS)
    worth = [s.chips for s in slices if estimate(s, network, step, batch).efficiency >= WORTH_IT]
    values: dict[str, Any] = {'slice': whole.name, 'step': kind, 'batch': batch, 'a_chip': batch // whole.chips}
    values |= {f'{name}_ms': f'{seconds * 1e3:.3f}' for name, seconds in here._asdict().items()}
    values |= {'step_ms': f'{here.step * 1e3:.3f}', 'efficiency': f'{here.efficiency:.3f}'}
    values |= {'slow_hops': f'{slow.efficiency:.3f}', 'largest_part': here.largest}
    return values | {'worth_it': max(worth, default=1)}


def main() -> None:
    """Counts, estimates and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=128, help='batch size of the compiled steps')
    parser.add_argument('--paper_only', action='store_true', help='print the estimates only, compile nothing')
    parser.add_argument('--csv', type=Path, help='CSV file for the estimates')
    options = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 64)  # the largest number of devices of a program here

    on = subject()
    network = measure(on)
    steps = work(network, on.config)
    print(f'jax {jax.__version__}; {network}')
    if not options.paper_only:
        print_compiled(steps, options.batch)
    rows = print_paper(network, steps)
    if options.csv:
        with options.csv.open('w', newline='') as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    main()
