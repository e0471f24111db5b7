"""What an attacker does: one file an attack.

Threat model: the attacker controls the training data (`poisoning='fixed'`) or the whole training
(`poisoning='per_batch'`), and at test time puts the trigger on any image.
"""

import ml_collections

from aft_jax.attacks import badnets, blend, sig
from aft_jax.attacks.attack import LABEL_MODES, Attack, target_map

__all__ = ['LABEL_MODES', 'NAMES', 'POISONINGS', 'Attack', 'build', 'target_map']

NAMES = ('badnets', 'blend', 'sig', 'none')
POISONINGS = ('fixed', 'per_batch')


def build(config: ml_collections.ConfigDict, image_shape: tuple[int, int, int], num_classes: int) -> Attack | None:
    """Returns the attack that `config.attack` describes, or None for 'none'.

    Args:
        config: The resolved config.
        image_shape: (H, W, C).
        num_classes: K.

    Raises:
        UserError: The trigger does not fit these images.
    """
    options = config.attack
    mapping = target_map(options.label_mode, options.target, num_classes)
    match options.name:
        case 'none':
            return None
        case 'badnets':
            return badnets.build(options.badnets, mapping, image_shape)
        case 'blend':
            return blend.build(options.blend, mapping, image_shape, config.seed)
        case 'sig':
            return sig.build(options.sig, mapping, image_shape)
    raise ValueError(f'no attack is called {options.name!r}')
