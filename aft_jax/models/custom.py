"""Import of a network of the user's own, by the name of the function that makes it."""

import importlib
import inspect

import flax.linen as nn
from flax import nnx
from flax.core import FrozenDict

from aft_jax.errors import UserError
from aft_jax.models.nnx_module import NnxClassifier


def make(factory: str, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """Calls the user's function that makes the network.

    Args:
        factory: 'package.module:function', importable from the current directory. The function is called as
            function(num_classes=K, mean=mean, std=std) and returns a module with
            `__call__(images, train=False) -> logits`. The images are float32 [B, H, W, C] in [0, 1], and the module
            normalises them itself. The logits are float32 [B, K]. The variables are 'params' and, with BatchNorm,
            'batch_stats'. Dropout uses the key 'dropout'. The defense `nad`, the observation and the pruning defenses
            also pass `features=True`, and expect (logits, feature maps [B, H, W, C] of each block). A class of Flax NNX
            is also allowed. It is constructed with the same arguments and `rngs`.
        num_classes: Number of classes K.
        mean: `config.model.mean`.
        std: `config.model.std`.

    Raises:
        UserError: If there is no such function, or it fails, or it returns something else.
    """
    place, _, name = factory.partition(':')
    if not (place and name.isidentifier()):
        raise UserError(f"model.factory={factory!r} should be 'package.module:function'.")
    try:
        function = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f'model.factory={factory} cannot be imported ({error}); name a function that `import {place}` finds from '
            'the current directory.'
        ) from error
    except Exception as error:  # The user's file may raise anything.
        raise UserError(f'model.factory={factory}: its file cannot be run ({_line(error)}).') from error
    if isinstance(function, type) and issubclass(function, nnx.Module):
        return NnxClassifier(function, FrozenDict(num_classes=num_classes, mean=mean, std=std))
    try:
        module = function(num_classes=num_classes, mean=mean, std=std)
    except Exception as error:  # The user's function may raise anything.
        raise UserError(
            f'model.factory={factory} cannot be called with num_classes, mean and std ({_line(error)}).'
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(f'model.factory={factory} returned a {type(module).__name__}, not a flax.linen.Module.')
    return module


def shows_features(module: nn.Module) -> bool:
    """Returns whether a module can return its feature maps.

    A module whose `__call__` takes `features` may still deny it by an attribute `has_features`.
    """
    kind = module.kind if isinstance(module, NnxClassifier) else type(module)
    return getattr(module, 'has_features', True) and 'features' in inspect.signature(kind.__call__).parameters


def _line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'.rstrip(': ')
