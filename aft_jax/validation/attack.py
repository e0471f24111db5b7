"""Rules between the fields of the attack."""

import ml_collections

from aft_jax.errors import UserError


def validate_attack(config: ml_collections.ConfigDict) -> None:
    """Checks that the fields of `config.attack` fit together and fit the batch size.

    Raises:
        UserError: The first rule that is broken.
    """
    options = config.attack
    if options.name == 'sig' and options.sig.clean_label and options.label_mode == 'all2all':
        raise UserError(
            "attack.sig.clean_label poisons the target class alone, so it needs attack.label_mode='all2one', not "
            "'all2all'."
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
    """Checks that triggered and cross-mode images fit into the training set, or into each batch."""
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
