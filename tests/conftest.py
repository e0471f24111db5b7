"""Shared by all tests: four CPU devices, strict promotion rules, and a tiny data set, network and run."""

import os
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import pytest
from defense_runs import as_numpy, lines, run_defense

from aft_jax.config import as_options, default_config
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DefenderData
from aft_jax.runtime.preemption import Watch
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.stage import Run, RunOptions

# Set before any backend starts. The environment variable is for the processes that tests start.
os.environ['JAX_PLATFORMS'] = 'cpu'
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests compile far more than they compute, and XLA compiles twice as fast with this setting.
jax.config.update('jax_disable_most_optimizations', True)

# Compiled programs are shared by all test processes, and with the next run.
CACHE = Path(__file__).parent.parent / '.jax_cache'
for name, value in {'jax_compilation_cache_dir': str(CACHE), 'jax_persistent_cache_min_compile_time_secs': 0.0}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

CLASSES = 4
SIDE = 8
# Two workers take one file after another. The slowest files come first, so that both workers end at about the same
# time.
FIRST = ('test_distributed', 'test_kill_resume', 'test_experiment', 'test_sweep', 'test_training')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the slowest files to the front."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


class TinyNet(nn.Module):
    """A tiny network with BatchNorm, dropout and two dense layers."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16)(images.reshape((len(images), -1)) - 0.5)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(CLASSES)(x)


def structured_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws noise with one bright quarter per class: uint8 [count, 8, 8, 1] and int32 [count]."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.int32)
    images = generator.integers(0, 120, (count, SIDE, SIDE, 1))
    half = SIDE // 2
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * half : (row + 1) * half, column * half : (column + 1) * half] += 100
    order = generator.permutation(count)
    return images[order].astype(np.uint8), labels[order]


@pytest.fixture(scope='session')
def dataset() -> Dataset:
    """80 training and 24 test images of 8x8x1 in four classes, 20 training images a class."""
    train, test = structured_images(80, 1), structured_images(24, 2)
    for array in (*train, *test):
        array.setflags(write=False)  # writing into shared data fails at once
    return Dataset('tiny', *train, *test, class_names=('north-west', 'north-east', 'south-west', 'south-east'))


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    """The defaults, shrunk to the tiny data set."""
    config = default_config()
    config.batch_size = 8
    config.clean_share = 0.25
    config.ft.learning_rates = (0.01,)
    config.run.log_every = 1
    config.run.checkpoint_every = 1000
    config.run.eval_batch_size = 8
    return config


@pytest.fixture(scope='session')
def tiny_net() -> nn.Module:
    return TinyNet()


@pytest.fixture(scope='session')
def tiny_variables(tiny_net: nn.Module) -> dict:
    """Fresh variables of `tiny_net`."""
    return tiny_net.init(jax.random.key(0), np.zeros((1, SIDE, SIDE, 1), np.float32))


@pytest.fixture
def make_run(tmp_path: Path, config: ml_collections.ConfigDict):
    """A function that makes a `Run` in a named directory; its writers are closed after the test."""
    writers = []

    def make(name: str = 'run', devices: int = 4, **options: int) -> Run:
        workdir = tmp_path / name
        workdir.mkdir(exist_ok=True)
        changed = config.run.copy_and_resolve_references()
        changed.update(options)
        writers.append(MetricWriter(workdir))
        return Run(
            config.seed,
            workdir,
            make_mesh(jax.devices()[:devices]),
            writers[-1],
            as_options(RunOptions, changed),
            Watch(),
        )

    yield make
    for writer in writers:
        writer.close()


@pytest.fixture
def held_data(dataset: Dataset, tiny_net: nn.Module, tiny_variables: dict) -> DefenderData:
    """24 clean images and a fresh network as the infected model."""
    return DefenderData(tiny_net, tiny_variables, dataset.train_images[:24], dataset.train_labels[:24])


@pytest.fixture
def purify(make_run, config: ml_collections.ConfigDict, held_data: DefenderData):
    """A function that purifies with options of a defense, and returns the variables and the lines of metrics.

    It checks that the infected model stays as it was, and that the purified model differs from it.
    """

    def call(defense: str, name: str = 'run', devices: int = 4, **options):
        config[defense].update(options)
        run, infected = make_run(name, devices=devices), as_numpy(held_data.variables)
        purified = as_numpy(run_defense(defense, run, held_data, config).variables)
        jax.tree.map(np.testing.assert_array_equal, as_numpy(held_data.variables), infected)
        for kind, layer, leaf in (('params', 'Dense_0', 'kernel'), ('batch_stats', 'BatchNorm_0', 'mean')):
            assert not np.allclose(purified[kind][layer][leaf], infected[kind][layer][leaf])
        return purified, lines(run)

    return call


@pytest.fixture(scope='session')
def assert_trees_close() -> Callable[..., None]:
    """A function that compares two pytrees leaf by leaf, bit for bit or with an absolute tolerance."""

    def compare(actual, expected, atol: float = 0.0) -> None:
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol, err_msg=str(path), strict=True)

    return compare
