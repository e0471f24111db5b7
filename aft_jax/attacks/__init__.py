"""The attacks, one file for each.

Threat model: the attacker controls the training data (`poisoning='fixed'`) or the whole training
(`poisoning='per_batch'`), and at test time puts the trigger on any image. The input-aware attack always controls the
training, because its trigger is trained along with the classifier. The field `poisoning` has no effect on it.
"""

import flax.linen as nn
import ml_collections
import optax

from aft_jax.attacks import badnets, blend, input_aware, random_trigger, sig, wanet
from aft_jax.attacks.attack import LABEL_MODES, Attack, target_map
from aft_jax.attacks.input_aware_training import joint_training, train_mask_network
from aft_jax.attacks.training import AttackSettings, AttackTraining, attack_settings, standard_training
from aft_jax.config import BENIGN, as_options
from aft_jax.training.state import TrainState

__all__ = [
    'BENIGN',
    'LABEL_MODES',
    'NAMES',
    'POISONINGS',
    'Attack',
    'AttackSettings',
    'AttackTraining',
    'attack_settings',
    'build',
    'joint_training',
    'prepare_training',
    'standard_training',
    'target_map',
    'train_mask_network',
]

NAMES = ('badnets', 'blend', 'sig', 'wanet', 'input_aware', 'random', BENIGN)
POISONINGS = ('fixed', 'per_batch')


def build(config: ml_collections.ConfigDict, image_shape: tuple[int, int, int], num_classes: int) -> Attack | None:
    """Builds the attack of `config.attack`, or None for the benign control.

    Args:
        config: Resolved config.
        image_shape: (H, W, C).
        num_classes: K.

    Raises:
        UserError: The trigger does not fit these images.
    """
    options, seed = config.attack, config.seed
    if options.name == BENIGN:
        return None
    labels = target_map(options.label_mode, options.target, num_classes)
    match options.name:
        case 'badnets':
            return badnets.build(as_options(badnets.BadnetsOptions, options.badnets), labels, image_shape)
        case 'blend':
            return blend.build(as_options(blend.BlendOptions, options.blend), labels, image_shape, seed)
        case 'sig':
            return sig.build(as_options(sig.SigOptions, options.sig), labels, image_shape)
        case 'wanet':
            return wanet.build(as_options(wanet.WanetOptions, options.wanet), labels, image_shape, seed)
        case 'input_aware':
            return input_aware.build(labels, image_shape, seed)
        case 'random':
            return random_trigger.build(as_options(random_trigger.RandomOptions, options.random), labels, image_shape)
    raise ValueError(f'no attack is called {options.name!r}')


def prepare_training(
    attack: Attack | None,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    settings: AttackSettings,
) -> AttackTraining:
    """Prepares the stage 'infect' for any attack. Nothing is trained here.

    Args:
        attack: Attack, or None. If its trigger is trained, `train_mask_network` comes first.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        state: State of the classifier before the first step.
        settings: Settings of the training.
    """
    if attack is not None and attack.trigger_is_trained:
        return joint_training(attack, module, optimiser, state, settings)
    return standard_training(attack, module, optimiser, state, settings)
