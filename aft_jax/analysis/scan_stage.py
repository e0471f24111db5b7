"""The stage 'scan' of an experiment: the scanner, and what it needs of the experiment's models and data."""

from collections.abc import Callable
from functools import partial

import ml_collections
from jax.sharding import Mesh

from aft_jax.analysis.backdoor_scan import Scan, ScanInputs, Scanner, choose_scan_images
from aft_jax.analysis.trigger_search import SearchOptions
from aft_jax.config import as_options
from aft_jax.defenses.aft import with_shift
from aft_jax.defenses.reference import fit_reference
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.pipeline.stages import defender_data, defense_settings
from aft_jax.training.stage import Run


def scan_function(
    run: Run, scenario: Scenario, infected: InfectedModel, config: ml_collections.ConfigDict
) -> Callable[..., Scan]:
    """Builds the function that scans the models of an experiment: (variables, *, purified) -> Scan.

    The arguments are those of `prepare`.
    """
    inputs = prepare(run, scenario, infected, config)
    return partial(scanner_for(scenario, run.mesh, len(inputs.images.labels), config).scan, inputs)


def prepare(run: Run, scenario: Scenario, infected: InfectedModel, config: ml_collections.ConfigDict) -> ScanInputs:
    """Chooses the images of the scan, and trains its reference model.

    The reference has the options of AFT's, and other random numbers, so that AFT was not trained against it.

    Args:
        run: Experiment.
        scenario: Data and module.
        infected: Infected or given model.
        config: Resolved config.
    """
    data = defender_data('aft', scenario, infected, config)
    settings = with_shift(defense_settings('aft', config), scenario.dataset.image_shape)
    reference = fit_reference(run, 'scan/reference', data, settings)
    images = choose_scan_images(scenario.dataset, scenario.clean, run.seed)
    return ScanInputs(images, reference.state.variables, run.seed)


def scanner_for(
    scenario: Scenario, mesh: Mesh, num_images: int, config: ml_collections.ConfigDict, last: Scanner | None = None
) -> Scanner:
    """Creates the scanner of an experiment.

    Args:
        scenario: Data and module.
        mesh: Devices.
        num_images: Number of images of the scan.
        config: Resolved config.
        last: Scanner of another experiment, which is used again if it fits, so that nothing recompiles.
    """
    dataset = scenario.dataset
    scanner = Scanner(
        scenario.module,
        mesh,
        dataset.image_shape,
        dataset.num_classes,
        batch_size=min(config.run.eval_batch_size, num_images),
        options=as_options(SearchOptions, config.scan),
    )
    return last if last is not None and last.setting == scanner.setting else scanner
