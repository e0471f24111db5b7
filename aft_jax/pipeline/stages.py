"""The stages of an experiment up to its models: prepare the scenario, infect a classifier, purify it."""

from pathlib import Path

import ml_collections
from jax.sharding import Mesh

from aft_jax import attacks, models, validation
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import Poisoned, clean_indices, poison, poisoning_options, published_training_set
from aft_jax.config import as_options, split_names
from aft_jax.data.augment import AugmentOptions
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES, DefenderData, DefenseSettings, Purified
from aft_jax.defenses.defender import TuningOptions, require_head
from aft_jax.errors import UserError
from aft_jax.evaluation.evaluator import Evaluator, test_metrics
from aft_jax.models.custom import shows_features
from aft_jax.pipeline import network
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.randomness import key_for
from aft_jax.runtime.sharding import check_batch_size
from aft_jax.training import state
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import TrainOptions, sgd
from aft_jax.training.stage import EvalHook, EvalPoint, Phase, Run, TrainingStage


def evaluator_for(run: Run, scenario: Scenario) -> Evaluator:
    """Prepares the evaluation of the scenario's models on its test set."""
    return Evaluator(scenario.dataset, scenario.module, run.mesh, run.options.eval_batch_size, run.seed)


def untrusted_training_set(attack: Attack | None, scenario: Scenario, config: ml_collections.ConfigDict) -> Poisoned:
    """Builds the training set that a defender gets together with the infected model."""
    clean = scenario.dataset.train_images, scenario.dataset.train_labels
    return published_training_set(attack, *clean, scenario.poisoned, poisoning_options(config))


def defender_data(
    name: str, scenario: Scenario, infected: InfectedModel, config: ml_collections.ConfigDict
) -> DefenderData:
    """Selects what a defender holds: the infected model, and the images that the defense trains on.

    Args:
        name: Name of the defense.
        scenario: Data and module.
        infected: Infected model and its attack.
        config: Resolved config.
    """
    if DEFENSES[name].trains_on == 'untrusted_training_set':
        untrusted = untrusted_training_set(infected.attack, scenario, config)
        images, labels = untrusted.images, untrusted.labels
    else:
        images, labels = scenario.dataset.train_images[scenario.clean], scenario.dataset.train_labels[scenario.clean]
    return DefenderData(scenario.module, infected.variables, images, labels)


def defense_settings(name: str, config: ml_collections.ConfigDict) -> DefenseSettings:
    """Selects the part of the resolved config that a defense may read: nothing of the attack."""
    return DefenseSettings(
        options=as_options(DEFENSES[name].options, config[name]),
        batch_size=config.batch_size,
        train=as_options(TrainOptions, config.train),
        augment=as_options(AugmentOptions, config.augment),
        tuning=as_options(TuningOptions, config.tuning),
    )


def purify(
    run: Run, name: str, scenario: Scenario, infected: InfectedModel, config: ml_collections.ConfigDict
) -> Purified:
    """Runs a defense against an infected model.

    Args:
        run: Experiment.
        name: Name of the defense.
        scenario: Data and module.
        infected: Infected model and its attack.
        config: Resolved config.
    """
    data = defender_data(name, scenario, infected, config)
    return DEFENSES[name].purify(run, f'purify/{name}', data, defense_settings(name, config))


def prepare(config: ml_collections.ConfigDict, dataset: Dataset, mesh: Mesh, directory: Path | None = None) -> Scenario:
    """Builds the attack and the classifier, poisons the training set and draws the defender's clean images.

    Args:
        config: Resolved config.
        dataset: Clean data.
        mesh: Devices.
        directory: Work directory, which may hold the program of a PyTorch network.

    Raises:
        UserError: The config does not fit the data, the devices or the classifier.
    """
    validation.validate_against_data(config, dataset)
    check_batch_size(mesh, config.batch_size, 'batch_size')
    attack = attacks.build(config, dataset.image_shape, dataset.num_classes)
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, poisoning_options(config))
    module = network.build(config, dataset, directory)
    for name in split_names(config.defenses) if 'purify' in config.stages else ():
        if DEFENSES[name].needs_feature_maps and not shows_features(module):
            raise UserError(
                f'the defense {name!r} reads feature maps, but the __call__ of {config.model.name} takes no `features` '
                f'or its graph has no feature maps; add them, or leave {name!r} out.'
            )
        if DEFENSES[name].needs_head:
            require_head(name, module, dataset.image_shape)
    clean = clean_indices(poisoned, config.clean_share, config.batch_size, config.seed)
    return Scenario(dataset, attack, poisoned, clean, module)


def infect(run: Run, scenario: Scenario, config: ml_collections.ConfigDict, evaluator: Evaluator) -> InfectedModel:
    """Trains the classifier under the attack, or a benign one if there is no attack.

    Args:
        run: Experiment.
        scenario: Scenario.
        config: Resolved config.
        evaluator: Evaluator for the scores during the training, if `run.evaluate_every` is set.
    """
    arrays = {'images': scenario.poisoned.images, 'labels': scenario.poisoned.labels}
    settings = attacks.attack_settings(config, scenario.poisoned.images.shape)
    attack, mask_seconds = scenario.attack, 0.0
    if attack is not None and attack.trigger_is_trained:
        attack, mask_seconds = attacks.train_mask_network(run, attack, arrays, settings)

    options, steps = settings.train, settings.steps(settings.train.epochs)
    optimiser = sgd(
        options.learning_rate, options.schedule, steps, momentum=options.momentum, weight_decay=options.weight_decay
    )
    variables = models.initialise(scenario.module, key_for(config.seed, 'initialise'), scenario.dataset.image_shape)
    first = state.create(variables, optimiser)
    training = attacks.prepare_training(attack, scenario.module, optimiser, first, settings)

    def evaluate(point: EvalPoint) -> dict[str, float]:
        return test_metrics(evaluator.evaluate(point.state.variables, training.attack_of(point.state)))

    epochs_between = config.run.evaluate_every
    hooks = (EvalHook(evaluate, every_steps=settings.steps(epochs_between)),) if epochs_between else ()
    stage = TrainingStage(
        name='infect',
        state=training.state,
        phases=[Phase(training.step, steps)],
        arrays=arrays,
        batch_size=settings.batch_size,
        constants=training.constants,
        num_streams=training.num_streams,
        eval_hooks=hooks,
    )
    fitted = fit(run, stage)
    return InfectedModel(fitted.state.variables, training.attack_of(fitted.state), mask_seconds + fitted.seconds)
