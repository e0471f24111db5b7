"""D3: distance-driven detoxification (Wei et al., "Backdoor Mitigation by Distance-Driven Detoxification", ICCV 2025,
arXiv 2411.09585).

Fine-tuning stays near the infected weights. D3 looks for weights as far from them as a low clean loss allows. The
distance is that of the head's kernel W from the infected kernel W0, both of the same length:

    max |W - W0|    subject to    mean max(0, CE(f(x), y) - threshold) = 0    and    |W| = |W0|

|.| is the Frobenius norm. The first constraint becomes a term of the loss, and after each step W is scaled to |W0|:

    loss = [weight * mean max(0, CE(f(x), y) - threshold) - |W - W0|] / (weight + 1)

The divisor is 1 for a weight of at most 1. At the start W is drawn from U(-.5, .5) and scaled to |W0|. The bias of the
head starts from the infected one. The whole network is trained with batch statistics. The step is that of FST
(`new_head`), which penalises the inner product of W and W0 instead. Nothing makes the features forget the backdoor.

The paper trains on 5 % of CIFAR-10 for 100 epochs in batches of 256, with SGD at .01 (cosine, momentum .9), without
weight decay. It states a weight of 10, the default here. The configuration in the released code has .5. The code can
also start from -W0, 0, or W0 with noise, and take the distance of other layers. Momentum and weight decay are those of
the other defenses.

Needs: the infected model and clean images. Costs: one training step a batch, for each learning rate.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, require_head
from aft_jax.defenses.new_head import draw_uniform, purify_with_new_head, with_length
from aft_jax.models.head import layer_at, replace_layer
from aft_jax.randomness import key_for
from aft_jax.training.stage import Run

START_BOUND = 0.5


class D3Options(NamedTuple):
    """Section `d3` of the config.

    Attributes:
        weight: Weight of the clean loss beside the distance.
        threshold: Cross-entropy of an image below which it has no gradient.
        epochs: Length of the training.
        learning_rates: Candidates, from the weakest to the strongest.
        schedule: 'constant' or 'cosine'.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    weight: float
    threshold: float
    epochs: float
    learning_rates: tuple[float, ...]
    schedule: str
    max_grad_norm: float


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Trains the infected model away from its head, for each learning rate, and takes the strongest model.

    Args:
        run: Experiment.
        name: Name of the defense. All learning rates start from the same new kernel.
        data: Infected model and clean images.
        settings: Settings with `D3Options`.

    Raises:
        UserError: The classifier does not end with a dense layer.
    """
    options: D3Options = settings.options
    head = require_head('d3', data.module, data.images.shape[1:])
    infected = layer_at(data.variables['params'], head)
    drawn = draw_uniform(key_for(run.seed, f'{name}/head'), {'kernel': infected['kernel']}, START_BOUND)
    params = replace_layer(data.variables['params'], head, infected | drawn)
    params = with_length(params, head, jnp.linalg.norm(infected['kernel']))
    loss = partial(d3_loss, weight=options.weight, threshold=options.threshold)
    return purify_with_new_head(run, name, data, settings, head=head, params=params, loss=loss)


def d3_loss(
    logits: jax.Array,
    labels: jax.Array,
    kernel: jax.Array,
    infected_kernel: jax.Array,
    *,
    weight: float,
    threshold: float,
) -> jax.Array:
    """Computes the loss of D3.

    Args:
        logits: float32 [B, K].
        labels: int32 [B].
        kernel: Kernel of the head, float32 [d, K].
        infected_kernel: Kernel of the infected head, float32 [d, K].
        weight: Weight of the clean loss.
        threshold: Cross-entropy of an image below which it has no gradient.
    """
    excess = jax.nn.relu(optax.softmax_cross_entropy_with_integer_labels(logits, labels) - threshold).mean()
    loss = weight * excess - jnp.linalg.norm(kernel - infected_kernel)
    return loss / (weight + 1) if weight > 1 else loss
