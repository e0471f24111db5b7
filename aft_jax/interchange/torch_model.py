"""Builds a PyTorch network by its name, and exports it as a program (`torch.export`).

This is the only place that runs code of the user's model: the function that `config.model.torch` names, and the
`forward` of the network that it returns.
"""

import ast
import importlib
import inspect
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aft_jax.errors import UserError
from aft_jax.interchange.program_file import ProgramFile, decode

try:
    import torch
except ImportError as error:
    raise UserError('model.torch needs PyTorch; pip install torch.') from error

LIBRARIES = ('torchvision', 'timm')


class Name(NamedTuple):
    """The name of a network: 'place:function' or 'place:function(option=value, ...)'.

    Attributes:
        place: Module to import, 'torchvision' or 'timm'.
        function: Function in it, or name of the network in the library.
        options: Keyword arguments.
    """

    place: str
    function: str
    options: dict[str, Any]


def parse_name(text: str) -> Name:
    """Parses the name of a network. The values of options are literals of Python.

    Raises:
        UserError: If the text has another form.
    """
    place, _, call = text.partition(':')
    try:
        node = ast.parse(call.strip(), mode='eval').body
        match node:
            case ast.Name(id=function):
                options = {}
            case ast.Call(func=ast.Name(id=function), args=[], keywords=keywords) if all(k.arg for k in keywords):
                options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
            case _:
                raise ValueError
        if not place:
            raise ValueError
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"model.torch={text!r} should be 'package.module:function', 'torchvision:NAME' or 'timm:NAME', with "
            "options if needed: 'torchvision:vit_b_16(image_size=32)'."
        ) from error
    return Name(place, function, options)


def build(text: str, num_classes: int, channels: int, seed: int) -> torch.nn.Module:
    """Builds the network of a name, with the initial weights that torch draws from the seed.

    Args:
        text: Name, see `Name`. A function of the user gets `num_classes` if it has a parameter of this name.
        num_classes: Number of classes K.
        channels: Channels of the images.
        seed: Seed.

    Raises:
        UserError: If there is no such network, or it cannot be built.
    """
    name = parse_name(text)
    if name.place == 'torchvision':
        function = _from_torchvision(text, name)
        arguments = {'num_classes': num_classes}
    elif name.place == 'timm':
        function = _from_timm(text, name)
        arguments = {'num_classes': num_classes, 'in_chans': channels}
    else:
        function = _from_user(text, name)
        arguments = {'num_classes': num_classes} if 'num_classes' in _parameters(function) else {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = function(**(arguments | name.options))
    except Exception as error:  # The function may raise anything.
        raise UserError(f'model.torch={text} cannot be built ({_line(error)}).') from error
    if not isinstance(model, torch.nn.Module):
        raise UserError(f'model.torch={text} returned a {type(model).__name__}, not a torch.nn.Module.')
    return model


def export(model: torch.nn.Module, image_shape: tuple[int, int, int], source: str) -> ProgramFile:
    """Exports a network for batches of any length.

    Args:
        model: Network, which is set to evaluation mode.
        image_shape: Shape (H, W, C) of the images.
        source: Name of the network for error messages.

    Raises:
        UserError: If torch cannot export the network.
    """
    height, width, channels = image_shape
    model = _with_switchable_depth(model.float().eval())
    images = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim('batch', min=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
    except Exception as error:  # torch raises errors of many kinds about the user's network.
        raise UserError(
            f'{source} cannot be exported by torch.export for images of {height}x{width}x{channels} ({_line(error)}).'
        ) from error
    return decode(buffer.getvalue(), Path(source))


def _with_switchable_depth(model: torch.nn.Module) -> torch.nn.Module:
    """Makes stochastic depth an operator of the graph, which evaluation mode would leave out."""

    def make_forward(module: torch.nn.Module, rate: float) -> Callable:
        # One mask per image: dropout of whole "channels" of [B, 1, ...].
        return lambda x: torch.feature_dropout(x.unsqueeze(1), rate, module.training).squeeze(1)

    for module in model.modules():
        kind = type(module)
        if kind.__name__ == 'StochasticDepth' and kind.__module__.startswith('torchvision.') and module.mode == 'row':
            rate = float(module.p)  # type: ignore[arg-type]
        elif kind.__name__ == 'DropPath' and kind.__module__.startswith('timm.') and module.scale_by_keep:
            rate = float(module.drop_prob or 0.0)  # type: ignore[arg-type]
        else:
            continue
        if rate:
            module.forward = make_forward(module, rate)  # type: ignore[method-assign]
    return model


def _from_torchvision(text: str, name: Name) -> Callable:
    models = import_torchvision().models
    if name.function not in models.list_models(models):
        raise UserError(f'model.torch={text}: torchvision has no classifier of this name.')
    return models.get_model_builder(name.function)


def import_torchvision() -> Any:
    """Imports torchvision, also where its compiled operators do not fit torch: its classifiers do not need them.

    Raises:
        UserError: If it is not installed.
    """
    register_fake = torch.library.register_fake

    def tolerant(*arguments: Any, **options: Any) -> Callable:
        register = register_fake(*arguments, **options)

        def decorate(function: Callable) -> Callable:
            try:
                return register(function)
            except RuntimeError:  # 'operator torchvision::nms does not exist'
                return function

        return decorate

    torch.library.register_fake = tolerant
    try:
        return importlib.import_module('torchvision')
    except ImportError as error:
        raise UserError(f"model.torch needs torchvision ({error}); pip install 'aft_jax[torchvision]'.") from error
    finally:
        torch.library.register_fake = register_fake


def _from_timm(text: str, name: Name) -> Callable:
    try:
        timm = importlib.import_module('timm')
    except RuntimeError:  # timm imports torchvision
        import_torchvision()
        timm = importlib.import_module('timm')
    except ImportError as error:
        raise UserError(f"model.torch={text} needs timm ({error}); pip install 'aft_jax[timm]'.") from error
    if not timm.is_model(name.function):
        raise UserError(f'model.torch={text}: timm has no model of this name.')
    return lambda **options: timm.create_model(name.function, **options)


def _from_user(text: str, name: Name) -> Callable:
    try:
        function = getattr(importlib.import_module(name.place), name.function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f'model.torch={text} cannot be imported ({error}); name a function that `import {name.place}` finds from '
            'the current directory.'
        ) from error
    except Exception as error:  # The user's file may raise anything.
        raise UserError(f'model.torch={text}: its file cannot be run ({_line(error)}).') from error
    if not callable(function):
        raise UserError(f'model.torch={text} is a {type(function).__name__}; name a function or a class.')
    return function


def _parameters(function: Callable) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return set()


def _line(error: Exception) -> str:
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text[:300]}'.rstrip(': ')
