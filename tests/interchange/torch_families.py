"""One small network of each family of torchvision, by its own classes; and small networks with unusual operators."""

import torch
from torch import nn
from torch.nn import functional as F

from aft_jax.interchange import torch_model

CLASSES = 5


def resnet(models):
    """Builds a residual network with basic blocks."""
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 32


def densenet(models):
    """Builds a network that concatenates feature maps, with average pooling."""
    return models.DenseNet(4, (1, 1, 1, 1), 8, num_classes=CLASSES), 32


def mobilenet(models):
    """Builds a network with depthwise convolutions, squeeze-and-excitation and hard activations."""
    setting = models.mobilenetv3.InvertedResidualConfig
    blocks = [setting(16, 3, 16, 16, True, 'RE', 2, 1, 1.0), setting(16, 5, 32, 24, True, 'HS', 1, 1, 1.0)]
    return models.MobileNetV3(blocks, 32, num_classes=CLASSES), 32


def shufflenet(models):
    """Builds a network that splits and shuffles channels."""
    return models.ShuffleNetV2([1, 2, 1], [8, 16, 16, 16, 32], num_classes=CLASSES), 32


def squeezenet(models):
    """Builds a network whose head is a convolution, with max pooling in ceil mode."""
    return models.SqueezeNet('1_1', num_classes=CLASSES), 33


def convnext(models):
    """Builds a network with LayerNorm in both layouts, GELU, layer scale and stochastic depth."""
    setting = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(setting, stochastic_depth_prob=0.5, layer_scale=0.5, num_classes=CLASSES), 16


def vit(models):
    """Builds a transformer with a class token."""
    return models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=CLASSES), 16


def swin(models):
    """Builds a transformer with shifted windows, whose mask is written in place."""
    network = models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.2, num_classes=CLASSES)
    return network, 16


FAMILIES = {f.__name__: f for f in (resnet, densenet, mobilenet, shufflenet, squeezenet, convnext, vit, swin)}
# Family -> shape of its last feature maps, without the batch.
MAPS = {
    'resnet': (1, 1, 512),
    'densenet': (1, 1, 8),
    'mobilenet': (8, 8, 144),
    'shufflenet': (1, 1, 32),
    'squeezenet': (2, 2, 512),
    'convnext': (2, 2, 16),
    'vit': (5, 1, 16),
    'swin': (4, 4, 16),
}


def build(family: str) -> tuple[nn.Module, int]:
    """Builds the network of a family; returns it with the side of its images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[family](torch_model.import_torchvision().models)


class Unusual(nn.Module):
    """A network whose weights are computed, with a shared BatchNorm, in-place operators and many small operators."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding='same', dilation=2)
        self.norm = nn.BatchNorm2d(8, momentum=None)
        self.plain_norm = nn.BatchNorm2d(8, affine=False)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.group = nn.GroupNorm(2, 8)
        self.slope = nn.PReLU(8)
        self.register_buffer('scale', torch.tensor(1.5))
        self.head = nn.Linear(8 * 9, CLASSES)

    def forward(self, x):
        x = self.norm(self.stem(x))
        y = self.plain_norm(x).clamp(-2, 2)
        y[:, :2] = y[:, :2] * 2
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        y = F.conv2d(self.slope(y), weight / (weight.std((1, 2, 3), keepdim=True) + 0.1), padding=1)
        y = self.group(y).softmax(1) * self.scale + x.sigmoid()
        first, second = y.chunk(2, 1)
        y = torch.cat([second - first.mean(1, keepdim=True), F.elu(first)], 1)
        y = F.avg_pool2d(F.interpolate(y, scale_factor=2.0, mode='bilinear'), 3, 2, 1, count_include_pad=False)
        y = F.adaptive_max_pool2d(F.pad(y, (1, 0, 0, 2), value=0.5), 3)
        return self.head(y.transpose(2, 3).flatten(1))
