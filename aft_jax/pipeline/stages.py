"""The stages of an experiment up to its models: prepare the scenario, infect, and what a defender is given."""

from typing import Any

import ml_collections
from jax.sharding import Mesh

from aft_jax import attacks, models, validation
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import Poisoned, clean_indices, left_behind, poison
from aft_jax.data.dataset import Dataset
from aft_jax.data.order import count_steps
from aft_jax.defenses import NEED_FEATURES, Holdings
from aft_jax.errors import UserError
from aft_jax.evaluation.evaluator import Judge, on_test_set
from aft_jax.models.custom import shows_features
from aft_jax.pipeline.scenario import Infected, Victim
from aft_jax.randomness import key_for
from aft_jax.runtime.sharding import check_batch_size
from aft_jax.training import optimiser, state
from aft_jax.training.loop import Phase, Run, fit


def evaluator_for(run: Run, victim: Victim) -> Judge:
    """Prepares the evaluation of the scenario's models on its test set."""
    return Judge(victim.dataset, victim.module, run.mesh, run.options.eval_batch_size, run.seed)


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
