"""Finds what is wrong with a config before anything slow starts, and explains it in one sentence.

The rule of a single field stands beside its default (`aft_jax.config`). Here are the rules between fields, and between
the config and the data.
"""

import ml_collections

from aft_jax import data, models
from aft_jax.config import BENIGN, resolve, split_names
from aft_jax.config.fields import one_of
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES
from aft_jax.errors import UserError
from aft_jax.models.vgg_bn import SMALLEST_SIDE
from aft_jax.validation.attack import validate_attack
from aft_jax.validation.defenses import validate_defenses
from aft_jax.validation.fields import validate_fields

__all__ = ['validate', 'validate_against_data']


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks a config: each field by itself, and the rules between fields.

    Args:
        config: Config as the config file and the command line made it, before `config.resolve`.

    Raises:
        UserError: The first wrong field, with the values that are allowed.
    """
    validate_fields(config)
    data.check_name(config.dataset)
    if config.init_from:
        _validate_given_model(config)
    else:
        _validate_stages(config)
    _validate_model(config)
    validate_attack(config)
    validate_defenses(resolve(config))


def _validate_stages(config: ml_collections.ConfigDict) -> None:
    """Checks the fields of a run that infects its own model."""
    if config.init_logits:
        raise UserError('init_logits is for a given model: name it in init_from.')
    if 'infect' not in config.stages:
        raise UserError(
            "stages must contain 'infect', which loads a model that is finished; or name a model in init_from."
        )
    if 'scan' in config.stages:
        raise UserError("the stage 'scan' is for a given model: name it in init_from.")
    if config.clean_share == 1:
        raise UserError(f'clean_share={config.clean_share} must lie strictly between 0 and 1; 1 is for init_from.')


def _validate_given_model(config: ml_collections.ConfigDict) -> None:
    """Checks the fields of a run whose model init_from names."""
    if config.attack.name != BENIGN:
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
    for name in split_names(config.defenses):
        if DEFENSES[name].trains_on == 'untrusted_training_set':
            raise UserError(f'the defense {name!r} needs the untrusted training set, which init_from does not give.')
    if 'purify' in config.stages and not split_names(config.defenses):
        raise UserError("defenses is empty; name one, such as 'aft', or leave 'purify' out of stages.")


def _validate_model(config: ml_collections.ConfigDict) -> None:
    """Checks the network's name and depth. A factory is checked when it is called, and a file names its network."""
    options = config.model
    if options.factory and options.torch:
        raise UserError('model.factory and model.torch are both set; use one of them.')
    if config.init_from.endswith('.pt2') and (options.factory or options.torch or options.name):
        raise UserError(
            f'init_from={config.init_from} holds its network; leave model.name, model.torch and model.factory empty.'
        )
    name, depth = models.COMBINED.get(options.name, (options.name, options.depth))
    if not (options.factory or options.torch or (config.init_from and not name)):
        one_of(*models.NAMES).verify('model.name', name)
    if name in models.DEPTHS:
        one_of(*models.DEPTHS[name]).verify('model.depth', depth)


def validate_against_data(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Checks a config against the data.

    Raises:
        UserError: The target label or the batch size is too large for the data, the images are too small for the
            augmentation or the network, or the normalisation has another number of channels.
    """
    if config.attack.name != BENIGN and config.attack.target >= dataset.num_classes:
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
