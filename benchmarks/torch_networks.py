"""PreActResNet and the MNIST CNN in torch, under the names of the releases; imported only if torch is installed.

They are written from the definitions, independently of the package. The benchmarks and the tests compare with them.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def nchw(array: np.ndarray) -> torch.Tensor:
    """Converts an array [B, H, W, C] to a tensor [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def conv(inner: int, outer: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=bias)


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, conv, two or three times; the shortcut's projection takes the first activation."""

    def __init__(self, inner: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        outer = 4 * planes if bottleneck else planes
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(planes)
        if bottleneck:
            self.bn3 = nn.BatchNorm2d(planes)
            self.conv1, self.conv2, self.conv3 = (
                conv(inner, planes, 1),
                conv(planes, planes, 3, stride),
                conv(planes, outer, 1),
            )
        else:
            self.conv1, self.conv2 = conv(inner, planes, 3, stride), conv(planes, planes)
        self.shortcut = nn.Sequential(conv(inner, outer, 1, stride)) if stride > 1 or inner != outer else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = self.shortcut(y) if self.shortcut else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        if hasattr(self, 'conv3'):
            y = self.conv3(F.relu(self.bn3(y)))
        return y + shortcut


def stages(module: nn.Module, block, depth: int, width: int, *names: str) -> int:
    """Adds layer1 to layer4 to the module; returns the number of channels of the last."""
    inner = width
    for stage, count in enumerate(BLOCKS[depth]):
        blocks = []
        for i in range(count):
            planes = width * 2**stage
            blocks.append(block(inner, planes, 2 if stage and i == 0 else 1, depth == 50, *names))
            inner = planes * (4 if depth == 50 else 1)
        setattr(module, f'layer{stage + 1}', nn.Sequential(*blocks))
    return inner


class PreActResNet(nn.Module):
    """The network of the AFT authors and of BackdoorBench, with a last BatchNorm and ReLU if `final_norm`."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, depth=18, width=64, final_norm=False, num_classes=10, channels=3):
        super().__init__()
        self.conv1 = conv(channels, width)
        last = stages(self, PreActBlock, depth, width)
        self.bn: nn.Module | None = nn.BatchNorm2d(last) if final_norm else None
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            x = F.relu(self.bn(x))
        return self.linear(x.mean((2, 3)))


class MnistBlock(nn.Module):
    """BatchNorm, ReLU, conv of stride 2."""

    def __init__(self, inner: int, outer: int, bias: bool):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), conv(inner, outer, 3, 2, bias)

    def forward(self, x):
        return self.conv1(F.relu(self.bn1(x)))


class MnistCNN(nn.Module):
    """The network of the WaNet release for MNIST, or ours, whose inner convolutions have a bias (`conv_bias`)."""

    def __init__(self, conv_bias=False, num_classes=10, channels=1, dropout=0.3):
        super().__init__()
        self.conv1 = conv(channels, 32, 3, 2, bias=True)
        self.layer2, self.layer3 = MnistBlock(32, 64, conv_bias), MnistBlock(64, 64, conv_bias)
        self.linear6, self.linear9 = nn.Linear(64 * 4 * 4, 512), nn.Linear(512, num_classes)
        self.dropout = dropout

    def forward(self, x):
        x = self.layer3(self.layer2(F.relu(self.conv1(x))))
        return self.linear9(F.dropout(F.relu(self.linear6(x.flatten(1))), self.dropout, self.training))
