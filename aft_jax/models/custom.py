"""A network of the user's own, by the name of the function that makes it."""

import importlib
import inspect

import flax.linen as nn

from aft_jax.errors import UserError


def make(factory: str, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """Returns the module that a function of the user's makes.

    Args:
        factory: 'package.module:function', importable from where the command was started. The function is called as
            function(num_classes=K, mean=mean, std=std) and returns a module with
            `__call__(images, train=False) -> logits`: float32 images [B, H, W, C] in [0, 1], which it normalises
            itself, to float32 logits [B, K]. Its variables are 'params' and, where it has BatchNorm, 'batch_stats';
            dropout draws from the key 'dropout'. The defense `nad`, the observation and the pruning defenses ask for
            `features=True` as well, for (logits, feature maps [B, H, W, C] of its stages).
        num_classes: K.
        mean: `config.model.mean`.
        std: `config.model.std`.

    Raises:
        UserError: There is no such function, it fails, or it returns something else.
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
    except Exception as error:  # Whatever the user's file raises.
        raise UserError(f'model.factory={factory}: its file cannot be run ({_line(error)}).') from error
    try:
        module = function(num_classes=num_classes, mean=mean, std=std)
    except Exception as error:  # Whatever the user's function raises.
        raise UserError(
            f'model.factory={factory} cannot be called with num_classes, mean and std ({_line(error)}).'
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(f'model.factory={factory} returned a {type(module).__name__}, not a flax.linen.Module.')
    return module


def shows_features(module: nn.Module) -> bool:
    """Whether a module can be asked for its feature maps."""
    return 'features' in inspect.signature(type(module).__call__).parameters


def _line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'.rstrip(': ')
