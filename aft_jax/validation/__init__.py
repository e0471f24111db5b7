"""Finds what is wrong with a config before anything slow starts, and says it in one sentence."""

import ml_collections

from aft_jax import attacks, data, models
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES
from aft_jax.errors import UserError
from aft_jax.models.resnet import STEMS
from aft_jax.models.vgg_bn import SMALLEST_SIDE
from aft_jax.training.data_feed import PLACEMENTS
from aft_jax.training.optimiser import SCHEDULES
from aft_jax.validation.attack import validate_attack
from aft_jax.validation.checks import names, not_negative, one_of, positive, share, value
from aft_jax.validation.defenses import validate_defenses
from aft_jax.validation.structure import validate_structure

__all__ = ['names', 'validate', 'validate_against_data']

STAGES = ('scan', 'infect', 'purify', 'report')
DTYPES = ('float32', 'bfloat16')
LARGEST_SIDE = 4096


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every field that can be wrong by itself or against another.

    Args:
        config: As a config file and the command line made it, before `config.resolve`.

    Raises:
        UserError: The first wrong field, with the values that are allowed.
    """
    validate_structure(config)
    data.check_name(config.dataset)
    one_of('attack.name', config.attack.name, attacks.NAMES)
    one_of('attack.label_mode', config.attack.label_mode, attacks.LABEL_MODES)
    one_of('attack.poisoning', config.attack.poisoning, attacks.POISONINGS)
    for name in names(config.defenses):
        one_of('defenses', name, tuple(DEFENSES))
    for stage in config.stages:
        one_of('stages', stage, STAGES)
    if config.init_from:
        _validate_given(config)
    elif 'infect' not in config.stages:
        raise UserError(
            "stages must contain 'infect': a finished one is loaded, not run again; or name a model in init_from."
        )
    elif 'scan' in config.stages:
        raise UserError("the stage 'scan' is for a model that is there already: name it in init_from.")
    _validate_model(config)
    if not 0 <= config.seed < 2**32:
        raise UserError(f'seed={config.seed} must lie between 0 and 2**32 - 1.')
    one_of('dtype', config.dtype, DTYPES)
    one_of('run.placement', config.run.placement, PLACEMENTS)
    positive(
        config,
        *('batch_size', 'model.width', 'train.epochs', 'train.learning_rate'),
        *('model.pool_size', 'model.hidden'),
        *('run.log_every', 'run.checkpoint_every', 'run.keep_checkpoints', 'run.eval_batch_size'),
    )
    not_negative(
        config,
        *('train.momentum', 'train.weight_decay', 'run.evaluate_every', 'run.purify_points', 'run.steps_per_call'),
        *('data.size', 'data.pad', 'augment.crop', 'augment.rotation', 'tuning.budget'),
    )
    if config.clean_share != 1 or not config.init_from:
        share(config, 'clean_share')
    for field in ('attack.poisoned_share', 'data.test_share', 'tuning.held_out_share'):
        share(config, field)
    for field in ('model.dropout', 'train.momentum'):
        if not 0 <= value(config, field) < 1:
            raise UserError(f'{field}={value(config, field)} must be at least 0 and below 1.')
    one_of('train.schedule', config.train.schedule, SCHEDULES)
    if min(config.model.std, default=1) <= 0:
        raise UserError(f'model.std={config.model.std} must be positive.')
    validate_attack(config)
    validate_defenses(config)
    for field in ('data.size', 'data.pad'):
        if value(config, field) > LARGEST_SIDE:
            raise UserError(f'{field}={value(config, field)} is more than {LARGEST_SIDE} pixels.')


def _validate_model(config: ml_collections.ConfigDict) -> None:
    options = config.model
    name, depth = models.COMBINED.get(options.name, (options.name, options.depth))
    # Whether a factory can be called is seen when it is; a file tells its network by itself.
    if not (options.factory or (config.init_from and not name)):
        one_of('model.name', name, models.NAMES)
    if name in models.DEPTHS:
        one_of('model.depth', depth, models.DEPTHS[name])
    one_of('model.stem', options.stem, STEMS)


def _validate_given(config: ml_collections.ConfigDict) -> None:
    """What init_from asks of the other fields."""
    if config.attack.name != 'none':
        raise UserError(
            f'attack.name={config.attack.name!r} infects a model, but init_from={config.init_from} names one that is '
            "there already; set attack.name='none'."
        )
    if 'infect' in config.stages:
        raise UserError(
            f"stages holds 'infect', but init_from={config.init_from} names a model that is there already; choose from "
            "'scan', 'purify' and 'report'."
        )
    if not {'scan', 'purify'} & set(config.stages):
        raise UserError("stages must hold 'scan', 'purify' or both for a model that init_from names.")
    for name in names(config.defenses):
        if DEFENSES[name].trains_on == 'untrusted_training_set':
            raise UserError(f'the defense {name!r} needs the suspect training set, which does not come with init_from.')
    if 'purify' in config.stages and not names(config.defenses):
        raise UserError("defenses is empty; name one, such as 'aft', or leave 'purify' out of stages.")


def validate_against_data(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Checks what only the data can tell.

    Raises:
        UserError: A label or a batch that the data does not have, or a normalisation for other channels.
    """
    if config.attack.name != 'none' and config.attack.target >= dataset.num_classes:
        raise UserError(
            f'attack.target={config.attack.target} is not a label of {config.dataset}, which has '
            f'{dataset.num_classes} classes (0 to {dataset.num_classes - 1}).'
        )
    if config.batch_size > len(dataset.train_labels):
        raise UserError(
            f'batch_size={config.batch_size} is larger than the training set of {config.dataset}, which has '
            f'{len(dataset.train_labels)} images.'
        )
    height, width, channels = dataset.image_shape
    if config.augment.crop >= min(height, width):
        raise UserError(f'augment.crop={config.augment.crop} moves images of {height}x{width} out of their frame.')
    if config.model.name == 'vgg_bn' and min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f'model.name=vgg_bn needs images of {SMALLEST_SIDE}x{SMALLEST_SIDE} or more, and those of {config.dataset} '
            f'are {height}x{width}; set data.pad or data.size.'
        )
    for field in ('mean', 'std'):
        count = len(config.model[field])
        if count not in (1, channels):
            raise UserError(
                f'model.{field} has {count} values, but the images of {config.dataset} have {channels} '
                f'channel{"s" if channels > 1 else ""}; give one value, or one a channel.'
            )
