"""One experiment: infect a classifier, purify it, measure both. Here, and in evaluation, attack and defense meet."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from aft_jax import attacks, data, models, results, validation, workdir
from aft_jax.attacks.attack import Attack, triggered
from aft_jax.attacks.poison import Poisoned, clean_indices, poison, poison_batch, write_manifest
from aft_jax.config import resolve
from aft_jax.data.augment import augment
from aft_jax.data.batches import count_steps
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES, Holdings
from aft_jax.evaluation import Predictor, Scores, score
from aft_jax.randomness import key_for
from aft_jax.training import optimiser, state
from aft_jax.training.loop import Fitted, Phase, Run, fit
from aft_jax.training.mesh import make_mesh
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.steps import classification_step


class Victim(NamedTuple):
    """Everything that the two sides of an experiment are about.

    Attributes:
        dataset: The data, clean.
        attack: The attack, or None.
        poisoned: The training set as the attacker left it.
        clean: int32, the training images that the defender is given.
        module: The classifier.
    """

    dataset: Dataset
    attack: Attack | None
    poisoned: Poisoned
    clean: np.ndarray
    module: nn.Module


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
    config = resolve(config)
    dataset = data.load(config.dataset, config.data)
    validation.validate_against_data(config, dataset)
    writes = jax.process_index() == 0
    workdir.claim(directory, config, writes)

    victim = prepare(config, dataset)
    if writes:
        write_manifest(directory / 'poison.npz', victim.attack, victim.poisoned, victim.clean)
    run = Run(config.seed, directory, make_mesh(), MetricWriter(directory), config.run)
    judge = Judge(victim, run)
    try:
        infected = infect(run, victim, config, judge)
        outcome = results.begin(config, run.mesh)
        before = judge(infected.state.variables)
        results.add_infected(outcome, before, infected.seconds)
        purified = {}
        if 'purify' in config.stages:
            holdings = Holdings(
                victim.module,
                infected.state.variables,
                dataset.train_images[victim.clean],
                dataset.train_labels[victim.clean],
            )
            for name in validation.names(config.defenses):
                fitted = DEFENSES[name](run, f'purify/{name}', holdings, config)
                purified[name] = fitted.state.variables
                results.add_purified(outcome, name, before, judge(purified[name]), fitted.seconds)
    finally:
        run.writer.close()
    if writes:
        workdir.write_json(directory / 'results.json', outcome)
    if writes and 'report' in config.stages and False:
        from aft_jax.report import pictures

        pictures.write(directory / 'report', victim.dataset, judge, infected.state.variables, purified)
    return outcome


def prepare(config: ml_collections.ConfigDict, dataset: Dataset) -> Victim:
    """Returns the attack, the poisoned training set, the defender's share and the untrained classifier."""
    attack = attacks.build(config, dataset.image_shape, dataset.num_classes)
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, config)
    return Victim(
        dataset, attack, poisoned, clean_indices(poisoned, config), models.build(config, dataset.num_classes)
    )


class Judge:
    """Scores a model on the test set, clean and triggered; no defense ever holds one."""

    def __init__(self, victim: Victim, run: Run):
        """Puts the trigger on the victim's test images."""
        self.dataset = victim.dataset
        self.attack = victim.attack
        self.triggered_images = triggered(victim.attack, victim.dataset.test_images) if victim.attack else None
        self.predict = Predictor(victim.module, run.mesh, run.options.eval_batch_size)

    def __call__(self, variables: dict) -> Scores:
        """Returns ACC, ASR and RA of the model with these variables."""
        triggered_predictions = None
        if self.triggered_images is not None:
            triggered_predictions = self.predict(variables, self.triggered_images)
        return score(
            self.predict(variables, self.dataset.test_images),
            triggered_predictions,
            self.dataset.test_labels,
            self.attack.target_map if self.attack else None,
            self.dataset.num_classes,
        )


def infect(run: Run, victim: Victim, config: ml_collections.ConfigDict, judge: Judge) -> Fitted:
    """Returns the classifier trained on what the attacker left (a benign one when there is no attack)."""
    size = len(victim.poisoned.labels)
    steps = count_steps(size, config.train.epochs, config.batch_size)
    options = config.train
    sgd = optimiser.sgd(options.learning_rate, options.schedule, steps, options.momentum, options.weight_decay)

    def transform(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        augment_key, cross_key = jax.random.split(key)
        images = augment(augment_key, images, config.augment)
        if victim.attack is not None and config.attack.poisoning == 'per_batch':
            images, labels = poison_batch(victim.attack, cross_key, images, labels, config)
        return images, labels

    def probe(current: state.TrainState) -> dict[str, float]:
        scores = judge(current.variables)
        return {'test_acc': scores.acc} | ({'test_asr': scores.asr} if victim.attack else {})

    step = partial(classification_step, module=victim.module, optimiser=sgd, transform=transform)
    variables = models.initialise(victim.module, key_for(config.seed, 'initialise'), victim.dataset.image_shape)
    every = config.run.evaluate_every
    return fit(
        run,
        'infect',
        state.create(variables, sgd),
        [Phase(step, steps)],
        {'images': victim.poisoned.images, 'labels': victim.poisoned.labels},
        config.batch_size,
        probe=probe,
        probe_every=count_steps(size, every, config.batch_size) if every else 0,
    )
