"""What can be wrong with the recipes of the defenses."""

import ml_collections

from aft_jax.adversarial.perturbations import KINDS
from aft_jax.adversarial.pgd import NORMS
from aft_jax.config import AFT_PRESETS, AFT_SECTIONS, resolve
from aft_jax.errors import UserError
from aft_jax.training.optimiser import SCHEDULES
from aft_jax.validation.checks import in_pixels, names, not_negative, one_of, positive, value


def validate_defenses(config: ml_collections.ConfigDict) -> None:
    """Checks the recipe of every defense, whether it is asked for or not."""
    for name in AFT_SECTIONS:
        one_of(f'{name}.preset', config[name].preset, tuple(AFT_PRESETS))
    # The preset fills what the config leaves open, so that checks see what will be used.
    config = resolve(config)
    for name in AFT_SECTIONS:
        _validate_aft(config, name)
    positive(config, 'ft.epochs')
    one_of('ft.schedule', config.ft.schedule, SCHEDULES)
    _validate_nad(config)
    _validate_mcr(config)
    _validate_pruning(config)
    for name in ('ft', 'fp', 'nad'):
        rates = config[name].learning_rates
        if not rates or min(rates) <= 0 or list(rates) != sorted(set(rates)):
            raise UserError(f'{name}.learning_rates={rates} must be positive numbers that rise, one or more.')
    not_negative(config, *(f'{name}.max_grad_norm' for name in ('ft', 'fp', 'nad', 'mcr')))
    _validate_pbe(config)


def _validate_aft(config: ml_collections.ConfigDict, name: str) -> None:
    aft = config[name]
    one_of(f'{name}.norm', aft['norm'], NORMS)
    for field in ('universal', 'per_image'):
        for kind in names(aft[field]):
            one_of(f'{name}.{field}', kind, KINDS)
    sizes = {'linf': 'eps', 'l2': 'rms_eps', 'sparse': 'sparse_share', 'warp': 'warp_share'}
    used = [sizes[kind] for kind in names(f'{aft["universal"]},{aft["per_image"]}')]
    if not used and aft['norm'] == 'linf':
        used = ['eps', 'step_size']
    for field in ('eps', 'step_size', 'rms_eps'):
        if field in used:
            in_pixels(f'{name}.{field}', aft[field])
    for field in ('sparse_share', 'warp_share'):
        if aft[field] > 1 or (field in used and aft[field] <= 0):
            raise UserError(f'{name}.{field}={aft[field]} is a share: above 0 and at most 1.')
    lengths = ('epochs', 'adversarial_epochs', 'learning_rate')
    positive(config, *(f'{name}.{field}' for field in ('eps', 'step_size', 'pgd_steps', 'renew_every', *lengths)))
    not_negative(config, f'{name}.max_grad_norm')
    one_of(f'{name}.schedule', aft['schedule'], SCHEDULES)
    if not 0 < aft['adversarial_share'] <= 1 or round(aft['adversarial_share'] * config.batch_size) == 0:
        raise UserError(
            f'{name}.adversarial_share={aft["adversarial_share"]} must lie above 0 and at most at 1, and be '
            'at least one image of a batch.'
        )
    if aft['adversarial_epochs'] > aft['epochs']:
        raise UserError(
            f'{name}.adversarial_epochs={aft["adversarial_epochs"]} is more than {name}.epochs={aft["epochs"]}.'
        )
    not_negative(config, *(f'{name}.{field}' for field in ('adversarial_weight', 'distillation', 'cutmix')))
    if aft['cutmix'] > 1:
        raise UserError(f'{name}.cutmix={aft["cutmix"]} is a share of an image, at most 1.')
    if aft['cutmix'] > 0 and aft['distillation'] == 0:
        raise UserError(
            f'{name}.cutmix={aft["cutmix"]} leaves clean images without labels, so that it takes {name}.distillation '
            'above 0.'
        )


def _validate_nad(config: ml_collections.ConfigDict) -> None:
    positive(config, *(f'nad.{field}' for field in ('teacher_epochs', 'epochs')))
    one_of('nad.schedule', config.nad.schedule, SCHEDULES)
    betas = config.nad.betas
    if not betas or min(betas) < 0:
        raise UserError(f'nad.betas={betas} must be weights of one stage or more, none of them negative.')


def _validate_mcr(config: ml_collections.ConfigDict) -> None:
    positive(config, *(f'mcr.{field}' for field in ('endpoint_epochs', 'epochs', 'learning_rate')))
    one_of('mcr.schedule', config.mcr.schedule, SCHEDULES)
    candidates = config.mcr.candidates
    if not candidates or not all(0 < t < 1 for t in candidates):
        raise UserError(f'mcr.candidates={candidates} must lie strictly between 0 and 1, one or more.')


def _validate_pruning(config: ml_collections.ConfigDict) -> None:
    positive(config, 'fp.epochs', 'anp.iterations', 'anp.learning_rate', 'anp.eps')
    one_of('fp.schedule', config.fp.schedule, SCHEDULES)
    for field in ('anp.eps', 'anp.clean_weight'):
        if not 0 <= value(config, field) <= 1:
            raise UserError(f'{field}={value(config, field)} is a share: at least 0 and at most 1.')


def _validate_pbe(config: ml_collections.ConfigDict) -> None:
    options = config.pbe
    _validate_aft(config, 'pbe')
    positive(config, 'pbe.first_epochs', 'pbe.first_learning_rate')
    for share in (options.first_share, *options.keep):
        if not 0 < share <= 1:
            raise UserError(f'pbe.first_share and pbe.keep are shares above 0 and at most 1, and one is {share}.')
