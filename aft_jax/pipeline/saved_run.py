"""SavedRun runs, read back: their data, their attack, and the models that they ended with. Nothing is trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from jax.sharding import Mesh

from aft_jax import data, validation
from aft_jax.config import as_options, default_config, resolve, split_names
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES, FROM_SUSPECT_SET
from aft_jax.errors import UserError, check_choice
from aft_jax.pipeline import stages
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.results import record
from aft_jax.results.workdir import RunFiles
from aft_jax.runtime.preemption import Watch
from aft_jax.training.checkpoint import checksum
from aft_jax.training.loop import NotFinished, Run, RunOptions
from aft_jax.training.metrics import MetricWriter

INFECTED_ONLY = 'none'


def read_defenses(text: str) -> list[str] | None:
    """Returns what a flag --defenses names: None, which is all, for ''; nothing for 'none'.

    Raises:
        UserError: It names a defense that does not exist.
    """
    given = split_names(text)
    for name in given:
        check_choice('--defenses', name, (*DEFENSES, INFECTED_ONLY))
    return [name for name in given if name != INFECTED_ONLY] if given else None


class SavedRun(NamedTuple):
    """A run that has ended.

    Attributes:
        directory: Its work directory.
        config: Resolved.
        scenario: What the experiment was about.
        infected: The infected model, or the benign one.
        purified: Variables by defense.
    """

    directory: Path
    config: ml_collections.ConfigDict
    scenario: Scenario
    infected: InfectedModel
    purified: dict[str, dict]


class Datasets:
    """Data sets by their config, each loaded once, with the checksum of its arrays."""

    def __init__(self) -> None:
        """Has loaded nothing yet."""
        self._loaded: dict[str, tuple[Dataset, int]] = {}

    def load(self, config: ml_collections.ConfigDict) -> tuple[Dataset, int]:
        """Returns the data set of a run's config, and its checksum."""
        name = json.dumps([config.dataset, config.data.to_dict()], sort_keys=True)
        if name not in self._loaded:
            dataset = data.load(config.dataset, config.data)
            self._loaded[name] = dataset, checksum(dataset.arrays)
        return self._loaded[name]


def load(directory: Path, mesh: Mesh, datasets: Datasets, defenses: Sequence[str] | None = None) -> SavedRun:
    """Returns a finished run.

    The experiment's own functions carry it out again; every training finds that it has ended, and is stopped if not.

    Args:
        directory: Its work directory, which is not changed.
        mesh: The devices.
        datasets: Those at hand.
        defenses: Whose models to read, of those that the run has; None for all.

    Raises:
        UserError: It has not finished, its files are damaged, or its data are not there any more.
    """
    config, kept = read_config(directory)
    if config.init_from:
        raise UserError(
            f'{directory} has purified a model from elsewhere ({config.init_from}); what it ended with is in '
            f'{RunFiles(directory).export}.'
        )
    purified = [name for name in _results(directory) if defenses is None or name in defenses]
    dataset, found = datasets.load(config)
    if kept != found:
        raise UserError(f'the data of {config.dataset} are not those that {directory} was made with; bring them back.')
    scenario = stages.prepare(config, dataset, mesh)
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
        variables = {}
        for name in purified:
            suspects = (
                stages.untrusted_training_set(infected.attack, scenario, config) if name in FROM_SUSPECT_SET else None
            )
            held_data = stages.defender_data(scenario, infected, suspects)
            options = stages.defender_config(config, name)
            variables[name] = DEFENSES[name](run, f'purify/{name}', held_data, options).state.variables
    except NotFinished as error:
        raise UserError(
            f'the stage {error.stage} of {directory} has not finished (it is at step {error.step}); start the run again.'
        ) from None
    return SavedRun(directory, config, scenario, infected, variables)


def read_config(directory: Path) -> tuple[ml_collections.ConfigDict, int]:
    """Returns a run's config, with the defaults of fields that are younger than it, and the checksum of its data.

    Raises:
        UserError: There is none, or it is damaged or of another version.
    """
    path = RunFiles(directory).config
    try:
        kept = json.loads(path.read_text())
        found = kept.pop('data_checksum')
        config = default_config()
        with config.unlocked():
            _fill(config, kept)
    except OSError:
        raise UserError(f'{path} cannot be read: {directory} is not the --workdir of a run.') from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path} is damaged, or was written by another version.') from None
    validation.validate(config)
    return resolve(config), found


def _fill(config: ml_collections.ConfigDict, kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        if isinstance(value, dict):
            _fill(config[name], value)
        else:
            config[name] = tuple(value) if isinstance(value, list) else value


def _results(directory: Path) -> list[str]:
    """Returns the defenses that a run has measured."""
    path = RunFiles(directory).results
    try:
        return [name for name in record.read(path).purified if name in DEFENSES]
    except OSError:
        raise UserError(f'{path} cannot be read: the run has not finished, or {directory} is not a run.') from None
    except ValueError:
        raise UserError(f'{path} is damaged; delete it and start its run again.') from None
