"""Their side: the same steps in torch, (a) as the released code takes them and (b) as fast as we can write them.

    (a) Released   every step of PGD computes the parameters' gradients too, and nobody uses them; NCHW, float32; a
                   loader on the host gathers, scales and sends each batch
    (b) Tuned      the gradient of the images alone; channels last; autocast to bfloat16 where that is asked for; data
                   on the device; torch.compile, with and without CUDA graphs, where it works

Imported only where torch is.
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

# Of Tuned: how torch.compile is asked, where it is.
VARIANTS = {'eager': None, 'compiled': 'default', 'graphs': 'reduce-overhead'}


class Classifier(nn.Module):
    """A network that normalises its images first, as ours do."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer('mean', torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer('std', torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, images):
        return self.network((images - self.mean) / self.std)


def classifier(task: Task) -> Classifier:
    """Returns the task's classifier with its weights."""
    o, classes, channels = task.config.model, task.images.num_classes, task.shape[2]
    network: nn.Module
    if o.name == 'mnist_cnn':
        network = MnistCNN(o.conv_bias, classes, channels, o.dropout)
    else:
        network = PreActResNet(o.depth, o.width, o.final_norm, classes, channels)
    network.load_state_dict({key: torch.tensor(array) for key, array in task.torch_weights().items()})
    return Classifier(network, o.mean, o.std)


class Reference:
    """What both have in common: the order of things. How each thing is done is theirs."""

    name: str

    def __init__(self, task: Task, device: str):
        """Puts the task's classifier on a device, 'cpu' or 'cuda'."""
        self.task, self.device = task, torch.device(device)
        self.model = classifier(task).to(self.device)
        self._order = task.order
        self._optimisers = {'infect': self._sgd(task.config.train), 'aft': self._sgd(task.config.aft)}

    def _sgd(self, options: Any, **further: Any) -> torch.optim.SGD:
        train = self.task.config.train
        momentum, decay = train.momentum, train.weight_decay
        return torch.optim.SGD(self.model.parameters(), options.learning_rate, momentum, weight_decay=decay, **further)

    def send(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns float32 images [B, H, W, C] in [0, 1] and labels [B] on the device, the images as [B, C, H, W]."""
        return nchw(pixels).to(self.device), torch.from_numpy(labels.astype(np.int64)).to(self.device)

    def batches(self, steps: Sequence[int]) -> Any:
        """Yields the images and labels of these steps."""
        raise NotImplementedError

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits in evaluation mode, without a gradient."""
        raise NotImplementedError

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy."""
        raise NotImplementedError

    def perturb(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns adversarial examples."""
        raise NotImplementedError

    def ascend(self, examples: torch.Tensor, gradient: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Returns the examples after a step of PGD."""
        pgd = self.task.pgd
        moved = examples.detach() + pgd.step_size * gradient.sign()
        return images + (moved - images).clamp(-pgd.eps, pgd.eps)

    def descend(self, images: torch.Tensor, labels: torch.Tensor, optimiser: torch.optim.Optimizer) -> torch.Tensor:
        """Takes a step of training, and returns the loss before it."""
        self.model.train()
        loss = self.loss(images, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()  # PGD would find gradients in memory that CUDA graphs write again
        return loss.detach()

    def step(self, training: str, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes a step of 'infect' or 'aft', and returns its loss."""
        if training == 'aft':
            images = self.perturb(images, labels)
        return self.descend(images, labels, self._optimisers[training])

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the logits [B, K] of float32 images [B, H, W, C] in [0, 1], in evaluation mode."""
        images, _ = self.send(pixels, np.zeros(len(pixels)))
        return self.outputs(images).float().cpu().numpy()

    def examples(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns adversarial examples, float32 [B, H, W, C]."""
        return np.moveaxis(self.perturb(*self.send(pixels, labels)).cpu().numpy(), 1, -1)

    def work(self, benchmark: str) -> Work:
        """Returns one of `task.BENCHMARKS`; those without training take the first batch, on the device already."""
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
    """(a): the AFT step as the authors' released code takes it."""

    name = 'released'

    def batches(self, steps: Sequence[int]) -> Any:
        """Yields batches that the host gathers one by one."""
        images = self.task.images
        for step in steps:
            rows = self._order.batch(step)
            yield self.send(images.pixels[rows].astype(np.float32) / 255, images.labels[rows])

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits in evaluation mode, without a gradient."""
        self.model.eval()
        with torch.no_grad():
            return self.model(images)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy."""
        return F.cross_entropy(self.model(images), labels)

    def perturb(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns adversarial examples; `backward` goes through the parameters as well."""
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
    """(b): the best that we can write."""

    def __init__(self, task: Task, device: str, variant: str = 'eager'):
        """As `Reference`; `variant` is one of VARIANTS."""
        super().__init__(task, device)
        self.name = f'tuned, {variant}'
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward: Callable = self.model
        self._objective: Callable = lambda images, labels: F.cross_entropy(self.model(images), labels)
        self._graphs = variant == 'graphs'
        if mode := VARIANTS[variant]:
            self._forward = torch.compile(self._forward, mode=mode, dynamic=False)
            self._objective = torch.compile(self._objective, mode=mode, dynamic=False)
        # [N, H, W, C] in memory is what channels last is.
        self._pixels = torch.from_numpy(task.images.pixels).to(self.device)
        self._labels = torch.from_numpy(task.images.labels.astype(np.int64)).to(self.device)

    def _sgd(self, options: Any, **further: Any) -> torch.optim.SGD:
        return super()._sgd(options, fused=True)

    def send(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Reference.send`, channels last in memory."""
        images, targets = super().send(pixels, labels)
        return images.contiguous(memory_format=torch.channels_last), targets

    def batches(self, steps: Sequence[int]) -> Any:
        """Yields batches that the device gathers; their indices were sent before the first."""
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
        """Returns the logits in evaluation mode, without a gradient."""
        self.model.eval()
        self._begin()
        with torch.no_grad(), self._cast():
            return self._forward(images)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy."""
        self._begin()
        with self._cast():
            return self._objective(images, labels)

    def perturb(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns adversarial examples; nothing but the images wants a gradient."""
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
    """Returns torch's version, and the kind of device that it runs on."""
    return f'torch {torch.__version__}' + (f', CUDA {torch.version.cuda}' if device == 'cuda' else '')


def prepare(threads: int, tf32: bool) -> None:
    """Sets torch up: its threads, TF32 in float32 products, and its choice of convolutions by trial."""
    torch.set_num_threads(threads)
    set_tf32(tf32)
    torch.backends.cudnn.benchmark = True


def set_tf32(on: bool) -> None:
    """Whether float32 matrix products and convolutions may be rounded to TF32 on an NVIDIA GPU."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 products are those of float32 meanwhile."""
    before = torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        set_tf32(before)


def forget_compiled() -> None:
    """Forgets what was compiled: torch refuses to compile the same code for many classifiers in turn."""
    torch.compiler.reset()
