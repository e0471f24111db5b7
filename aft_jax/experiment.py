"""One experiment: infect a classifier, purify it, measure both. Here, and in evaluation, attack and defense meet."""

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from aft_jax import attacks, data, distributed, models, results, validation, workdir
from aft_jax.attacks.attack import Attack, crossed, triggered
from aft_jax.attacks.poison import Poisoned, clean_indices, left_behind, poison, write_manifest
from aft_jax.config import resolve
from aft_jax.data.batches import count_steps
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES, FROM_SUSPECT_SET, Holdings
from aft_jax.evaluation import Scores, detection, score
from aft_jax.prediction import Predictor
from aft_jax.randomness import key_for
from aft_jax.report import gallery, pictures
from aft_jax.training import compile_cache, optimiser, state
from aft_jax.training.checkpoint import checksum
from aft_jax.training.loop import Phase, Run, fit
from aft_jax.training.mesh import check_batch_size, make_mesh
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.preemption import Watch


class Victim(NamedTuple):
    """Everything that the two sides of an experiment are about.

    Attributes:
        dataset: The data, clean.
        attack: The attack before the infection, or None.
        poisoned: The training set as the attacker left it.
        clean: int32, the training images that the defender is given.
        module: The classifier.
    """

    dataset: Dataset
    attack: Attack | None
    poisoned: Poisoned
    clean: np.ndarray
    module: nn.Module


class Infected(NamedTuple):
    """What the infection leaves.

    Attributes:
        variables: The classifier's.
        attack: The attack as it is carried out from now on, or None.
        seconds: What the training took.
    """

    variables: dict
    attack: Attack | None
    seconds: float


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
    # Process 0 prepares what is not there yet.
    dataset = distributed.first_alone(lambda: data.load(config.dataset, config.data))
    mesh = make_mesh()
    victim = distributed.together(lambda: prepare(config, dataset, mesh))
    # Only now: a config that cannot be carried out must not take the directory.
    arrays_checksum = checksum(dataset.arrays)
    distributed.first_alone(lambda: workdir.claim(directory, config, arrays_checksum, jax.process_index() == 0))
    with contextlib.closing(MetricWriter(directory)) as writer, Watch() as watch:
        return carry_out(Run(config.seed, directory, mesh, writer, config.run, watch), victim, config)


def carry_out(run: Run, victim: Victim, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Infects, purifies, measures and draws, as the config's stages say; returns what results.json holds."""
    writes = jax.process_index() == 0
    judge = Judge(victim, run)
    infected = infect(run, victim, config, judge)
    attack = infected.attack
    if writes:
        write_manifest(run.workdir / 'poison.npz', attack, victim.poisoned, victim.clean)
    outcome = results.begin(config, run.mesh, run.workdir / 'results.json')
    before = judge(infected.variables, attack)
    results.add_infected(outcome, before, infected.seconds)
    purified = {}
    if 'purify' in config.stages:
        for name in validation.names(config.defenses):
            suspects = suspect_set(attack, victim, config) if name in FROM_SUSPECT_SET else None
            holdings = holdings_of(victim, infected, suspects)
            cleansed = DEFENSES[name](run, f'purify/{name}', holdings, defender_config(config, name))
            purified[name] = cleansed.state.variables
            results.add_purified(outcome, name, before, judge(purified[name], attack), cleansed.seconds)
            if suspects is not None:
                poison_found = detection(cleansed.scores, cleansed.subsets, suspects.indices)
                results.add_detection(outcome, name, poison_found)
    if writes:
        workdir.write_json(run.workdir / 'results.json', outcome)
    if 'report' in config.stages:
        draw(run.workdir / 'report', victim, infected, purified, judge, outcome)
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
    return Victim(dataset, attack, poisoned, clean_indices(poisoned, config), models.build(config, dataset.num_classes))


def draw(
    directory: Path, victim: Victim, infected: Infected, purified: dict[str, dict], judge: 'Judge', outcome: dict
) -> None:
    """Writes the pictures of an experiment; every process takes part in the predictions, and process 0 writes.

    Args:
        directory: Where they go.
        victim: What the experiment is about.
        infected: The infected model, or the benign one.
        purified: Variables by defense.
        judge: Of the test set.
        outcome: What results.json holds.
    """
    attack, dataset = infected.attack, victim.dataset
    exhibits = judge.show(attack)
    target_map = attack.target_map if attack else None
    chosen = pictures.choose(dataset.test_labels, target_map, pictures.COLUMNS)
    rows = {'clean': dataset.test_images[chosen]}
    if exhibits.triggered is not None:
        rows['triggered'] = exhibits.triggered[chosen]
    models_shown = {'infected' if attack else 'benign': infected.variables} | purified
    said = {
        name: {kind: judge.predict(variables, images) for kind, images in rows.items()}
        for name, variables in models_shown.items()
    }
    if jax.process_index() != 0:
        return
    pictures.write_before_after(
        directory / 'before_after.png',
        rows,
        dataset.test_labels[chosen],
        target_map,
        dataset.class_names,
        said,
        outcome,
    )
    if attack is not None and exhibits.triggered is not None:
        chosen = pictures.choose(dataset.test_labels, target_map, 3)
        shown = {attack.name: (dataset.test_images[chosen], exhibits.triggered[chosen])}
        gallery.write_gallery(directory / 'triggers.png', shown)


class Exhibits(NamedTuple):
    """The test images as an attack shows them, uint8 [N, H, W, C]; None where it does not.

    Attributes:
        triggered: With the trigger.
        crossed: In the attack's cross mode, which asks for the true label.
    """

    triggered: np.ndarray | None = None
    crossed: np.ndarray | None = None


class Judge:
    """Scores a model on the test set, clean and under an attack; no defense ever holds one."""

    def __init__(self, victim: Victim, run: Run):
        """Judges classifiers like the victim's on its test set."""
        self.dataset = victim.dataset
        self.predict = Predictor(victim.module, run.mesh, run.options.eval_batch_size)
        self._key = key_for(run.seed, 'test/cross')
        self._shown: tuple[Attack | None, Exhibits] = (None, Exhibits())

    def show(self, attack: Attack | None) -> Exhibits:
        """Returns the test images as the attack shows them; those of the last attack are kept."""
        if attack is not self._shown[0]:
            images = self.dataset.test_images
            exhibits = Exhibits()
            if attack is not None:
                exhibits = Exhibits(
                    triggered(attack, images), crossed(attack, images, self._key) if attack.cross else None
                )
            self._shown = (attack, exhibits)
        return self._shown[1]

    def __call__(self, variables: dict, attack: Attack | None) -> Scores:
        """Returns the scores, under the attack, of the model with these variables."""
        exhibits = self.show(attack)
        return score(
            self.predict(variables, self.dataset.test_images),
            self.predict(variables, exhibits.triggered) if exhibits.triggered is not None else None,
            self.dataset.test_labels,
            attack.target_map if attack else None,
            self.dataset.num_classes,
            self.predict(variables, exhibits.crossed) if exhibits.crossed is not None else None,
        )


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
        scores = judge(current.variables, infection.attack_of(current))
        values = {'test_acc': scores.acc, 'test_asr': scores.asr, 'test_cross_acc': scores.cross_acc}
        return {name: value for name, value in values.items() if not math.isnan(value)}

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
