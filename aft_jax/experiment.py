"""One experiment: infect a classifier, purify it, measure both. Here, and in evaluation, attack and defense meet.

A model that is there already (`config.init_from`) takes the place of the infected one: its trigger is unknown, so that
it is scanned, and measured on clean images alone.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from aft_jax import data, files, validation
from aft_jax.analysis.backdoor_scan import Scanner
from aft_jax.analysis.observe import observe
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import write_manifest
from aft_jax.config import as_options, resolve
from aft_jax.defenses import DEFENSES
from aft_jax.evaluation.evaluator import Evaluator, test_metrics
from aft_jax.evaluation.scores import detection
from aft_jax.models.cpu_compilation import compiler_options, steps_per_call
from aft_jax.pipeline import export, given_model, stages
from aft_jax.pipeline.given_model import Suspect
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.pipeline.stages import infect, prepare
from aft_jax.report import requirements
from aft_jax.report.experiment_report import draw, show_in_tensorboard
from aft_jax.results import record, workdir
from aft_jax.runtime import compile_cache, processes
from aft_jax.runtime.preemption import Watch
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.checkpoint import checksum
from aft_jax.training.loop import EvalHook, EvalPoint, Run, RunOptions
from aft_jax.training.metrics import MetricWriter


def run_experiment(config: ml_collections.ConfigDict, directory: Path) -> dict[str, Any]:
    """Carries out the stages of `config` in a work directory, from wherever it stands.

    Args:
        config: As a config file made it.
        directory: The work directory.

    Returns:
        What results.json holds.

    Raises:
        UserError: The user has to change something; the sentence says what.
    """
    validation.validate(config)
    if 'report' in config.stages:
        requirements.check_available()
    config = resolve(config)
    compile_cache.use(config.run.compile_cache)
    asked = config
    mesh = make_mesh()
    given = None
    if config.init_from:
        config, given = processes.raise_everywhere(lambda: given_model.load(asked, mesh))
    # Process 0 prepares what is not there yet.
    dataset = processes.process_zero_first(lambda: data.load(config.dataset, config.data))
    scenario = processes.raise_everywhere(lambda: prepare(config, dataset, mesh))
    contents: Any = dataset.arrays
    if given is not None:
        processes.raise_everywhere(partial(given_model.check_fits, given, scenario.module, config, dataset))
        given = given_model.check_normalisation(given, scenario.module, config, dataset, mesh)
        contents = dataset.arrays, given.variables
    # Only now: a config that cannot be carried out must not take the directory.
    content = checksum(contents)
    writes = jax.process_index() == 0
    processes.process_zero_first(lambda: workdir.claim(directory, asked, content, writes, DEFENSES))
    with contextlib.closing(MetricWriter(directory)) as writer, Watch() as watch:
        on_cpu = compiler_options(scenario.module), steps_per_call(scenario.module)
        run = Run(config.seed, directory, mesh, writer, as_options(RunOptions, config.run), watch, *on_cpu)
        return carry_out(run, scenario, config, given)


def carry_out(
    run: Run, scenario: Scenario, config: ml_collections.ConfigDict, given: Suspect | None = None
) -> dict[str, Any]:
    """Infects, scans, purifies, measures and draws, as the config's stages say; returns what results.json holds.

    Args:
        run: The experiment.
        scenario: What it is about.
        config: The resolved config.
        given: The model that is there already, or None.
    """
    writes = jax.process_index() == 0
    evaluator = stages.evaluator_for(run, scenario)
    outcome = record.begin(config, run.mesh, run.workdir / 'results.json')
    scan = Scanner(scenario, run) if 'scan' in config.stages else None
    if given is None:
        infected = infect(run, scenario, config, evaluator)
        if writes:
            write_manifest(run.workdir / 'poison.npz', infected.attack, scenario.poisoned, scenario.clean)
    else:
        infected = InfectedModel(given.variables, None, 0.0)
    attack = infected.attack
    before = evaluator(infected.variables, attack)
    if given is None:
        record.add_infected(outcome, before, infected.seconds)
    else:
        facts = {'init_from': config.init_from, 'class_names': scenario.dataset.class_names, 'warning': given.warning}
        record.add_suspect(outcome, before, facts | ({'scan': scan(infected.variables)} if scan else {}))
    purified = {}
    if 'purify' in config.stages:
        for name in validation.names(config.defenses):
            cleansed = stages.purify(with_eval_hook(run, evaluator, attack), name, scenario, infected, config)
            purified[name] = cleansed.variables
            record.add_purified(outcome, name, before, evaluator(purified[name], attack), cleansed.seconds)
            if cleansed.poison_scores is not None:
                subsets, scores = cleansed.poison_scores
                poisoned = stages.untrusted_training_set(attack, scenario, config).indices
                record.add_detection(outcome, name, detection(scores, subsets, poisoned))
            if scan is not None:
                outcome['purified'][name]['scan'] = scan(purified[name])
    if writes:
        files.write_json(run.workdir / 'results.json', outcome)
        if given is not None and purified:
            export.write(run.workdir / 'export', given, purified, config, outcome)
    if 'report' in config.stages:
        observation = observe(run, scenario, infected, purified, evaluator, record.as_shown(outcome))
        if observation is not None and observation.connection is not None:
            outcome['connection'] = observation.connection
            if writes:
                files.write_json(run.workdir / 'results.json', outcome)
        draw(run.workdir / 'report', scenario, infected, purified, evaluator, record.as_shown(outcome), observation)
        show_in_tensorboard(run, run.workdir / 'report', observation)
    return outcome


def with_eval_hook(run: Run, evaluator: Evaluator, attack: Attack | None) -> Run:
    """Returns a run whose stages write test scores to metrics.jsonl, `run.purify_points` times each, for the report."""

    def evaluate(point: EvalPoint) -> dict[str, float]:
        return {'epoch': point.epochs} | test_metrics(evaluator(point.state.variables, attack))

    points = run.options.purify_points
    return run._replace(eval_hook=EvalHook(evaluate, points=points, at_start=True)) if points else run
