"""The names of our networks' tensors in PyTorch files and in Flax variables.

The names are those of torchvision (`resnet`, `vgg_bn`), of the authors' release and of BackdoorBench (`preact_resnet`),
and of the WaNet paper's release (`mnist_cnn`). Many residual networks for small images name their shortcut `shortcut`
and their last layer `linear`; these names are known too. The name `bn` for the BatchNorm before the pooling of a
`preact_resnet` is an assumption, because no release has this layer.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from aft_jax.models.preact_resnet import BLOCKS, BOTTLENECK_DEPTHS
from aft_jax.models.vgg_bn import CONVOLUTIONS

# A BatchNorm's counter of batches. Flax has none, so its value in the file is kept.
COUNTER = 'num_batches_tracked'
# Tensor of a torch layer -> (collection, name) in the Flax variables.
CONVOLUTION = {'weight': ('params', 'kernel'), 'bias': ('params', 'bias')}
NORM = {
    'weight': ('params', 'scale'),
    'bias': ('params', 'bias'),
    'running_mean': ('batch_stats', 'mean'),
    'running_var': ('batch_stats', 'var'),
}
DENSE = CONVOLUTION


class Layer(NamedTuple):
    """One layer: its name in torch, its name in Flax, and its tensors."""

    torch_name: str
    flax_name: str
    tensors: dict[str, tuple[str, str]]


class Naming(NamedTuple):
    """The names of one network.

    Attributes:
        name: Value of `config.model.name`.
        options: Fields of `config.model` that the names determine.
        paths: Key in torch -> Flax path, such as 'conv1.weight' -> 'params/stem/kernel'; no counters.
        stem: Key of the first convolution's weight.
        head: Key of the last layer's weight.
        flat: Keys of the dense layer that reads flattened feature maps and of the convolution before it, or ().
    """

    name: str
    options: dict[str, Any]
    paths: dict[str, str]
    stem: str
    head: str
    flat: tuple[str, ...] = ()

    def describes(self, name: str, options: Mapping[str, Any]) -> bool:
        """Returns whether these are the names of the network with these fields of `config.model`."""
        return self.name == name and self.options.items() <= options.items()


@cache
def namings() -> tuple[Naming, ...]:
    """Lists all networks that can be recognised by their names; the usual names of a network come first."""
    known = []
    for depth in BLOCKS:
        for final_norm in (False, True):
            paths = _paths(_preact_resnet(depth, final_norm))
            options = {'depth': depth, 'final_norm': final_norm}
            known.append(Naming('preact_resnet', options, paths, 'conv1.weight', 'linear.weight'))
        for shortcut, head in (('downsample', 'fc'), ('shortcut', 'linear')):
            paths = _paths(_resnet(depth, shortcut, head))
            known.append(Naming('resnet', {'depth': depth}, paths, 'conv1.weight', f'{head}.weight'))
    for depth in CONVOLUTIONS:
        layers = list(_vgg_bn(depth))
        flat = ('classifier.0.weight', f'{layers[-5].torch_name}.weight')
        known.append(
            Naming('vgg_bn', {'depth': depth}, _paths(layers), 'features.0.weight', 'classifier.6.weight', flat)
        )
    for conv_bias in (False, True):
        paths = _paths(_mnist_cnn(conv_bias))
        flat = ('linear6.weight', 'layer3.conv1.weight')
        known.append(Naming('mnist_cnn', {'conv_bias': conv_bias}, paths, 'conv1.weight', 'linear9.weight', flat))
    return tuple(known)


def _paths(layers) -> dict[str, str]:
    paths = {}
    for layer in layers:
        for tensor, (collection, leaf) in layer.tensors.items():
            paths[f'{layer.torch_name}.{tensor}'] = f'{collection}/{layer.flax_name}/{leaf}'
    return paths


def _convolution(torch_name: str, flax_name: str, bias: bool) -> Layer:
    return Layer(
        torch_name, flax_name, {name: CONVOLUTION[name] for name in (('weight', 'bias') if bias else ('weight',))}
    )


def _blocks(depth: int) -> Iterator[tuple[str, str, bool]]:
    """Yields the name of each block in torch and in Flax, and whether its shortcut is a convolution."""
    for stage, count in enumerate(BLOCKS[depth], start=1):
        for block in range(count):
            projected = block == 0 and (stage > 1 or depth in BOTTLENECK_DEPTHS)
            yield f'layer{stage}.{block}', f'stage{stage}_block{block + 1}', projected


def _preact_resnet(depth: int, final_norm: bool) -> Iterator[Layer]:
    yield _convolution('conv1', 'stem', False)
    for torch_name, flax_name, projected in _blocks(depth):
        for i in range(3 if depth in BOTTLENECK_DEPTHS else 2):
            yield Layer(f'{torch_name}.bn{i + 1}', f'{flax_name}/BatchNorm_{i}', NORM)
            yield _convolution(f'{torch_name}.conv{i + 1}', f'{flax_name}/Conv_{i}', False)
        if projected:
            yield _convolution(f'{torch_name}.shortcut.0', f'{flax_name}/shortcut', False)
    if final_norm:
        yield Layer('bn', 'final_norm_layer', NORM)
    yield Layer('linear', 'head', DENSE)


def _resnet(depth: int, shortcut: str, head: str) -> Iterator[Layer]:
    yield _convolution('conv1', 'stem', False)
    yield Layer('bn1', 'stem_norm', NORM)
    for torch_name, flax_name, projected in _blocks(depth):
        for i in range(3 if depth in BOTTLENECK_DEPTHS else 2):
            yield _convolution(f'{torch_name}.conv{i + 1}', f'{flax_name}/Conv_{i}', False)
            yield Layer(f'{torch_name}.bn{i + 1}', f'{flax_name}/BatchNorm_{i}', NORM)
        if projected:
            yield _convolution(f'{torch_name}.{shortcut}.0', f'{flax_name}/shortcut', False)
            yield Layer(f'{torch_name}.{shortcut}.1', f'{flax_name}/shortcut_norm', NORM)
    yield Layer(head, 'head', DENSE)


def _vgg_bn(depth: int) -> Iterator[Layer]:
    index = 0
    for stage, count in enumerate(CONVOLUTIONS[depth], start=1):
        for i in range(1, count + 1):
            yield _convolution(f'features.{index}', f'stage{stage}_conv{i}', True)
            yield Layer(f'features.{index + 1}', f'stage{stage}_norm{i}', NORM)
            index += 3  # with the ReLU
        index += 1  # the max pool
    # Between them stand ReLU and dropout.
    for position, flax_name in ((0, 'dense1'), (3, 'dense2'), (6, 'head')):
        yield Layer(f'classifier.{position}', flax_name, DENSE)


def _mnist_cnn(conv_bias: bool) -> Iterator[Layer]:
    yield _convolution('conv1', 'Conv_0', True)
    for i, torch_name in ((0, 'layer2'), (1, 'layer3')):
        yield Layer(f'{torch_name}.bn1', f'BatchNorm_{i}', NORM)
        yield _convolution(f'{torch_name}.conv1', f'Conv_{i + 1}', conv_bias)
    yield Layer('linear6', 'Dense_0', DENSE)
    yield Layer('linear9', 'Dense_1', DENSE)
