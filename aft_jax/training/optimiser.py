"""SGD and Adam as the papers use them, and the options of a training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ('constant', 'cosine', 'one_cycle')
# Of a cycle: the share of the steps in which the learning rate rises, and the share of its peak with which it starts.
WARM_UP, CYCLE_START = 0.3, 0.1


class TrainOptions(NamedTuple):
    """Section `train` of the config: how the infected model is trained.

    Defenses take `momentum` and `weight_decay` from here.

    Attributes:
        epochs: Passes over the training set.
        learning_rate: Learning rate of the first step.
        schedule: One of SCHEDULES.
        momentum: Share of the last update that is kept.
        weight_decay: Factor of the parameters that is added to their gradient.
    """

    epochs: float
    learning_rate: float
    schedule: str
    momentum: float
    weight_decay: float


def sgd(
    learning_rate: float,
    schedule: str,
    steps: int,
    *,
    momentum: float,
    weight_decay: float,
    max_grad_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Builds SGD with momentum and coupled weight decay, as torch.optim.SGD computes it.

    Args:
        learning_rate: Learning rate of the first step; with 'one_cycle' the largest one.
        schedule: 'constant'; 'cosine', which falls to zero over `steps`; or 'one_cycle', which rises first (Smith and
            Topin, "Super-Convergence", 2019).
        steps: Length of the training.
        momentum: Share of the last update that is kept.
        weight_decay: Factor w. The gradient of every parameter p becomes g + w p.
        max_grad_norm: Largest L2 norm of the whole gradient before weight decay. A longer one is scaled down; 0 for no
            limit.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if schedule != 'constant':
        decay = (
            optax.cosine_decay_schedule(learning_rate, steps)
            if schedule == 'cosine'
            else one_cycle(learning_rate, steps)
        )
        # Optax divides the integer count, which strict dtype promotion forbids.
        rate = lambda count: decay(jnp.asarray(count, jnp.float32))  # noqa: E731
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    return optax.chain(*clip, optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum))


def adam(rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Builds Adam without weight decay, as torch.optim.Adam computes it.

    Args:
        rate: Learning rate, or a schedule of it.
        b1: Share of the mean gradient that is kept.
        b2: Share of the mean squared gradient that is kept.
    """
    inner = optax.adam(rate, b1=b1, b2=b2)

    def update(updates: Any, opt_state: Any, params: Any = None) -> tuple[Any, Any]:
        # Optax raises a float to the power of its integer count, which strict promotion forbids.
        with jax.numpy_dtype_promotion('standard'):
            return inner.update(updates, opt_state, params)

    return optax.GradientTransformation(inner.init, update)


def one_cycle(peak: float, steps: int) -> optax.Schedule:
    """Builds a learning rate that rises linearly from a tenth of the peak, and then falls along a cosine to zero."""
    rising = round(WARM_UP * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(CYCLE_START * peak, peak, max(1, rising)),
            optax.cosine_decay_schedule(peak, max(1, steps - rising)),
        ],
        [rising],
    )
