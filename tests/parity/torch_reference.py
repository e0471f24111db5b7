"""The same mathematics in torch, written independently; imported only where torch is.

Arrays come in and go out in NHWC; torch works in NCHW.
"""

from collections.abc import Sequence

import cases
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch_models import PreActResNet, nchw

from aft_jax.interchange import with_usual_names
from aft_jax.interchange.architecture import Architecture


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """Returns the array [B, H, W, C] of a tensor [B, C, H, W]."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def copy_conv(layer: nn.Conv2d, params: dict) -> None:
    """Copies a Flax convolution's kernel [h, w, in, out] (no bias)."""
    layer.weight.data = torch.from_numpy(np.array(params['kernel']).transpose(3, 2, 0, 1).copy())


def copy_norm(layer: nn.BatchNorm2d, params: dict, stats: dict) -> None:
    """Copies a Flax BatchNorm's parameters and running statistics."""
    layer.weight.data, layer.bias.data = torch.from_numpy(params['scale']), torch.from_numpy(params['bias'])
    layer.running_mean, layer.running_var = (
        torch.from_numpy(stats['mean'].copy()),
        torch.from_numpy(stats['var'].copy()),
    )


class EncoderDecoder(nn.Module):
    """The input-aware networks, as a flat list of layers."""

    def __init__(self, in_channels: int, out_channels: int, widths: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []

        def block(inner: int, outer: int, relu: bool = True) -> None:
            layers.extend([nn.Conv2d(inner, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer, momentum=0.05)])
            if relu:
                layers.append(nn.ReLU())

        inner = in_channels
        for width in widths:
            block(inner, width)
            block(width, width)
            layers.append(nn.MaxPool2d(2))
            inner = width
        block(inner, inner)
        for i in range(len(widths)):
            layers.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
            block(inner, inner)
            last = i == len(widths) - 1
            outer = out_channels if last else inner // 2
            block(inner, outer, relu=not last)
            inner = outer
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return torch.tanh(self.layers(x)) / 2 + 0.5

    def norms(self) -> list[nn.BatchNorm2d]:
        return [layer for layer in self.layers if isinstance(layer, nn.BatchNorm2d)]

    def load(self, variables: dict) -> None:
        convs = [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]
        for i, (conv, norm) in enumerate(zip(convs, self.norms(), strict=True)):
            copy_conv(conv, variables['params'][f'Conv_{i}'])
            copy_norm(norm, variables['params'][f'BatchNorm_{i}'], variables['batch_stats'][f'BatchNorm_{i}'])


def values(networks: Sequence[tuple[int, bool]]) -> dict[str, np.ndarray]:
    """Returns, by name, what torch makes of every case; PreActResNet18 of each (width, final_norm)."""
    found: dict[str, np.ndarray] = {}
    for name, (h, w, height, width) in cases.BICUBIC_SIZES.items():
        grid = nchw(cases.uniform(1, (1, h, w, 2), -1, 1))
        found[f'bicubic/{name}'] = nhwc(F.interpolate(grid, (height, width), mode='bicubic', align_corners=True))

    images, field = nchw(cases.uniform(2, (3, 9, 12, 2))), torch.from_numpy(cases.uniform(3, (3, 7, 5, 2), -1.3, 1.3))
    found['grid_sample'] = nhwc(F.grid_sample(images, field, 'bilinear', 'zeros', align_corners=True))

    images = nchw(cases.uniform(4, (2, 7, 5, 3)))
    found['bilinear'] = nhwc(F.interpolate(images, scale_factor=2, mode='bilinear', align_corners=False))

    for name, shape in cases.WANET_SHAPES.items():
        found[f'wanet/{name}'], found[f'wanet_noise/{name}'] = _wanet(shape)
    for name, shape in cases.IMAGE_SHAPES.items():
        found |= {f'input_aware/{name}/{key}': value for key, value in _input_aware(shape).items()}
    for width, final_norm in networks:
        logits, gradient = _preact_resnet(width, final_norm)
        found[f'preact_resnet/{width}/{final_norm}/logits'] = logits
        found[f'preact_resnet/{width}/{final_norm}/gradient'] = gradient
    return found | _batch_norm() | _diversity()


def _wanet(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The trigger and the noise mode, with square images of side H."""
    side = shape[0]
    images, grid = nchw(cases.uniform(5, (2, *shape))), nchw(cases.uniform(6, (1, 4, 4, 2), -2, 2))
    flow = F.interpolate(grid, side, mode='bicubic', align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing='ij')
    field = torch.clamp(torch.stack([x, y], 2)[None] + cases.WANET_STRENGTH * flow / side, -1, 1).repeat(2, 1, 1, 1)
    noisy = torch.clamp(field + torch.from_numpy(cases.wanet_noise(shape)[1].copy()) / side, -1, 1)
    return nhwc(F.grid_sample(images, field, align_corners=True)), nhwc(
        F.grid_sample(images, noisy, align_corners=True)
    )


def _input_aware(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Pattern, mask, triggered image; and the generator in training mode with its new statistics."""
    networks, variables = cases.input_aware(shape)
    generator = EncoderDecoder(shape[2], shape[2], networks.generator.widths)
    mask = EncoderDecoder(shape[2], 1, networks.mask.widths)
    generator.load(variables['generator'])
    mask.load(variables['mask'])
    generator.eval()
    mask.eval()
    images = nchw(cases.uniform(7, (2, *shape)))
    with torch.no_grad():
        pattern, maps = generator(images), mask(images)
        m = torch.tanh(20 * maps - 10) / 2 + 0.5
        generator.train()
        training = nhwc(generator(nchw(cases.uniform(9, (8, *shape)))))
        return {
            'pattern': nhwc(pattern),
            'map': nhwc(maps),
            'mask': nhwc(m),
            'triggered': nhwc(images + (pattern - images) * m),
            'training': training[:2],
            'means': torch.cat([norm.running_mean for norm in generator.norms()]).numpy(),
        }


def _preact_resnet(width: int, final_norm: bool) -> tuple[np.ndarray, np.ndarray]:
    case = cases.classifier(width, final_norm)
    options = {'depth': 18, 'width': width, 'final_norm': final_norm}
    state = with_usual_names(Architecture('preact_resnet', options, 10, 3, 0), case.variables).source.tensors
    model = PreActResNet(18, width, final_norm)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    model.eval()
    images = nchw(case.images).requires_grad_()
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (case.module.mean, case.module.std))
    logits = model((images - mean) / std)
    loss = F.cross_entropy(logits, torch.from_numpy(case.labels.astype(np.int64)))
    return logits.detach().numpy(), nhwc(torch.autograd.grad(loss, images)[0])


def _batch_norm() -> dict[str, np.ndarray]:
    layer = nn.BatchNorm2d(3)
    images = nchw(cases.uniform(8, (4, 5, 6, 3), -2, 3))
    output = nhwc(layer(images))
    return {
        'batch_norm/output': output,
        'batch_norm/mean': layer.running_mean.numpy(),
        'batch_norm/var': layer.running_var.numpy(),
    }


def _diversity() -> dict[str, np.ndarray]:
    images, others = (nchw(cases.uniform(seed, (4, 6, 6, 3))) for seed in (31, 32))
    masks, other_masks = (nchw(cases.uniform(seed, (4, 6, 6, 1))).requires_grad_() for seed in (33, 34))

    def distance(a, b):
        return (a - b).square().mean((1, 2, 3)).sqrt()

    value = (distance(images, others) / (distance(masks, other_masks) + 1e-7)).mean()
    gradient = torch.autograd.grad(value, masks)[0]
    return {'diversity/value': value.detach().numpy(), 'diversity/gradient': nhwc(gradient)}
