"""The baselines: the same steps in torch, (a) as in the released code and (b) as fast as we can write them.

    (a) Released   every step of PGD also computes gradients of the parameters, which are not used; NCHW, float32; a
                   loader on the host gathers, scales and sends each batch
    (b) Tuned      gradients of the images only; channels last; autocast to bfloat16 if requested; data on the device;
                   torch.compile, with and without CUDA graphs, where it works

Imported only if torch is installed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.task import TRAININGS, Task, first_batch
from benchmarks.timing import Work, resident_rise
from benchmarks.torch_networks import MnistCNN, PreActResNet, nchw

# Variants of Tuned: the mode of torch.compile, or None without it.
VARIANTS = {'eager': None, 'compiled': 'default', 'graphs': 'reduce-overhead'}


class Classifier(nn.Module):
    """A network that normalises its images first, as in the package."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer('mean', torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer('std', torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, images):
        return self.network((images - self.mean) / self.std)


def classifier(task: Task) -> Classifier:
    """Builds the task's classifier with its weights."""
    o, classes, channels = task.config.model, task.images.num_classes, task.shape[2]
    network: nn.Module
    if o.name == 'mnist_cnn':
        network = MnistCNN(o.conv_bias, classes, channels, o.dropout)
    else:
        network = PreActResNet(o.depth, o.width, o.final_norm, classes, channels)
    network.load_state_dict({key: torch.tensor(array) for key, array in task.torch_weights().items()})
    return Classifier(network, o.mean, o.std)


class Reference:
    """The common part of both baselines: the order of operations. Subclasses implement the operations."""

    name: str

    def __init__(self, task: Task, device: str):
        """Moves the task's classifier to a device, 'cpu' or 'cuda'."""
        self.task, self.device = task, torch.device(device)
        self.model = classifier(task).to(self.device)
        self._order = task.order
        self._optimisers = {'infect': self._sgd(task.config.train), 'aft': self._sgd(task.config.aft_released)}

    def _sgd(self, options: Any, **further: Any) -> torch.optim.SGD:
        train = self.task.config.train
        momentum, decay = train.momentum, train.weight_decay
        return torch.optim.SGD(self.model.parameters(), options.learning_rate, momentum, weight_decay=decay, **further)

    def send(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends float32 images [B, H, W, C] in [0, 1], as [B, C, H, W], and labels [B] to the device."""
        return nchw(pixels).to(self.device), torch.from_numpy(labels.astype(np.int64)).to(self.device)

    def batches(self, steps: Sequence[int]) -> Any:
        """Yields the images and labels of these steps."""
        raise NotImplementedError

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the logits in evaluation mode, without a gradient."""
        raise NotImplementedError

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the mean cross-entropy."""
        raise NotImplementedError

    def perturb(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes adversarial examples."""
        raise NotImplementedError

    def ascend(self, examples: torch.Tensor, gradient: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Takes a step of PGD on the examples."""
        pgd = self.task.pgd
        moved = examples.detach() + pgd.step_size * gradient.sign()
        return images + (moved - images).clamp(-pgd.eps, pgd.eps)

    def descend(self, images: torch.Tensor, labels: torch.Tensor, optimiser: torch.optim.Optimizer) -> torch.Tensor:
        """Takes a training step; returns the loss before it."""
        self.model.train()
        loss = self.loss(images, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()  # CUDA graphs reuse the memory of these gradients, which PGD must not see
        return loss.detach()

    def step(self, training: str, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes a step of 'infect' or 'aft'; returns its loss."""
        if training == 'aft':
            images = self.perturb(images, labels)
        return self.descend(images, labels, self._optimisers[training])

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Computes the logits [B, K] of float32 images [B, H, W, C] in [0, 1], in evaluation mode."""
        images, _ = self.send(pixels, np.zeros(len(pixels)))
        return self.outputs(images).float().cpu().numpy()

    def examples(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Computes adversarial examples, float32 [B, H, W, C]."""
        return np.moveaxis(self.perturb(*self.send(pixels, labels)).cpu().numpy(), 1, -1)

    def work(self, benchmark: str) -> Work:
        """Builds the work of one of `task.BENCHMARKS`. Without training it uses one batch that is on the device."""
        images, labels = self.send(*first_batch(self.task))
        training, epoch = TRAININGS.get(benchmark, ('', False))
        length = self.task.steps

        def train(steps: int) -> None:
            total = torch.zeros((), device=self.device)
            for batch in self.batches([step % length for step in range(steps)]):
                total += self.step(training, *batch)
            total.item()

        def run(times: int) -> None:
            if training:
                train(times * length if epoch else times)
            else:
                for _ in range(times):
                    self.perturb(images, labels) if benchmark == 'pgd7' else self.outputs(images)
            self.wait()

        return Work(run, lambda: self._peak(run))

    def wait(self) -> None:
        """Waits for the device."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def _peak(self, run: Callable[[int], None]) -> float:
        if self.device.type == 'cpu':
            return resident_rise(run)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(1)
        return torch.cuda.max_memory_allocated() - before


class Released(Reference):
    """Baseline (a): the AFT step as in the authors' released code."""

    name = 'released'

    def batches(self, steps: Sequence[int]) -> Any:
        """Yields batches that the host gathers one at a time."""
        images = self.task.images
        for step in steps:
            rows = self._order.batch(step)
            yield self.send(images.pixels[rows].astype(np.float32) / 255, images.labels[rows])

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the logits in evaluation mode, without a gradient."""
        self.model.eval()
        with torch.no_grad():
            return self.model(images)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the mean cross-entropy."""
        return F.cross_entropy(self.model(images), labels)

    def perturb(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes adversarial examples; `backward` also computes gradients of the parameters."""
        self.model.eval()
        examples = images.detach()
        for _ in range(self.task.pgd.steps):
            examples = examples.detach().requires_grad_()
            loss = self.loss(examples, labels)
            self.model.zero_grad()
            loss.backward()
            assert examples.grad is not None
            examples = self.ascend(examples, examples.grad, images)
        return examples.detach()


class Tuned(Reference):
    """Baseline (b): the fastest version that we can write."""

    def __init__(self, task: Task, device: str, variant: str = 'eager'):
        """Builds the baseline as in `Reference`; `variant` is one of VARIANTS."""
        super().__init__(task, device)
        self.name = f'tuned, {variant}'
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward: Callable = self.model
        self._objective: Callable = lambda images, labels: F.cross_entropy(self.model(images), labels)
        self._graphs = variant == 'graphs'
        if mode := VARIANTS[variant]:
            self._forward = torch.compile(self._forward, mode=mode, dynamic=False)
            self._objective = torch.compile(self._objective, mode=mode, dynamic=False)
        # The memory format channels last is [N, H, W, C].
        self._pixels = torch.from_numpy(task.images.pixels).to(self.device)
        self._labels = torch.from_numpy(task.images.labels.astype(np.int64)).to(self.device)

    def _sgd(self, options: Any, **further: Any) -> torch.optim.SGD:
        return super()._sgd(options, fused=True)

    def send(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends a batch as in `Reference.send`, channels last in memory."""
        images, targets = super().send(pixels, labels)
        return images.contiguous(memory_format=torch.channels_last), targets

    def batches(self, steps: Sequence[int]) -> Any:
        """Yields batches that the device gathers; all indices are sent before the first batch."""
        rows = np.stack([self._order.batch(step) for step in steps]).astype(np.int64)
        for chosen in torch.from_numpy(rows).to(self.device):
            yield self._pixels[chosen].permute(0, 3, 1, 2).float() / 255, self._labels[chosen]

    def _cast(self) -> Any:
        if self.task.config.dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.task.config.dtype))

    def _begin(self) -> None:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the last call may be overwritten

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the logits in evaluation mode, without a gradient."""
        self.model.eval()
        self._begin()
        with torch.no_grad(), self._cast():
            return self._forward(images)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the mean cross-entropy."""
        self._begin()
        with self._cast():
            return self._objective(images, labels)

    def perturb(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes adversarial examples, with gradients of the images only."""
        self.model.eval()
        self.model.requires_grad_(False)
        examples = images
        for _ in range(self.task.pgd.steps):
            examples = examples.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(examples, labels), examples)
            examples = self.ascend(examples, gradient, images)
        self.model.requires_grad_(True)
        return examples.detach()


def version(device: str) -> str:
    """Formats torch's version, with that of CUDA on a GPU."""
    return f'torch {torch.__version__}' + (f', CUDA {torch.version.cuda}' if device == 'cuda' else '')


def prepare(threads: int, tf32: bool) -> None:
    """Configures torch: its threads, TF32 in float32 products, and the choice of convolutions by trial."""
    torch.set_num_threads(threads)
    set_tf32(tf32)
    torch.backends.cudnn.benchmark = True


def set_tf32(on: bool) -> None:
    """Allows or forbids rounding of float32 products and convolutions to TF32 on an NVIDIA GPU."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Computes float32 products in full float32 inside the context."""
    before = torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        set_tf32(before)


def forget_compiled() -> None:
    """Forgets compiled code: torch refuses to compile the same code for many classifiers in turn."""
    torch.compiler.reset()
