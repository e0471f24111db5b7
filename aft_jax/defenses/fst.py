"""FST: feature shift tuning (Min et al., "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS
2023, arXiv 2310.01875).

Fine-tuning hardly moves the features of a backdoor, because the infected head already separates the clean images well.
FST draws new values for the head, and trains the whole network with a head that is unlike the infected one:

    loss = CE(model, true labels) + alpha <W, W0>        and after each step    W <- W |W0| / |W|

W is the kernel of the head and W0 that of the infected head. <.,.> is the sum over the products of all entries and |.|
the Frobenius norm. The constraint keeps the penalty from making W arbitrarily long. At the start the kernel and the
bias of the head are drawn from U(-1/sqrt(d), 1/sqrt(d)) for d inputs, as torch initialises a dense layer. The penalty
leaves out the bias.

The paper trains for 10 epochs in batches of 128, with SGD at .01 (cosine, momentum .9, no weight decay) on 2 % of
CIFAR-10. Its alpha is .1 in the README of the released code and .2 in the code, and smaller for data sets of many
classes. Here `defender.tune` chooses the learning rate. Momentum and weight decay are those of the other defenses.

Alpha trades accuracy against what is left of the backdoor. It was tried on three networks `mnist_cnn` with triggers of
the attack `random` (Fashion-MNIST, 3,000 clean images, one seed, ASR 92 to 96 % before). With .1, each of the three
learning rates cost 4.2 to 5.4 points of accuracy and left an ASR of at most 1 %. On the first network 20 or 40 epochs
were no better. There .01 cost 2.6 to 3.7 points and left 3 to 14 %, and 0 cost 2.2 to 3.1 points and left 24 to 29 %.

Needs: the infected model and clean images. Costs: one training step a batch, for each learning rate.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, require_head
from aft_jax.defenses.new_head import draw_uniform, head_step, purify_with_new_head
from aft_jax.models.head import HeadPath, layer_at, replace_layer
from aft_jax.randomness import key_for
from aft_jax.training.stage import Run
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import cross_entropy


class FstOptions(NamedTuple):
    """Section `fst` of the config.

    Attributes:
        alpha: Weight of the penalty.
        epochs: Length of the training.
        learning_rates: Candidates, from the weakest to the strongest.
        schedule: 'constant' or 'cosine'.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    alpha: float
    epochs: float
    learning_rates: tuple[float, ...]
    schedule: str
    max_grad_norm: float


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Trains the infected model with a new head, for each learning rate, and takes the strongest model.

    Args:
        run: Experiment.
        name: Name of the defense. All learning rates start from the same new head.
        data: Infected model and clean images.
        settings: Settings with `FstOptions`.

    Raises:
        UserError: The classifier does not end with a dense layer.
    """
    options: FstOptions = settings.options
    head = require_head('fst', data.module, data.images.shape[1:])
    params = draw_head(key_for(run.seed, f'{name}/head'), data.variables['params'], head)
    loss = partial(fst_loss, alpha=options.alpha)
    return purify_with_new_head(run, name, data, settings, head=head, params=params, loss=loss)


def draw_head(key: jax.Array, params: Any, head: HeadPath) -> Any:
    """Copies the parameters with new values for the head, drawn from U(-1/sqrt(d), 1/sqrt(d)) for d inputs.

    Args:
        key: PRNG key.
        params: Parameters of the infected model.
        head: Path of the head.
    """
    layer = layer_at(params, head)
    return replace_layer(params, head, draw_uniform(key, layer, layer['kernel'].shape[0] ** -0.5))


def fst_loss(
    logits: jax.Array, labels: jax.Array, kernel: jax.Array, infected_kernel: jax.Array, *, alpha: float
) -> jax.Array:
    """Computes the loss of FST.

    Args:
        logits: float32 [B, K].
        labels: int32 [B].
        kernel: Kernel of the head, float32 [d, K].
        infected_kernel: Kernel of the infected head, float32 [d, K].
        alpha: Weight of the penalty.
    """
    penalty = alpha * jnp.sum(kernel * infected_kernel)
    return cross_entropy(logits, labels) + penalty


def fst_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    head: HeadPath,
    alpha: float,
    augmentation: AugmentOptions,
) -> tuple[TrainState, Metrics]:
    """Takes one step of FST with a penalty of weight `alpha`; the other arguments are those of `head_step`."""
    return head_step(
        state,
        batch,
        key,
        module=module,
        optimiser=optimiser,
        head=head,
        loss=partial(fst_loss, alpha=alpha),
        augmentation=augmentation,
    )
