"""Compares one network in torch with the same network imported by its graph: logits, gradients, a training step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from aft_jax.interchange.program import Program, to_torch, to_variables
from aft_jax.interchange.torch_program import TorchProgram
from aft_jax.training.steps import cross_entropy


class Parity(NamedTuple):
    """Largest differences, each as a share of the largest absolute value in torch.

    Attributes:
        logits: Logits in evaluation mode.
        image_gradient: Gradient of the loss with respect to the images, in evaluation mode.
        image_noise: Change of that gradient in torch itself, when the images change by a millionth. A ReLU or a maximum
            that switches changes a gradient much more than rounding does.
        gradient: Gradient with respect to the parameters, in evaluation mode, as one vector.
        train_loss: Loss in training mode without dropout, relative.
        train_gradient: Gradient with respect to the parameters in training mode, as one vector.
        train_noise: Change of that gradient in torch itself, when the images change by a millionth.
        statistics: New running statistics, each tensor by itself.
        exact: Whether the weights come back bit for bit.
    """

    logits: float
    image_gradient: float
    image_noise: float
    gradient: float
    train_loss: float
    train_gradient: float
    train_noise: float
    statistics: float
    exact: bool


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Replaces trivial initial values: no unit scale, no zero bias, no zero weight, no zero counter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith('num_batches_tracked'):
                value.fill_(12)
            elif key.endswith('running_var'):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point() and (value.ndim < 2 or not value.any()):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def compare(model: torch.nn.Module, program: Program, count: int = 8) -> Parity:
    """Compares a network on random images.

    Args:
        model: Network in torch; its dropout and stochastic depth are switched off for the training step.
        program: Program of the network.
        count: Number of images.
    """
    variables = to_variables(program, program.file.tensors)
    channels, height, width = program.graph.image_shape
    module = TorchProgram(program=program, mean=(0.0,), std=(1.0,))
    generator = np.random.default_rng(0)
    images = generator.normal(size=(count, height, width, channels)).astype(np.float32)
    labels = generator.integers(0, program.num_classes, count)
    ours = {train: _ours(module, variables, images, labels, train) for train in (False, True)}
    theirs = {train: _theirs(model, images, labels, train) for train in (False, True)}
    noisy_images = images * (1 + 1e-6 * generator.normal(size=images.shape).astype(np.float32))
    noisy = {train: _theirs(model, noisy_images, labels, train) for train in (False, True)}
    names = [key for key, place in program.places.items() if place[0] == 'params']

    def flat(gradient: Mapping[str, Any]) -> np.ndarray:
        leaves = flatten_dict(gradient)
        return np.concatenate([to_torch(leaves[program.places[key][1:]], program.places[key]).ravel() for key in names])

    def theirs_flat(gradient: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([gradient[key].ravel() for key in names])

    new = flatten_dict(ours[True]['batch_stats'])
    running = {key: place for key, place in program.places.items() if place[0] == 'batch_stats' and len(place) == 3}
    statistics = [difference(new[place[1:]], theirs[True]['state'][key]) for key, place in running.items()]
    before = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    leaves = flatten_dict(to_variables(program, program.file.tensors))
    exact = (
        all(
            np.array_equal(to_torch(leaves[place], place), program.file.tensors[key].astype(np.float32))
            for key, place in program.places.items()
        )
        and before.keys() >= program.places.keys()
    )
    loss, torch_loss = float(ours[True]['loss']), float(theirs[True]['loss'])
    return Parity(
        logits=difference(ours[False]['logits'], theirs[False]['logits']),
        image_gradient=difference(ours[False]['images'].transpose(0, 3, 1, 2), theirs[False]['images']),
        image_noise=difference(noisy[False]['images'], theirs[False]['images']),
        gradient=difference(flat(ours[False]['params']), theirs_flat(theirs[False]['params'])),
        train_loss=abs(loss - torch_loss) / abs(torch_loss),
        train_gradient=difference(flat(ours[True]['params']), theirs_flat(theirs[True]['params'])),
        train_noise=difference(theirs_flat(noisy[True]['params']), theirs_flat(theirs[True]['params'])),
        statistics=max(statistics, default=0.0),
        exact=exact,
    )


def difference(ours: Any, theirs: Any) -> float:
    """Computes the largest absolute difference as a share of the largest absolute value of the second array."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def _ours(module: TorchProgram, variables: dict, images: np.ndarray, labels: np.ndarray, train: bool) -> dict[str, Any]:
    def keep(call, arguments, options, context):
        return arguments[0] if isinstance(context.module, nn.Dropout) else call(*arguments, **options)

    @jax.jit
    def run(params, images):
        def objective(params, images):
            inputs = {'params': params, 'batch_stats': variables['batch_stats']}
            with nn.intercept_methods(keep):
                logits, updated = module.apply(inputs, images, train=train, mutable=['batch_stats'])
            return cross_entropy(logits, jnp.asarray(labels)), (logits, updated.get('batch_stats', {}))

        (loss, (logits, stats)), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, images)
        return {'loss': loss, 'logits': logits, 'params': gradients[0], 'images': gradients[1], 'batch_stats': stats}

    return jax.tree.map(np.asarray, run(variables['params'], images))


def _theirs(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, train: bool) -> dict[str, Any]:
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.train(train)
    for module in model.modules():
        if 'Dropout' in type(module).__name__ or type(module).__name__ in ('StochasticDepth', 'DropPath'):
            module.eval()
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    for parameter in model.parameters():
        parameter.grad = None
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().requires_grad_()
    logits = model(x)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    result = {
        'loss': loss.detach().numpy(),
        'logits': logits.detach().numpy(),
        'images': x.grad.numpy(),
        'params': {key: p.grad.numpy().copy() for key, p in model.named_parameters() if p.grad is not None},
        'state': {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()},
    }
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(state[key])
    model.eval()
    return result
