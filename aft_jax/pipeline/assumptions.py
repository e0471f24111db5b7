"""Lists what a file of weights does not tell about its network, so that the user can check it."""

import ml_collections

from aft_jax.data.dataset import Dataset

STEMS = {
    'cifar': 'a 3x3 convolution, stride 1, no pooling',
    'imagenet': 'a 7x7 convolution, stride 2, and a 3x3 max pooling, stride 2',
}
HEADS = {
    'resnet': 'the mean of the last maps, one dense layer',
    'preact_resnet': 'the mean of the last maps, one dense layer',
    'vgg_bn': 'averages of the last maps, three dense layers with dropout',
    'mnist_cnn': 'all values of the last maps, two dense layers with dropout',
}


def assumptions(config: ml_collections.ConfigDict, dataset: Dataset) -> list[str]:
    """Describes the network that the weights of a file are used in, a property a line.

    Args:
        config: Resolved config with the network of the file.
        dataset: Images that the network is fed with.
    """
    model = config.model
    height, width, channels = dataset.image_shape
    depth = '' if model.name == 'mnist_cnn' else f', {model.depth} layers'
    properties = {
        'network': f'{model.name}{depth}',
        'activations': 'ReLU everywhere',
        'first layer': STEMS[model.stem] if model.name == 'resnet' else 'a 3x3 convolution',
        'head': HEADS[model.name],
        'pixels': f'(x - {_listed(model.mean)}) / {_listed(model.std)}, of x in [0, 1]',
        'channels': 'red, green, blue' if channels == 3 else str(channels),
        'image size': f'{height}x{width}',
        'classes': ', '.join(dataset.class_names[:3]) + (', ...' if dataset.num_classes > 3 else ''),
    }
    wide = max(map(len, properties))
    return [
        f'{config.init_from} does not tell all about its network. This is assumed:',
        *(f'  {name:{wide}}  {value}' for name, value in properties.items()),
        'To be sure, give some images and their logits as init_logits; if it is another network, give model.factory.',
    ]


def _listed(values: tuple[float, ...]) -> str:
    return f'{values[0]:g}' if len(values) == 1 else f'({", ".join(f"{value:g}" for value in values)})'
