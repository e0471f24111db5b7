"""Loads finished runs: their data, their attack and their models; and opens runs for further training with them."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from jax.sharding import Mesh

from aft_jax import data, validation
from aft_jax.config import as_options, default_config, resolve, split_names
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES
from aft_jax.errors import UserError, check_choice, user_path
from aft_jax.models.cpu_compilation import compiler_options
from aft_jax.pipeline import stages
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.results import record
from aft_jax.results.workdir import RunFiles
from aft_jax.runtime.preemption import Watch
from aft_jax.training.checkpoint import checksum
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.stage import NotFinished, Run, RunOptions

INFECTED_ONLY = 'none'


def read_defenses(text: str) -> list[str] | None:
    """Parses a flag --defenses: None (all defenses) for '', an empty list for 'none'.

    Raises:
        UserError: The flag names a defense that does not exist.
    """
    names = split_names(text)
    for name in names:
        check_choice('--defenses', name, (*DEFENSES, INFECTED_ONLY))
    return [name for name in names if name != INFECTED_ONLY] if names else None


def read_runs(texts: Sequence[str]) -> list[Path]:
    """Parses a flag --runs of directories whose names tell them apart.

    Raises:
        UserError: A path cannot be used, or two directories have the same name.
    """
    runs = [user_path(text, '--runs') for text in texts]
    if len({path.name for path in runs}) < len(runs):
        raise UserError('--runs has two directories of the same name; rename one of them.')
    return runs


class SavedRun(NamedTuple):
    """A finished run.

    Attributes:
        directory: Work directory.
        config: Resolved config.
        scenario: Data, attack and module of the experiment.
        infected: Infected or benign model.
        purified: Variables of the purified model of each defense.
    """

    directory: Path
    config: ml_collections.ConfigDict
    scenario: Scenario
    infected: InfectedModel
    purified: dict[str, dict]

    @property
    def names(self) -> dict[str, Any]:
        """Fields that name the run in tables."""
        return {
            'run': self.directory.name,
            'dataset': self.config.dataset,
            'model': self.config.model.name,
            'attack': self.config.attack.name,
            'label_mode': self.config.attack.label_mode,
            'seed': self.config.seed,
        }


class Datasets:
    """Cache of data sets, with the checksums of their arrays."""

    def __init__(self) -> None:
        """Creates an empty cache."""
        self._loaded: dict[str, tuple[Dataset, int]] = {}

    def load(self, config: ml_collections.ConfigDict) -> tuple[Dataset, int]:
        """Loads the data set of a run's config, or takes it from the cache; returns it with its checksum."""
        name = json.dumps([config.dataset, config.data.to_dict()], sort_keys=True)
        if name not in self._loaded:
            dataset = data.load(config.dataset, config.data)
            self._loaded[name] = dataset, checksum(dataset.arrays)
        return self._loaded[name]


def load(directory: Path, mesh: Mesh, datasets: Datasets, defenses: Sequence[str] | None = None) -> SavedRun:
    """Loads a finished run.

    The stages of the experiment are carried out again. Each finds its training finished and loads its last checkpoint;
    an unfinished training is an error.

    Args:
        directory: Work directory, which is not changed.
        mesh: Devices.
        datasets: Cache of data sets.
        defenses: Defenses whose models are loaded, if the run has them; None for all.

    Raises:
        UserError: The run has not finished, its files are damaged, or its data set has changed.
    """
    config, recorded_checksum = read_config(directory)
    if config.init_from:
        raise UserError(
            f'{directory} purified the given model {config.init_from}; use its purified models in '
            f'{RunFiles(directory).export} instead.'
        )
    purified = [name for name in _results(directory) if defenses is None or name in defenses]
    dataset, data_checksum = datasets.load(config)
    if recorded_checksum != data_checksum:
        raise UserError(f'the data set {config.dataset} has changed since the run in {directory}; restore the old one.')
    scenario = stages.prepare(config, dataset, mesh, directory)
    run = Run(
        config.seed,
        directory,
        mesh,
        MetricWriter(directory, read_only=True),
        as_options(RunOptions, config.run),
        Watch(),
        must_be_finished=True,
    )
    try:
        infected = stages.infect(run, scenario, config, stages.evaluator_for(run, scenario))
        variables = {name: stages.purify(run, name, scenario, infected, config).variables for name in purified}
    except NotFinished as error:
        raise UserError(
            f'the stage {error.stage} of {directory} has not finished (step {error.step}); start the run again.'
        ) from None
    return SavedRun(directory, config, scenario, infected, variables)


@contextlib.contextmanager
def open_again(source: SavedRun, directory: Path, mesh: Mesh) -> Iterator[Run]:
    """Opens a run for further training with a finished run's models and data.

    Args:
        source: Finished run, which is not changed.
        directory: Work directory of the further training; it is made.
        mesh: Devices.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = as_options(RunOptions, source.config.run)
    with contextlib.closing(MetricWriter(directory)) as writer, Watch() as watch:
        compiler = compiler_options(source.scenario.module)
        yield Run(source.config.seed, directory, mesh, writer, options, watch, compiler)


def read_config(directory: Path) -> tuple[ml_collections.ConfigDict, int]:
    """Reads a run's resolved config and the checksum of its data. Fields that the file lacks get their defaults.

    Raises:
        UserError: The file is missing or damaged, or another version wrote it.
    """
    path = RunFiles(directory).config
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        recorded_checksum = values.pop('data_checksum')
        values.pop('numerics', None)
        config = default_config()
        with config.unlocked():
            _fill(config, values)
    except OSError:
        raise UserError(f'{path} cannot be read: {directory} is not the --workdir of a run.') from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path} is damaged, or was written by another version.') from None
    validation.validate(config)
    return resolve(config), recorded_checksum


def _fill(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
    """Sets the fields of a config to plain values."""
    for name, value in values.items():
        if isinstance(value, dict):
            _fill(config[name], value)
        else:
            config[name] = tuple(value) if isinstance(value, list) else value


def _results(directory: Path) -> list[str]:
    """Reads the names of the defenses in a run's results.json."""
    path = RunFiles(directory).results
    try:
        return [name for name in record.read(path).purified if name in DEFENSES]
    except OSError:
        raise UserError(f'{path} cannot be read: the run has not finished, or {directory} is not a run.') from None
    except ValueError:
        raise UserError(f'{path} is damaged; delete it and start its run again.') from None
