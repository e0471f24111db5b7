"""One experiment: infect a classifier, purify it, measure both. Here, and in evaluation, attack and defense meet.

A model that is there already (`config.init_from`) takes the place of the infected one: its trigger is unknown, so that
it is scanned, and measured on clean images alone.
"""

import contextlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from aft_jax import attacks, data, distributed, export, models, results, suspect, validation, workdir
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import Poisoned, clean_indices, left_behind, poison, write_manifest
from aft_jax.config import resolve
from aft_jax.data.batches import count_steps
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES, FROM_SUSPECT_SET, NEED_FEATURES, Holdings
from aft_jax.errors import UserError
from aft_jax.evaluation import Scores, detection
from aft_jax.exhibition import draw, observe, show_in_tensorboard
from aft_jax.judge import Judge
from aft_jax.models.cpu_options import compiler_options, steps_per_call
from aft_jax.models.factory import shows_features
from aft_jax.randomness import key_for
from aft_jax.report import pictures
from aft_jax.scan import Scanner
from aft_jax.suspect import Suspect
from aft_jax.training import compile_cache, optimiser, state
from aft_jax.training.checkpoint import checksum
from aft_jax.training.loop import Onlooker, Phase, Run, fit
from aft_jax.training.mesh import check_batch_size, make_mesh
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.preemption import Watch
from aft_jax.victim import Infected, Victim


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
        pictures.check_available()
    config = resolve(config)
    compile_cache.use(config.run.compile_cache)
    asked = config
    mesh = make_mesh()
    given = None
    if config.init_from:
        config, given = distributed.together(lambda: suspect.load(asked, mesh))
    # Process 0 prepares what is not there yet.
    dataset = distributed.first_alone(lambda: data.load(config.dataset, config.data))
    victim = distributed.together(lambda: prepare(config, dataset, mesh))
    contents: Any = dataset.arrays
    if given is not None:
        distributed.together(partial(suspect.check_fits, given, victim.module, config, dataset))
        given = suspect.look_over(given, victim.module, config, dataset, mesh)
        contents = dataset.arrays, given.variables
    # Only now: a config that cannot be carried out must not take the directory.
    content = checksum(contents)
    writes = jax.process_index() == 0
    distributed.first_alone(lambda: workdir.claim(directory, asked, content, writes, DEFENSES))
    with contextlib.closing(MetricWriter(directory)) as writer, Watch() as watch:
        on_cpu = compiler_options(victim.module), steps_per_call(victim.module)
        run = Run(config.seed, directory, mesh, writer, config.run, watch, *on_cpu)
        return carry_out(run, victim, config, given)


def carry_out(
    run: Run, victim: Victim, config: ml_collections.ConfigDict, given: Suspect | None = None
) -> dict[str, Any]:
    """Infects, scans, purifies, measures and draws, as the config's stages say; returns what results.json holds.

    Args:
        run: The experiment.
        victim: What it is about.
        config: The resolved config.
        given: The model that is there already, or None.
    """
    writes = jax.process_index() == 0
    judge = Judge(victim, run)
    outcome = results.begin(config, run.mesh, run.workdir / 'results.json')
    scan = Scanner(victim, run) if 'scan' in config.stages else None
    if given is None:
        infected = infect(run, victim, config, judge)
        if writes:
            write_manifest(run.workdir / 'poison.npz', infected.attack, victim.poisoned, victim.clean)
    else:
        infected = Infected(given.variables, None, 0.0)
    attack = infected.attack
    before = judge(infected.variables, attack)
    if given is None:
        results.add_infected(outcome, before, infected.seconds)
    else:
        facts = {'init_from': config.init_from, 'class_names': victim.dataset.class_names, 'warning': given.warning}
        results.add_suspect(outcome, before, facts | ({'scan': scan(infected.variables)} if scan else {}))
    purified = {}
    if 'purify' in config.stages:
        for name in validation.names(config.defenses):
            suspects = suspect_set(attack, victim, config) if name in FROM_SUSPECT_SET else None
            holdings = holdings_of(victim, infected, suspects)
            cleansed = DEFENSES[name](
                watched(run, judge, attack), f'purify/{name}', holdings, defender_config(config, name)
            )
            purified[name] = cleansed.state.variables
            results.add_purified(outcome, name, before, judge(purified[name], attack), cleansed.seconds)
            if suspects is not None:
                poison_found = detection(cleansed.scores, cleansed.subsets, suspects.indices)
                results.add_detection(outcome, name, poison_found)
            if scan is not None:
                outcome['purified'][name]['scan'] = scan(purified[name])
    if writes:
        workdir.write_json(run.workdir / 'results.json', outcome)
        if given is not None and purified:
            export.write(run.workdir / 'export', given, purified, config, outcome)
    if 'report' in config.stages:
        observation = observe(run, victim, infected, purified, judge, results.as_shown(outcome))
        if observation is not None and observation.connection is not None:
            outcome['connection'] = observation.connection
            if writes:
                workdir.write_json(run.workdir / 'results.json', outcome)
        draw(run.workdir / 'report', victim, infected, purified, judge, results.as_shown(outcome), observation)
        show_in_tensorboard(run, run.workdir / 'report', observation)
    return outcome


def suspect_set(attack: Attack | None, victim: Victim, config: ml_collections.ConfigDict) -> Poisoned:
    """Returns the training set that a defender finds beside the infected model."""
    clean = victim.dataset.train_images, victim.dataset.train_labels
    return left_behind(attack, *clean, victim.poisoned, config)


def holdings_of(victim: Victim, infected: Infected, suspects: Poisoned | None) -> Holdings:
    """Returns what a defender holds: the suspect training set where it is given, or else the clean share."""
    if suspects is not None:
        return Holdings(victim.module, infected.variables, suspects.images, suspects.labels)
    images, labels = victim.dataset.train_images[victim.clean], victim.dataset.train_labels[victim.clean]
    return Holdings(victim.module, infected.variables, images, labels)


def watched(run: Run, judge: Judge, attack: Attack | None) -> Run:
    """Returns the run with the judge looking on, who writes down how the model in training does on the test set."""

    def look(stage: str, step: int, epochs: float, state: Any) -> None:
        # Some states, such as masks, are not a model.
        if hasattr(state, 'variables'):
            run.writer.write(stage, step, {'epoch': epochs} | on_test_set(judge(state.variables, attack)))

    points = run.options.purify_points
    return run._replace(onlooker=Onlooker(look, points)) if points else run


def on_test_set(scores: Scores) -> dict[str, float]:
    """Returns the scores that there are, as the record of a training has them."""
    values = {'test_acc': scores.acc, 'test_asr': scores.asr, 'test_cross_acc': scores.cross_acc}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def defender_config(config: ml_collections.ConfigDict, defense: str) -> ml_collections.ConfigDict:
    """Returns what a defender may read of the config: nothing of the attack."""
    return ml_collections.ConfigDict(
        {field: config[field] for field in ('batch_size', 'train', 'augment', 'tuning', defense)}
    )


def prepare(config: ml_collections.ConfigDict, dataset: Dataset, mesh: Mesh) -> Victim:
    """Returns the attack, the poisoned training set, the defender's share and the untrained classifier."""
    validation.validate_against_data(config, dataset)
    check_batch_size(mesh, config.batch_size, 'batch_size')
    attack = attacks.build(config, dataset.image_shape, dataset.num_classes)
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, config)
    module = models.build(config, dataset.num_classes)
    if 'purify' in config.stages and not shows_features(module):
        for name in validation.names(config.defenses):
            if name in NEED_FEATURES:
                raise UserError(
                    f'the defense {name!r} looks into feature maps, and the __call__ of model.factory='
                    f'{config.model.factory} takes no `features`; add it, or leave {name!r} out.'
                )
    return Victim(dataset, attack, poisoned, clean_indices(poisoned, config), module)


def infect(run: Run, victim: Victim, config: ml_collections.ConfigDict, judge: Judge) -> Infected:
    """Returns the classifier trained on what the attacker left (a benign one when there is no attack)."""
    size = len(victim.poisoned.labels)
    steps = count_steps(size, config.train.epochs, config.batch_size)
    options = config.train
    sgd = optimiser.sgd(options.learning_rate, options.schedule, steps, options.momentum, options.weight_decay)
    variables = models.initialise(victim.module, key_for(config.seed, 'initialise'), victim.dataset.image_shape)
    arrays = {'images': victim.poisoned.images, 'labels': victim.poisoned.labels}
    learner = attacks.Learner(victim.module, sgd, state.create(variables, sgd))
    infection = attacks.begin(run, victim.attack, arrays, learner, config)

    def probe(current: Any) -> dict[str, float]:
        return on_test_set(judge(current.variables, infection.attack_of(current)))

    every = config.run.evaluate_every
    fitted = fit(
        run,
        'infect',
        infection.state,
        [Phase(infection.step, steps)],
        arrays,
        config.batch_size,
        fixed=infection.fixed,
        streams=infection.streams,
        probe=probe,
        probe_every=count_steps(size, every, config.batch_size) if every else 0,
    )
    return Infected(fitted.state.variables, infection.attack_of(fitted.state), infection.seconds + fitted.seconds)
