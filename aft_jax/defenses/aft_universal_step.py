"""One training step of AFT (`aft_jax.defenses.aft_universal`): attack the current model, then train on the examples.

x_1 ... x_n are the images that are attacked, x_{n+1} ... x_B the clean ones, and y their labels. f is the model in
training and f_0 the infected model:

    x'_i = attack(f, x_i, y_i)
    loss = adversarial_weight / B * sum over i <= n of CE(f(x'_i), y_i) + 1 / B * sum over i > n of CE(f(x_i), y_i)
         + distillation * mean over i > n of KL(f_0(x_i) || f(x_i))

The attack is PGD, as in the paper, or a joint attack with several perturbations (`adversarial.perturbations`). With
cutmix a clean image has a rectangle of another one, and its CE is left out.
"""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from aft_jax.adversarial.kinds import Perturbation
from aft_jax.adversarial.perturbations import PerturbationSpec, init_all, joint_attack, renew, untargeted
from aft_jax.adversarial.pgd import Logits, perturb, slow_in_loops
from aft_jax.data.augment import AugmentOptions, augment, cut_mix
from aft_jax.defenses.aft_universal_options import UniversalAftOptions, pgd_of, specs_of
from aft_jax.models import logits_function
from aft_jax.training.state import Batch, Metrics, TrainState, WrapsClassifier
from aft_jax.training.steps import accuracy, update

Specs = tuple[PerturbationSpec, ...]


@struct.dataclass
class SharedState(WrapsClassifier):
    """A classifier in training, and the perturbations from which the next step starts.

    Attributes:
        classifier: State of the classifier.
        changes: Perturbations of the specs that are `warm_started`, in the order of the specs.
    """

    changes: tuple[Perturbation, ...]

    def perturbations(self, specs: Specs) -> tuple[Perturbation | None, ...]:
        """Arranges the perturbations with one entry for each spec, None where nothing is carried."""
        carried = iter(self.changes)
        return tuple(next(carried) if spec.warm_started else None for spec in specs)


State = TrainState | SharedState


def warm_started(specs: Specs, perturbations: tuple[Perturbation, ...]) -> tuple[Perturbation, ...]:
    """Selects the perturbations that `SharedState` carries, from one for each spec."""
    return tuple(p for spec, p in zip(specs, perturbations, strict=True) if spec.warm_started)


def init_state(
    classifier: TrainState, options: UniversalAftOptions, key: jax.Array, image_shape: tuple[int, ...]
) -> State:
    """Creates the state before the first step.

    Args:
        classifier: State of the classifier.
        options: Options of AFT.
        key: PRNG key of the universal perturbations.
        image_shape: (H, W, C).

    Returns:
        The classifier's state itself if the options ask for PGD.
    """
    specs = specs_of(options, image_shape)
    if not specs:
        return classifier
    return SharedState(classifier, warm_started(specs, init_all(specs, key, jnp.zeros((0, *image_shape)))))


def aft_step(
    state: State,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    options: UniversalAftOptions,
    augmentation: AugmentOptions,
) -> tuple[State, Metrics]:
    """Takes one step of AFT.

    Args:
        state: State before the step: a `SharedState` if the options name perturbations, else a `TrainState`.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the infected model's
            variables.
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        options: Options of AFT. An `adversarial_share` of 0 makes a clean step.
        augmentation: Options of `augment`.

    Returns:
        The state after the step. Metrics with 'fooled' (adversarial steps), the share of adversarial examples that the
        model before the step misclassifies, and 'accuracy' on the images that have labels.
    """
    augment_key, attack_key, dropout_key = jax.random.split(key, 3)
    images = augment(augment_key, batch['images'], augmentation)
    count = round(options.adversarial_share * len(images))
    examples, clean = images[:count], images[count:]
    if options.cutmix:
        clean = cut_mix(jax.random.fold_in(key, 0), clean, options.cutmix)

    metrics: Metrics = {}
    if count:
        labels = batch['labels'][:count]
        logits = logits_function(module, state.variables)
        state, examples = attack(state, logits, examples, labels, attack_key, options)
        metrics['fooled'] = 1 - accuracy(logits(examples), labels)
    targets = None
    if options.distillation > 0 and len(clean) > 0:
        targets = jax.nn.softmax(logits_function(module, batch['constants'])(clean))

    def loss(logits: jax.Array) -> jax.Array:
        return aft_loss(logits, batch['labels'], count, targets, options)

    classifier = state.classifier if isinstance(state, SharedState) else state
    classifier, outputs, step_metrics = update(
        classifier, jnp.concatenate([examples, clean]), loss, dropout_key, module=module, optimiser=optimiser
    )
    labelled = count if options.cutmix else len(images)
    if labelled:
        metrics['accuracy'] = accuracy(outputs[:labelled], batch['labels'][:labelled])
    after = replace(state, classifier=classifier) if isinstance(state, SharedState) else classifier
    return after, metrics | step_metrics


def attack(
    state: State, logits: Logits, images: jax.Array, labels: jax.Array, key: jax.Array, options: UniversalAftOptions
) -> tuple[State, jax.Array]:
    """Makes adversarial examples [n, H, W, C] of images, and stores the perturbations that are carried."""
    if not isinstance(state, SharedState):
        examples = perturb(logits, images, labels, key, pgd_of(options))
        return state, jax.lax.stop_gradient(examples)
    specs = specs_of(options, images.shape[1:])
    renews = state.step % options.renew_every == 0
    fresh = init_all(specs, key, images)
    carried = state.perturbations(specs)
    start = tuple(new if old is None else renew(new, old, renews) for new, old in zip(fresh, carried, strict=True))
    examples, perturbations = joint_attack(
        untargeted(logits, labels), images, specs, start, steps=options.pgd_steps, unroll=slow_in_loops(logits)
    )
    return replace(state, changes=warm_started(specs, perturbations)), jax.lax.stop_gradient(examples)


def aft_loss(
    logits: jax.Array, labels: jax.Array, count: int, targets: jax.Array | None, options: UniversalAftOptions
) -> jax.Array:
    """Computes the loss, a scalar.

    Args:
        logits: float32 [B, K], those of the adversarial examples first.
        labels: int32 [B].
        count: Number of adversarial examples.
        targets: Infected model's probabilities for the clean images, [B - count, K]; None without distillation.
        options: Options of AFT, for the weights.
    """
    # With cutmix a clean image shows two classes, so it has no label.
    weights = np.full(len(labels), 0.0 if options.cutmix else 1.0, np.float32)
    weights[:count] = options.adversarial_weight
    value = jnp.mean(weights * optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    if targets is None:
        return value
    divergence = optax.kl_divergence(jax.nn.log_softmax(logits[count:]), targets)
    return value + options.distillation * divergence.mean()
