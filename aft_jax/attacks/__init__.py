"""What an attacker does: one file an attack.

Threat model: the attacker controls the training data (`poisoning='fixed'`) or the whole training
(`poisoning='per_batch'`), and at test time puts the trigger on any image. The input-aware attack always controls the
training, because its trigger is trained along with the classifier; `poisoning` says nothing about it.
"""

import ml_collections
import numpy as np

from aft_jax.attacks import badnets, blend, input_aware, sig, training, wanet
from aft_jax.attacks.attack import LABEL_MODES, Attack, target_map
from aft_jax.attacks.training import Infection, Learner
from aft_jax.training.loop import Run

__all__ = ['LABEL_MODES', 'NAMES', 'POISONINGS', 'Attack', 'Infection', 'Learner', 'begin', 'build', 'target_map']

NAMES = ('badnets', 'blend', 'sig', 'wanet', 'input_aware', 'none')
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
        case 'wanet':
            return wanet.build(options.wanet, mapping, image_shape, config.seed)
        case 'input_aware':
            return input_aware.build(mapping, image_shape, config.seed)
    raise ValueError(f'no attack is called {options.name!r}')


def begin(
    run: Run, attack: Attack | None, arrays: dict[str, np.ndarray], learner: Learner, config: ml_collections.ConfigDict
) -> Infection:
    """Returns how the classifier is trained under the attack, once what comes before that is done.

    Args:
        run: The experiment.
        attack: As `build` returns it, or None.
        arrays: 'images' uint8 [N, H, W, C] and 'labels' int32 [N], as the attacker left them.
        learner: The classifier.
        config: The resolved config.
    """
    if attack is not None and attack.joint:
        return input_aware.begin(run, attack, arrays, learner, config)
    return training.plain(attack, learner, config)
