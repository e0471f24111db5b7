"""What can be wrong with the fields of the attack."""

import ml_collections

from aft_jax.errors import UserError
from aft_jax.validation.checks import in_pixels, not_negative, positive


def validate_attack(config: ml_collections.ConfigDict) -> None:
    """Checks `config.attack` but for its names."""
    options = config.attack
    if options.target < 0:
        raise UserError(f'attack.target={options.target} must be a label, 0 or more.')
    if not 0 < options.blend.alpha <= 1:
        raise UserError(f'attack.blend.alpha={options.blend.alpha} must lie above 0 and at most at 1.')
    in_pixels('attack.sig.delta', options.sig.delta)
    if options.name == 'sig' and options.sig.clean_label and options.label_mode == 'all2all':
        raise UserError(
            "attack.sig.clean_label poisons the target class alone, so it needs attack.label_mode='all2one', not "
            "'all2all'."
        )
    positive(
        config,
        *(f'attack.wanet.{field}' for field in ('strength', 'cross_ratio')),
        *(f'attack.input_aware.{field}' for field in ('cross_ratio', 'mask_epochs', 'mask_weight')),
        *(f'attack.input_aware.{field}' for field in ('mask_learning_rate', 'generator_learning_rate')),
    )
    not_negative(config, 'attack.input_aware.diversity_weight', 'attack.input_aware.mask_diversity_weight')
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
