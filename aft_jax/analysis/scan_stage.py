"""The stage 'scan' of an experiment: everything that a scanner needs, from the experiment's models and data."""

import ml_collections

from aft_jax.analysis.backdoor_scan import Scanner, choose_scan_images
from aft_jax.analysis.trigger_search import SearchOptions
from aft_jax.config import as_options
from aft_jax.defenses.aft import with_shift
from aft_jax.defenses.reference import fit_reference
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.pipeline.stages import defender_data, defense_settings
from aft_jax.training.stage import Run


def prepare(run: Run, scenario: Scenario, infected: InfectedModel, config: ml_collections.ConfigDict) -> Scanner:
    """Chooses the images of the scan, trains its reference model, and builds the scanner.

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
    return Scanner(
        scenario.module,
        run.mesh,
        choose_scan_images(scenario.dataset, scenario.clean, run.seed),
        run.options.eval_batch_size,
        reference=reference.state.variables,
        options=as_options(SearchOptions, config.scan),
        seed=run.seed,
    )
