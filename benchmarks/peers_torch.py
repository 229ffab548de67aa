"""ResNet-18 and ResNet-20-FRN in PyTorch, and steps of SGD and SAM as PyTorch's users write them. See peers.py.

The layers and numbers of weights are those of models.py. Images are channels_last, which is faster on CPUs.
"""

import torch
from torch import nn
from torch.nn import functional


class FilterResponseNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        shape = 1, channels, 1, 1
        self.scale, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.threshold = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + 1e-6)
        return torch.maximum(self.scale * x + self.bias, self.threshold)


def conv_norm(inputs, outputs, size=3, stride=1):
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def conv_frn(inputs, outputs, size=3, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, padding=size // 2), FilterResponseNorm(outputs))


class Block(nn.Module):
    """Two convolutions beside a shortcut. `conv` makes a convolution with its normalisation; `relu` follows it."""

    def __init__(self, inputs, outputs, stride, conv, relu):
        super().__init__()
        self.first, self.second, self.relu = conv(inputs, outputs, 3, stride), conv(outputs, outputs), relu
        changes = stride > 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, 1, stride) if changes else nn.Identity()

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))


def resnet(widths, blocks, conv, relu):
    """Returns a residual network for 32×32 images and ten classes. All stages except the first halve the size."""
    layers, inputs = [conv(3, widths[0]), relu], widths[0]
    for i, outputs in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(inputs, outputs, 2 if i and not block else 1, conv, relu))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


NETWORKS = {
    'resnet18': lambda: resnet((64, 128, 256, 512), 2, conv_norm, nn.ReLU()),
    'resnet20': lambda: resnet((16, 32, 64), 3, conv_frn, nn.Identity()),
}


def forget_compiled():
    """Forgets all compiled networks, because torch.compile silently stops to compile after a few of them."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


class Stepper:
    """Takes steps of SGD or SAM on one synthetic batch.

    Args:
        model: a name in NETWORKS.
        batch_size: images in the batch.
        num_sub_batches: sub-batches of the batch. SAM perturbs the weights for each sub-batch.
        compiled: whether torch.compile compiles the network and its gradient.
        rho: the size of SAM's perturbation, None for SGD.
    """

    def __init__(self, model, batch_size, num_sub_batches, compiled, rho=None):
        self.network = NETWORKS[model]().to(memory_format=torch.channels_last)
        self.params = list(self.network.parameters())
        self.optimizer = torch.optim.SGD(self.params, lr=0.01, momentum=0.9, weight_decay=5e-4)
        images = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
        batch = images, torch.randint(10, (batch_size,))
        self.sub_batches = list(zip(*(x.chunk(num_sub_batches) for x in batch), strict=True))
        self.forward = torch.compile(self.network, dynamic=False) if compiled else self.network
        self.rho = rho

    def __call__(self):
        self.optimizer.zero_grad()
        for images, labels in self.sub_batches:
            if self.rho is None:
                value = self._backward(images, labels)
            else:
                value = self._sharpness_aware_backward(images, labels)
        self.optimizer.step()
        return float(value)

    def _backward(self, images, labels):
        loss = functional.cross_entropy(self.forward(images), labels) / len(self.sub_batches)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _sharpness_aware_backward(self, images, labels):
        """Adds the gradient at w + ρ g/‖g‖ to the gradients of earlier sub-batches."""
        earlier = [p.grad for p in self.params]
        self.optimizer.zero_grad()
        with torch.enable_grad():
            self._backward(images, labels)
        grads, weights = [p.grad for p in self.params], [p.clone() for p in self.params]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        torch._foreach_add_(self.params, torch._foreach_mul(grads, self.rho / norm.item()))
        self.optimizer.zero_grad()
        with torch.enable_grad():
            value = self._backward(images, labels)
        torch._foreach_copy_(self.params, weights)
        if earlier[0] is not None:
            torch._foreach_add_([p.grad for p in self.params], earlier)
        return value
