"""One training step of AFT (`aft_jax.defenses.aft`): attack the current model, then train on the examples.

f is the model in training, f_0 the infected model and r the reference model. x are the clean images of a batch, y their
labels, x' adversarial examples of some of them, and x~ CutMix mixtures of them:

    x'   = attack on CE(f(x'), y) - CE(r(x'), y)
    loss = cross_entropy * CE(f(x), y) + distillation * T^2 KL(f_0(x) || f(x), both at temperature T)
         + adversarial_weight * KL(r(x') || f(x'))
         + mixture_weight * KL(q(x~) || f(x~)),     q proportional to min(f_0, r), class by class

with means over the images.

A universal perturbation goes on from the one of the step before, so that it follows the model and becomes stronger than
`pgd_steps` steps make it. After `renew_every` steps it starts again, at another place and of another size. The kinds
take turns in starting again.
"""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from aft_jax.adversarial.kinds import Perturbation
from aft_jax.adversarial.perturbations import Objective, PerturbationSpec, init, init_all, joint_attack, renew
from aft_jax.adversarial.pgd import Logits, slow_in_loops
from aft_jax.data.augment import AugmentOptions, augment, cut_mix
from aft_jax.defenses.aft_options import AftOptions, specs_of
from aft_jax.models import logits_function
from aft_jax.training import averaging
from aft_jax.training.averaging import AveragedState
from aft_jax.training.state import Batch, Metrics
from aft_jax.training.steps import accuracy, update

LARGEST_CUT = 1.0


@struct.dataclass
class AftState(AveragedState):
    """A classifier in training, its average, and the universal perturbations from which the next step starts.

    Attributes:
        changes: Perturbation of each universal spec, in the order of the specs.
    """

    changes: tuple[Perturbation, ...]


def init_state(averaged: AveragedState, options: AftOptions, image_shape: tuple[int, ...]) -> AftState:
    """Creates the state before the first step, which starts all perturbations again; `image_shape` is (H, W, C)."""
    images = jnp.zeros((1, *image_shape))
    specs = [spec for spec in specs_of(options, image_shape) if spec.universal]
    changes = tuple(init(spec, jax.random.key(0), images, images) for spec in specs)
    return AftState(averaged.classifier, averaged.average, changes)


def aft_step(
    state: AftState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    options: AftOptions,
    augmentation: AugmentOptions,
) -> tuple[AftState, Metrics]:
    """Takes one step of AFT.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', a dict with the variables
            of the 'infected' and of the 'reference' model.
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        options: Options of AFT.
        augmentation: Options of `augment`.

    Returns:
        The state after the step. Metrics with 'fooled', the share of adversarial examples that the model before the
        step misclassifies and the reference model does not, and 'accuracy' on clean images.
    """
    augment_key, attack_key, mix_key, dropout_key = jax.random.split(key, 4)
    images, labels = augment(augment_key, batch['images'], augmentation), batch['labels']
    infected = logits_function(module, batch['constants']['infected'])
    reference = logits_function(module, batch['constants']['reference'])
    current = logits_function(module, state.classifier.variables)
    size = len(images)
    count = max(1, round(options.adversarial_share * size))

    # The batch is in random order, so its first images are as good as any.
    examples, changes = attack(state, reference, images[:count], labels[:count], attack_key, module, options)
    mixtures = cut_mix(mix_key, images, LARGEST_CUT)
    infected_logits = infected(jnp.concatenate([images, mixtures]))
    reference_logits = reference(jnp.concatenate([examples, mixtures]))
    targets = agreement(infected_logits[size:], reference_logits[count:])

    def loss(logits: jax.Array) -> jax.Array:
        clean, adversarial, mixed = jnp.split(logits, (size, size + count))
        return (
            options.cross_entropy * optax.softmax_cross_entropy_with_integer_labels(clean, labels).mean()
            + options.distillation * divergence(infected_logits[:size], clean, options.temperature)
            + options.adversarial_weight * divergence(reference_logits[:count], adversarial)
            + options.mixture_weight * optax.kl_divergence(jax.nn.log_softmax(mixed), targets).mean()
        )

    fooled = (current(examples).argmax(axis=-1) != labels[:count]) & (
        reference_logits[:count].argmax(axis=-1) == labels[:count]
    )
    inputs = jnp.concatenate([images, examples, mixtures])
    classifier, logits, metrics = update(
        state.classifier, inputs, loss, dropout_key, module=module, optimiser=optimiser
    )
    metrics |= {'fooled': fooled.mean(dtype=jnp.float32), 'accuracy': accuracy(logits[:size], labels)}
    after = averaging.follow(state, classifier, options.averaging)
    return replace(after, changes=changes), metrics


def attack(
    state: AftState,
    reference: Logits,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    module: nn.Module,
    options: AftOptions,
) -> tuple[jax.Array, tuple[Perturbation, ...]]:
    """Makes adversarial examples that fool the current model and not the reference.

    Args:
        state: State before the step.
        reference: Reference model.
        images: Images to be attacked, float32 [n, H, W, C].
        labels: int32 [n].
        key: PRNG key.
        module: Classifier.
        options: Options of AFT.

    Returns:
        The examples, float32 [n, H, W, C], and the universal perturbations.
    """
    current = logits_function(module, state.classifier.variables)
    specs = specs_of(options, images.shape[1:])
    objective = difference(current, reference, labels)
    fresh = init_all(specs, key, images, jax.grad(lambda x: objective(x).sum())(images))
    start = resume(specs, fresh, state.changes, state.step, options.renew_every)
    examples, perturbations = joint_attack(
        objective, images, specs, start, steps=options.pgd_steps, unroll=slow_in_loops(current)
    )
    changes = tuple(p for spec, p in zip(specs, perturbations, strict=True) if spec.universal)
    return jax.lax.stop_gradient(examples), changes


def resume(
    specs: tuple[PerturbationSpec, ...],
    fresh: tuple[Perturbation, ...],
    carried: tuple[Perturbation, ...],
    step: jax.Array,
    renew_every: int,
) -> tuple[Perturbation, ...]:
    """Chooses the perturbations with which the attack of a step starts.

    Args:
        specs: Kinds and sizes.
        fresh: Random perturbation of each spec.
        carried: Perturbation of each universal spec after the step before.
        step: int32 scalar, steps taken. At step 0 all perturbations are fresh.
        renew_every: Steps after which a universal perturbation is fresh again.
    """
    universal = [i for i, spec in enumerate(specs) if spec.universal]
    start = list(fresh)
    for turn, (i, old) in enumerate(zip(universal, carried, strict=True)):
        renews = (step == 0) | ((step + turn * renew_every // len(universal)) % renew_every == 0)
        start[i] = renew(fresh[i], old, renews)
    return tuple(start)


def difference(current: Logits, reference: Logits, labels: jax.Array) -> Objective:
    """Builds the objective CE(current(x), y) - CE(reference(x), y) for images with `labels`, int32 [n]."""

    def objective(images: jax.Array) -> jax.Array:
        losses = [optax.softmax_cross_entropy_with_integer_labels(f(images), labels) for f in (current, reference)]
        return losses[0] - losses[1]

    return objective


def agreement(infected_logits: jax.Array, reference_logits: jax.Array) -> jax.Array:
    """Computes the probabilities, [B, K], on which two models agree.

    A class keeps the smaller of its two probabilities. Where only the infected model sees the target label, because a
    mixture looks like the trigger, the target label has no share in the result.
    """
    # Logarithms, because the smaller probabilities of all classes may be too small for float32.
    least = jnp.minimum(jax.nn.log_softmax(infected_logits), jax.nn.log_softmax(reference_logits))
    return jax.nn.softmax(least)


def divergence(target_logits: jax.Array, logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Computes the mean of T^2 KL(target || model) over the images, both softened by the temperature T."""
    targets = jax.nn.softmax(target_logits / temperature)
    return temperature**2 * optax.kl_divergence(jax.nn.log_softmax(logits / temperature), targets).mean()
