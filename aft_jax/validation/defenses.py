"""Rules between the fields of the defenses."""

import ml_collections

from aft_jax.config import AFT_SECTIONS, split_names
from aft_jax.config.fields import IN_PIXELS, POSITIVE
from aft_jax.errors import UserError

# The field with the size of each kind of perturbation.
_SIZES = {'linf': 'eps', 'l2': 'rms_eps', 'sparse': 'sparse_share', 'warp': 'warp_share'}


def validate_defenses(config: ml_collections.ConfigDict) -> None:
    """Checks the options of AFT and PBE, even if the config does not run them.

    Args:
        config: Resolved config, so that the values of presets are checked too.

    Raises:
        UserError: The first rule that is broken.
    """
    if not split_names(f'{config.aft.universal},{config.aft.per_image}'):
        raise UserError('aft.universal and aft.per_image are both empty; name a kind of perturbation, such as linf.')
    for section in (*AFT_SECTIONS, 'pbe'):
        _validate_sizes(config[section], section)
        _validate_aft(config, section)


def _validate_sizes(options: ml_collections.ConfigDict, section: str) -> None:
    """Checks the sizes of the perturbations that are used. The others have no influence, and may be 0."""
    used = [_SIZES[kind] for kind in split_names(f'{options.universal},{options.per_image}')]
    if not used and options.norm == 'linf':
        used = ['eps', 'step_size']
    for field in used:
        check = POSITIVE if field.endswith('_share') else IN_PIXELS
        check.verify(f'{section}.{field}', options[field])


def _validate_aft(config: ml_collections.ConfigDict, section: str) -> None:
    options = config[section]
    if round(options.adversarial_share * config.batch_size) == 0:
        raise UserError(
            f'{section}.adversarial_share={options.adversarial_share} must be at least one image of a batch of '
            f'{config.batch_size}.'
        )
    if options.adversarial_epochs > options.epochs:
        raise UserError(
            f'{section}.adversarial_epochs={options.adversarial_epochs} is more than {section}.epochs={options.epochs}.'
        )
    if options.cutmix > 0 and options.distillation == 0:
        raise UserError(
            f'{section}.cutmix={options.cutmix} leaves clean images without labels; set {section}.distillation above '
            '0, or cutmix to 0.'
        )
