"""SGD as the papers use it."""

import optax

SCHEDULES = ('constant', 'cosine')


def sgd(
    learning_rate: float, schedule: str, steps: int, momentum: float = 0.9, weight_decay: float = 5e-4
) -> optax.GradientTransformation:
    """Returns SGD with momentum and coupled weight decay, as torch.optim.SGD computes it.

    Args:
        learning_rate: At the first step.
        schedule: 'constant', or 'cosine', which falls to zero over `steps`.
        steps: Length of the training.
        momentum: Share of the last update that is kept.
        weight_decay: Added to the gradient as weight_decay * parameter, for every parameter.

    Returns:
        The optimiser.
    """
    rate = optax.cosine_decay_schedule(learning_rate, steps) if schedule == 'cosine' else learning_rate
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum))
