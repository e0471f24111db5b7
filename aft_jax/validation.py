"""Finds what is wrong with a config before anything slow starts, and says it in one sentence."""

import math
from collections.abc import Iterable
from typing import Any

import ml_collections

from aft_jax import attacks, data, models
from aft_jax.adversarial import NORMS
from aft_jax.changes import KINDS
from aft_jax.command_line import suggestion
from aft_jax.config import AFT_PRESETS, AFT_SECTIONS, default_config, resolve
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DEFENSES, FROM_SUSPECT_SET
from aft_jax.errors import UserError
from aft_jax.models.resnet import STEMS
from aft_jax.models.vgg_bn import SMALLEST_SIDE
from aft_jax.training.feed import PLACEMENTS
from aft_jax.training.optimiser import SCHEDULES
from aft_jax.workdir import flatten

STAGES = ('scan', 'infect', 'purify', 'report')
DTYPES = ('float32', 'bfloat16')
# The largest budgets that still make sense for images in [0, 1].
LARGEST_LINF = 1.0
LARGEST_SIDE = 4096


def names(text: str) -> list[str]:
    """Returns ['aft', 'ft'] for 'aft,ft', each name once."""
    return list(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every field that can be wrong by itself or against another.

    Args:
        config: As a config file and the command line made it, before `config.resolve`.

    Raises:
        UserError: The first wrong field, with the values that are allowed.
    """
    _validate_structure(config)
    data.check_name(config.dataset)
    _one_of('attack.name', config.attack.name, attacks.NAMES)
    _one_of('attack.label_mode', config.attack.label_mode, attacks.LABEL_MODES)
    _one_of('attack.poisoning', config.attack.poisoning, attacks.POISONINGS)
    for name in names(config.defenses):
        _one_of('defenses', name, tuple(DEFENSES))
    for stage in config.stages:
        _one_of('stages', stage, STAGES)
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
    _one_of('dtype', config.dtype, DTYPES)
    _one_of('run.placement', config.run.placement, PLACEMENTS)
    _positive(
        config,
        *('batch_size', 'model.width', 'train.epochs', 'ft.epochs', 'train.learning_rate'),
        *('model.pool_size', 'model.hidden'),
        *('run.log_every', 'run.checkpoint_every', 'run.keep_checkpoints', 'run.eval_batch_size'),
    )
    _not_negative(
        config,
        *('train.momentum', 'train.weight_decay', 'run.evaluate_every', 'run.purify_points', 'run.steps_per_call'),
        *('data.size', 'data.pad', 'augment.crop', 'augment.rotation', 'tuning.budget'),
    )
    if config.clean_share != 1 or not config.init_from:
        _share(config, 'clean_share')
    for field in ('attack.poisoned_share', 'data.test_share', 'tuning.held_out_share'):
        _share(config, field)
    for field in ('model.dropout', 'train.momentum'):
        if not 0 <= _value(config, field) < 1:
            raise UserError(f'{field}={_value(config, field)} must be at least 0 and below 1.')
    for field in ('train.schedule', 'ft.schedule'):
        _one_of(field, _value(config, field), SCHEDULES)
    if any(value <= 0 for value in config.model.std):
        raise UserError(f'model.std={config.model.std} must be positive.')
    _validate_attack(config)
    for name in AFT_SECTIONS:
        _one_of(f'{name}.preset', config[name].preset, tuple(AFT_PRESETS))
    for name in AFT_SECTIONS:
        _validate_aft(config, name)
    _validate_nad(config)
    _validate_mcr(config)
    _validate_pruning(config)
    for name in ('ft', 'fp', 'nad'):
        rates = config[name].learning_rates
        if not rates or min(rates) <= 0 or list(rates) != sorted(set(rates)):
            raise UserError(f'{name}.learning_rates={rates} must be positive numbers that rise, one or more.')
    _not_negative(config, *(f'{name}.max_grad_norm' for name in ('ft', 'fp', 'nad', 'mcr')))
    _validate_pbe(config)
    for field in ('data.size', 'data.pad'):
        if _value(config, field) > LARGEST_SIDE:
            raise UserError(f'{field}={_value(config, field)} is more than {LARGEST_SIDE} pixels.')


def _validate_model(config: ml_collections.ConfigDict) -> None:
    options = config.model
    name, depth = models.COMBINED.get(options.name, (options.name, options.depth))
    # Whether a factory can be called is seen when it is; a file tells its network by itself.
    if not (options.factory or (config.init_from and not name)):
        _one_of('model.name', name, models.NAMES)
    if name in models.DEPTHS:
        _one_of('model.depth', depth, models.DEPTHS[name])
    _one_of('model.stem', options.stem, STEMS)


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
        if name in FROM_SUSPECT_SET:
            raise UserError(f'the defense {name!r} needs the suspect training set, which does not come with init_from.')
    if 'purify' in config.stages and not names(config.defenses):
        raise UserError("defenses is empty; name one, such as 'aft', or leave 'purify' out of stages.")


def _validate_structure(config: ml_collections.ConfigDict) -> None:
    """Every field of the defaults, no other, each of its default's kind, and every number finite."""
    defaults, found = flatten(default_config().to_dict()), flatten(config.to_dict())
    for field in found:
        if field not in defaults:
            raise UserError(f'the config has a field {field!r} that does not exist.{suggestion(field, defaults)}')
    for field, default in defaults.items():
        if field not in found:
            raise UserError(f'the config lacks the field {field!r}; start from aft_jax.config.default_config().')
        value = found[field]
        if not _fits(value, default):
            kind = 'a finite number' if isinstance(default, float) else f'of the kind of {default!r}'
            raise UserError(f'{field}={value!r} should be {kind}.')


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind, and a finite one where it is a number."""
    match default:
        case tuple():
            return isinstance(value, tuple | list) and all(_fits(item, default[0]) for item in value)
        case bool() | str():
            return isinstance(value, type(default))
        case int():
            return isinstance(value, int) and not isinstance(value, bool)
        case float():
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # An AFT field, whose kind its placeholder has seen to.
    return not isinstance(value, float) or math.isfinite(value)


def _validate_attack(config: ml_collections.ConfigDict) -> None:
    options = config.attack
    if options.target < 0:
        raise UserError(f'attack.target={options.target} must be a label, 0 or more.')
    if not 0 < options.blend.alpha <= 1:
        raise UserError(f'attack.blend.alpha={options.blend.alpha} must lie above 0 and at most at 1.')
    _in_pixels('attack.sig.delta', options.sig.delta)
    if options.name == 'sig' and options.sig.clean_label and options.label_mode == 'all2all':
        raise UserError(
            "attack.sig.clean_label poisons the target class alone, so it needs attack.label_mode='all2one', not "
            "'all2all'."
        )
    _positive(
        config,
        *(f'attack.wanet.{field}' for field in ('strength', 'cross_ratio')),
        *(f'attack.input_aware.{field}' for field in ('cross_ratio', 'mask_epochs', 'mask_weight')),
        *(f'attack.input_aware.{field}' for field in ('mask_learning_rate', 'generator_learning_rate')),
    )
    _not_negative(config, 'attack.input_aware.diversity_weight', 'attack.input_aware.mask_diversity_weight')
    if options.wanet.grid < 2:
        raise UserError(f'attack.wanet.grid={options.wanet.grid} must be at least 2, one point at each end.')
    if not 0 <= options.input_aware.mask_density < 1:
        raise UserError(
            f'attack.input_aware.mask_density={options.input_aware.mask_density} must be at least 0 and below 1.'
        )
    if options.name in ('wanet', 'input_aware'):
        _validate_cross(config)
    elif options.poisoning == 'per_batch' and round(options.poisoned_share * config.batch_size) == 0:
        raise UserError(
            f'attack.poisoned_share={options.poisoned_share} of a batch of {config.batch_size} is less than one image; '
            'raise either.'
        )
    if options.name == 'blend' and options.blend.alpha < 1 / 255:
        raise UserError(f'attack.blend.alpha={options.blend.alpha} changes no stored pixel; use at least 1/255.')


def _validate_cross(config: ml_collections.ConfigDict) -> None:
    """The attacked images and those in cross mode share the training set, or each batch of it."""
    options = config.attack
    share, ratio = options.poisoned_share, options[options.name].cross_ratio
    if share * (1 + ratio) > 1:
        raise UserError(
            f'attack.poisoned_share={share} and attack.{options.name}.cross_ratio={ratio} change '
            f'{share * (1 + ratio):.3g} times as many images as there are; lower attack.poisoned_share to at most '
            f'{1 / (1 + ratio):.3f}.'
        )
    attacked = round(share * config.batch_size)
    by_batch = options.name == 'input_aware' or options.poisoning == 'per_batch'
    if by_batch and (attacked == 0 or round(attacked * ratio) == 0):
        raise UserError(
            f'attack.poisoned_share={share} with attack.{options.name}.cross_ratio={ratio} leaves a batch of '
            f'batch_size={config.batch_size} without an attacked or a cross image; raise one of them.'
        )


def _validate_aft(config: ml_collections.ConfigDict, name: str) -> None:
    # The preset fills what the config leaves open, so that checks see what will be used.
    config = resolve(config)
    aft = config[name]
    _one_of(f'{name}.norm', aft['norm'], NORMS)
    for field in ('universal', 'per_image'):
        for kind in names(aft[field]):
            _one_of(f'{name}.{field}', kind, KINDS)
    sizes = {'linf': 'eps', 'l2': 'rms_eps', 'sparse': 'sparse_share', 'warp': 'warp_share'}
    used = [sizes[kind] for kind in names(f'{aft["universal"]},{aft["per_image"]}')]
    if not used and aft['norm'] == 'linf':
        used = ['eps', 'step_size']
    for field in ('eps', 'step_size', 'rms_eps'):
        if field in used:
            _in_pixels(f'{name}.{field}', aft[field])
    for field in ('sparse_share', 'warp_share'):
        if aft[field] > 1 or (field in used and aft[field] <= 0):
            raise UserError(f'{name}.{field}={aft[field]} is a share: above 0 and at most 1.')
    lengths = ('epochs', 'adversarial_epochs', 'learning_rate')
    _positive(config, *(f'{name}.{field}' for field in ('eps', 'step_size', 'pgd_steps', 'renew_every', *lengths)))
    _not_negative(config, f'{name}.max_grad_norm')
    _one_of(f'{name}.schedule', aft['schedule'], SCHEDULES)
    if not 0 < aft['adversarial_share'] <= 1 or round(aft['adversarial_share'] * config.batch_size) == 0:
        raise UserError(
            f'{name}.adversarial_share={aft["adversarial_share"]} must lie above 0 and at most at 1, and be '
            'at least one image of a batch.'
        )
    if aft['adversarial_epochs'] > aft['epochs']:
        raise UserError(
            f'{name}.adversarial_epochs={aft["adversarial_epochs"]} is more than {name}.epochs={aft["epochs"]}.'
        )
    _not_negative(config, *(f'{name}.{field}' for field in ('adversarial_weight', 'distillation', 'cutmix')))
    if aft['cutmix'] > 1:
        raise UserError(f'{name}.cutmix={aft["cutmix"]} is a share of an image, at most 1.')
    if aft['cutmix'] > 0 and aft['distillation'] == 0:
        raise UserError(
            f'{name}.cutmix={aft["cutmix"]} leaves clean images without labels, so that it takes {name}.distillation '
            'above 0.'
        )


def _validate_nad(config: ml_collections.ConfigDict) -> None:
    _positive(config, *(f'nad.{field}' for field in ('teacher_epochs', 'epochs')))
    _one_of('nad.schedule', config.nad.schedule, SCHEDULES)
    betas = config.nad.betas
    if not betas or min(betas) < 0:
        raise UserError(f'nad.betas={betas} must be weights of one stage or more, none of them negative.')


def _validate_mcr(config: ml_collections.ConfigDict) -> None:
    _positive(config, *(f'mcr.{field}' for field in ('endpoint_epochs', 'epochs', 'learning_rate')))
    _one_of('mcr.schedule', config.mcr.schedule, SCHEDULES)
    candidates = config.mcr.candidates
    if not candidates or not all(0 < t < 1 for t in candidates):
        raise UserError(f'mcr.candidates={candidates} must lie strictly between 0 and 1, one or more.')


def _validate_pruning(config: ml_collections.ConfigDict) -> None:
    _positive(config, 'fp.epochs', 'anp.iterations', 'anp.learning_rate', 'anp.eps')
    _one_of('fp.schedule', config.fp.schedule, SCHEDULES)
    for field in ('anp.eps', 'anp.clean_weight'):
        if not 0 <= _value(config, field) <= 1:
            raise UserError(f'{field}={_value(config, field)} is a share: at least 0 and at most 1.')


def _validate_pbe(config: ml_collections.ConfigDict) -> None:
    options = config.pbe
    _validate_aft(config, 'pbe')
    _positive(config, 'pbe.first_epochs', 'pbe.first_learning_rate')
    for share in (options.first_share, *options.keep):
        if not 0 < share <= 1:
            raise UserError(f'pbe.first_share and pbe.keep are shares above 0 and at most 1, and one is {share}.')


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


def _one_of(field: str, value: str | int, allowed: Iterable) -> None:
    allowed = tuple(allowed)
    if value in allowed:
        return
    known = [str(a) for a in allowed]
    raise UserError(
        f'{field}={value!r} does not exist; choose one of {", ".join(known)}.{suggestion(str(value), known)}'
    )


def _share(config: ml_collections.ConfigDict, field: str) -> None:
    share = _value(config, field)
    if not 0 < share < 1:
        raise UserError(f'{field}={share} must lie strictly between 0 and 1.')


def _value(config: ml_collections.ConfigDict, field: str):
    for name in field.split('.'):
        config = config[name]
    return config


def _positive(config: ml_collections.ConfigDict, *fields: str) -> None:
    for field in fields:
        if _value(config, field) <= 0:
            raise UserError(f'{field}={_value(config, field)} must be positive.')


def _not_negative(config: ml_collections.ConfigDict, *fields: str) -> None:
    for field in fields:
        if _value(config, field) < 0:
            raise UserError(f'{field}={_value(config, field)} must not be negative.')


def _in_pixels(field: str, value: float) -> None:
    """A budget or amplitude in [0, 1] pixels; a value above 1 was surely meant in units of 1/255."""
    if value > LARGEST_LINF:
        raise UserError(
            f'{field}={value:g} is in units of [0, 1] pixels; {value:g}/255 is written as {value / 255:.6f}.'
        )
    if value <= 0:
        raise UserError(f'{field}={value:g} must be positive.')
