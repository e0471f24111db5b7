"""The classifiers in torch, with the names of torchvision and of the releases.

They are written from the definitions, independently of the package. Two of them are those of the benchmarks.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.torch_networks import MnistCNN, PreActResNet, conv, nchw, stages

__all__ = ['CLASSES', 'MnistCNN', 'PreActResNet', 'ResNet', 'VGG', 'nchw', 'randomised']

torch.set_num_threads(1)  # the suite runs one process per core

VGG_PLANS = {
    11: '1 M 2 M 4 4 M 8 8 M 8 8 M',
    13: '1 1 M 2 2 M 4 4 M 8 8 M 8 8 M',
    16: '1 1 M 2 2 M 4 4 4 M 8 8 8 M 8 8 8 M',
    19: '1 1 M 2 2 M 4 4 4 4 M 8 8 8 8 M 8 8 8 8 M',
}


class PostActBlock(nn.Module):
    """Conv, BatchNorm, ReLU, two or three times, the last ReLU after the sum."""

    def __init__(self, inner: int, planes: int, stride: int, bottleneck: bool, shortcut: str):
        super().__init__()
        outer = 4 * planes if bottleneck else planes
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        if bottleneck:
            self.conv1, self.conv2 = conv(inner, planes, 1), conv(planes, planes, 3, stride)
            self.conv3, self.bn3 = conv(planes, outer, 1), nn.BatchNorm2d(outer)
        else:
            self.conv1, self.conv2 = conv(inner, planes, 3, stride), conv(planes, planes)
        projection = nn.Sequential(conv(inner, outer, 1, stride), nn.BatchNorm2d(outer))
        self.shortcut_name = shortcut if stride > 1 or inner != outer else None
        if self.shortcut_name:
            setattr(self, shortcut, projection)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, 'conv3'):
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (getattr(self, self.shortcut_name)(x) if self.shortcut_name else x))


class ResNet(nn.Module):
    """torchvision's ResNet, or one with a 3x3 stem without pooling; `kin` names its layers shortcut and linear."""

    def __init__(self, depth=18, width=64, stem='imagenet', num_classes=10, channels=3, kin=False):
        super().__init__()
        large = stem == 'imagenet'
        self.conv1, self.bn1 = conv(channels, width, 7 if large else 3, 2 if large else 1), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        last = stages(self, PostActBlock, depth, width, 'shortcut' if kin else 'downsample')
        self.head_name = 'linear' if kin else 'fc'
        setattr(self, self.head_name, nn.Linear(last, num_classes))

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return getattr(self, self.head_name)(x.mean((2, 3)))


class VGG(nn.Module):
    """torchvision's VGG with BatchNorm."""

    def __init__(self, depth=16, width=64, pool_size=7, hidden=4096, num_classes=10, channels=3):
        super().__init__()
        layers: list[nn.Module] = []
        for step in VGG_PLANS[depth].split():
            if step == 'M':
                layers.append(nn.MaxPool2d(2, 2))
            else:
                outer = width * int(step)
                layers += [conv(channels, outer, bias=True), nn.BatchNorm2d(outer), nn.ReLU()]
                channels = outer
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pool_size)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * pool_size**2, hidden), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


CLASSES = {'preact_resnet': PreActResNet, 'resnet': ResNet, 'vgg_bn': VGG, 'mnist_cnn': MnistCNN}


def randomised(name: str, seed: int = 0, **options) -> nn.Module:
    """Builds a network in evaluation mode without trivial values: no unit scale, no zero bias, no zero counter.

    The weights keep the scale of the maps about the same from layer to layer, so that logits are of the order of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    model = CLASSES[name](**options)
    for key, value in model.state_dict().items():
        if key.endswith('num_batches_tracked'):
            value.fill_(1234)
        elif key.endswith('running_var') or (value.ndim == 1 and key.endswith('weight')):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        else:
            spread = 0.1 if value.ndim == 1 else (1 / value[0].numel()) ** 0.5
            value.copy_(spread * torch.randn(value.shape, generator=generator))
    return model.eval()
