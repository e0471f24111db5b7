"""One experiment: obtain a backdoored classifier, purify it, and measure both models.

Attack and defense meet only here and in the evaluation. A given model (`config.init_from`) takes the place of the
infected one. Its trigger is unknown, so it is scanned, and measured on clean images only.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from aft_jax import data, files, validation
from aft_jax.analysis import scan_stage
from aft_jax.analysis.backdoor_scan import Scan
from aft_jax.analysis.observe import observe
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import write_manifest
from aft_jax.config import UNPURIFIED, as_options, resolve, split_names
from aft_jax.defenses import DEFENSES
from aft_jax.evaluation.evaluator import Evaluator, test_metrics
from aft_jax.evaluation.scores import PoisonDetection, Scores, poison_detection
from aft_jax.models.cpu_compilation import compiler_options, steps_per_call
from aft_jax.pipeline import export, given_model, network, stages
from aft_jax.pipeline.assumptions import assumptions
from aft_jax.pipeline.clean_set import check_clean_set
from aft_jax.pipeline.given_model import FromFile, GivenModel
from aft_jax.pipeline.normalisation import check_normalisation
from aft_jax.pipeline.reference_outputs import check_reference_outputs
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.pipeline.tainted_stage import NO_TAINTED, Tainted, leave_out_tainted
from aft_jax.report import requirements
from aft_jax.report.experiment_report import show_in_tensorboard, write_report
from aft_jax.results import record, workdir
from aft_jax.results.drawn_trigger import DrawnTrigger
from aft_jax.results.environment import environment
from aft_jax.results.record import GivenFacts, ModelScores, PurifiedScores, Results, Setting
from aft_jax.results.workdir import RunFiles
from aft_jax.runtime import compile_cache, numerics, processes, storage
from aft_jax.runtime.preemption import Watch
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.checkpoint import checksum
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.stage import EvalHook, EvalPoint, Run, RunOptions

# Defense that is tried if the others lose too much accuracy.
MILDER = 'ft'


class Experiment(NamedTuple):
    """Everything that an experiment starts from.

    Attributes:
        config: Resolved config, with `model` filled in from a given model.
        scenario: Data, attack and architecture.
        given: Given model; None if the experiment trains the first model itself.
        tainted: Images that look tainted and are left out.
    """

    config: ml_collections.ConfigDict
    scenario: Scenario
    given: GivenModel | None
    tainted: Tainted = NO_TAINTED


def run_experiment(config: ml_collections.ConfigDict, directory: Path) -> Results:
    """Runs the stages of a config in a work directory. Stages that finished earlier are loaded, others are resumed.

    Args:
        config: Config as a config file made it.
        directory: Work directory.

    Returns:
        The content of results.json.

    Raises:
        UserError: The user has to change something, which the message names.
    """
    validation.validate(config)
    if 'report' in config.stages:
        requirements.check_available()
    config = resolve(config)
    compile_cache.use(config.run.compile_cache)
    numerics.pin()
    mesh = make_mesh()
    experiment = load(config, mesh, directory)
    # Only now: a config that cannot be run must not claim the directory.
    contents: Any = experiment.scenario.dataset.arrays
    if experiment.given is not None:
        contents = contents, experiment.given.variables
    content = checksum(contents)
    claim = processes.process_zero_first(lambda: workdir.claim(directory, config, content, _writes(), DEFENSES))
    with (
        claim,
        storage.explained(RunFiles(directory).config),
        contextlib.closing(MetricWriter(directory)) as writer,
        Watch() as watch,
    ):
        if _writes():
            network.store(experiment.scenario.module, directory)
        module = experiment.scenario.module
        on_cpu = compiler_options(module), steps_per_call(module)
        run = Run(config.seed, directory, mesh, writer, as_options(RunOptions, config.run), watch, *on_cpu)
        return run_stages(run, experiment)


def load(config: ml_collections.ConfigDict, mesh: Mesh, directory: Path) -> Experiment:
    """Loads the data and the given model, if there is one, and checks that they fit the config.

    Args:
        config: Resolved config.
        mesh: Devices.
        directory: Work directory, which is only read.

    Raises:
        UserError: Something cannot be loaded, or does not fit.
    """
    given = None
    if config.init_from:
        if _writes():
            print(f'Reading {config.init_from}', flush=True)
        config, given = processes.raise_everywhere(partial(given_model.load, config, mesh))
        if _writes():
            print(f'Reading {config.dataset}', flush=True)
    # Process 0 prepares data that are not there yet.
    dataset = processes.process_zero_first(lambda: data.load(config.dataset, config.data))
    if given is not None:
        processes.raise_everywhere(partial(given_model.check_count, config, dataset))
        config = given_model.fit_batch_size(config, len(dataset.train_labels), mesh)
    scenario = processes.raise_everywhere(lambda: stages.prepare(config, dataset, mesh, directory))
    if given is not None:
        check = partial(given_model.check_compatible, given, scenario.module, config, dataset)
        given = processes.raise_everywhere(check)
        if config.init_logits:
            check_reference_outputs(given.variables, scenario.module, config, dataset.image_shape, mesh)
        elif isinstance(given.origin, FromFile) and _writes():
            print('\n'.join(assumptions(config, dataset)), flush=True)
        given = check_normalisation(given, scenario.module, config, dataset, mesh)
        given = check_clean_set(given, scenario.module, config, dataset, mesh)
    return Experiment(config, scenario, given)


def run_stages(run: Run, experiment: Experiment) -> Results:
    """Obtains the first model, evaluates it, purifies it with each defense, and writes the results and the report."""
    if experiment.given is not None:
        experiment = without_tainted(run, experiment)
    config, scenario, given, _ = experiment
    run_files = RunFiles(run.workdir)
    evaluator = stages.evaluator_for(run, scenario)
    infected = obtain_model(run, experiment, evaluator)
    scan = scan_stage.scan_function(run, scenario, infected, config) if 'scan' in config.stages else None
    scans = {UNPURIFIED: scan(infected.variables, purified=False)} if scan else {}
    before = evaluator.evaluate(infected.variables, infected.attack)
    results = begin_results(run, experiment, infected, before, scans.get(UNPURIFIED))
    purified: dict[str, dict] = {}

    def purify_and_measure(name: str) -> None:
        variables, seconds, detection = purify(run, name, experiment, infected, evaluator)
        after = evaluator.evaluate(variables, infected.attack)
        if scan:
            scans[name] = scan(variables, purified=True)
        found = scans[name].fields if scan else None
        scores = PurifiedScores.compared(before, after, seconds, detection=detection, scan=found)
        results.add_purified(name, scores)
        purified[name] = variables

    if 'purify' in config.stages:
        for name in split_names(config.defenses):
            purify_and_measure(name)
        if given is not None:
            results.withhold(config.safety.largest_loss)
            # Fine-tuning is milder.
            if purified and purified.keys() <= results.withheld.keys() and not given.doubt and MILDER not in purified:
                purify_and_measure(MILDER)
                results.withhold(config.safety.largest_loss)
    if _writes():
        files.write_json(run_files.results, results.to_json())
        if given is not None and purified:
            export.write(run_files.export, given, purified, config, results)
    if 'report' in config.stages:
        report(run, experiment, evaluator, infected, purified=purified, results=results, scans=scans)
    return results


def without_tainted(run: Run, experiment: Experiment) -> Experiment:
    """Leaves out images that look tainted. The experiment has a given model."""
    config, scenario, given, _ = experiment
    assert given is not None
    scenario, left = leave_out_tainted(run, scenario, given.variables, config)
    config = given_model.fit_batch_size(config, len(scenario.clean), run.mesh)
    return Experiment(config, scenario, given, left)


def obtain_model(run: Run, experiment: Experiment, evaluator: Evaluator) -> InfectedModel:
    """Takes the given model, or trains one on the attacker's training set and writes the manifest of the poison.

    Args:
        run: Run of the experiment.
        experiment: Experiment.
        evaluator: Evaluator of the test set.
    """
    config, scenario, given, _ = experiment
    if given is not None:
        return InfectedModel(given.variables, attack=None, seconds=0.0)
    infected = stages.infect(run, scenario, config, evaluator)
    if _writes():
        manifest = RunFiles(run.workdir).poison_manifest
        write_manifest(manifest, infected.attack, scenario.poisoned, scenario.clean)
    return infected


def begin_results(
    run: Run, experiment: Experiment, infected: InfectedModel, scores: Scores, scan: Scan | None
) -> Results:
    """Makes the results with the first model, and with what an earlier start recorded.

    Args:
        run: Run of the experiment.
        experiment: Experiment.
        infected: First model.
        scores: Its scores.
        scan: Its scan; None without the stage 'scan'.
    """
    config, scenario, given, left = experiment
    facts = None
    if given is not None:
        names = scenario.dataset.class_names
        facts = GivenFacts(config.init_from, names, given.warning, given.doubt, left.indices)
    seconds = infected.seconds if given is None else None
    initial = ModelScores.of(scores, seconds, scan=scan.fields if scan else None)
    trigger = DrawnTrigger.of(config, scenario.dataset.image_shape)
    results = Results(Setting.of(config), environment(run.mesh), initial, facts, trigger=trigger)
    if earlier := record.read_or_set_aside(RunFiles(run.workdir).results, _writes()):
        results.keep_earlier(earlier)
    return results


def purify(
    run: Run, name: str, experiment: Experiment, infected: InfectedModel, evaluator: Evaluator
) -> tuple[dict, float, PoisonDetection | None]:
    """Runs a defense on the first model.

    Args:
        run: Run of the experiment.
        name: Name of the defense.
        experiment: Experiment.
        infected: First model.
        evaluator: Evaluator, for the test scores in metrics.jsonl. The defense does not see them.

    Returns:
        The purified variables, the seconds, and the detection of poisoned images if the defense tries that.
    """
    config, scenario = experiment.config, experiment.scenario
    run = with_eval_hook(run, evaluator, infected.attack)
    purified = stages.purify(run, name, scenario, infected, config)
    detection = None
    if purified.poison_scores is not None:
        subsets, scores = purified.poison_scores
        poisoned = stages.untrusted_training_set(infected.attack, scenario, config)
        detection = poison_detection(scores, subsets, poisoned.indices)
    return purified.variables, purified.seconds, detection


def report(
    run: Run,
    experiment: Experiment,
    evaluator: Evaluator,
    infected: InfectedModel,
    *,
    purified: dict[str, dict],
    results: Results,
    scans: dict[str, Scan],
) -> None:
    """Observes the models, adds the observation to the results, and writes the report.

    Args:
        run: Run of the experiment.
        experiment: Experiment.
        evaluator: Evaluator of the test set.
        infected: First model.
        purified: Variables by defense.
        results: Results; the observation is added.
        scans: Scans of this start by defense, and by UNPURIFIED for the first model; empty without the stage 'scan'.
    """
    run_files, first = RunFiles(run.workdir), results.first_model
    observation = observe(run, experiment.scenario, infected, purified, evaluator, first)
    if observation is not None and observation.connection is not None:
        results.add_observation(observation.connection)
        if _writes():
            files.write_json(run_files.results, results.to_json())
    models = {first: infected.variables} | purified
    write_report(
        run_files,
        results,
        observation,
        evaluator=evaluator,
        models=models,
        attack=infected.attack,
        scans=scans,
        tainted=experiment.tainted.images,
    )
    show_in_tensorboard(run, observation)


def with_eval_hook(run: Run, evaluator: Evaluator, attack: Attack | None) -> Run:
    """Adds a hook to a run that writes test scores to metrics.jsonl, `run.purify_points` times a stage."""

    def evaluate(point: EvalPoint) -> dict[str, float]:
        return {'epoch': point.epochs} | test_metrics(evaluator.evaluate(point.state.variables, attack))

    points = run.options.purify_points
    return run._replace(eval_hook=EvalHook(evaluate, points=points, at_start=True)) if points else run


def _writes() -> bool:
    """Checks whether this process writes files."""
    return jax.process_index() == 0
