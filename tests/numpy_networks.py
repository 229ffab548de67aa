"""The networks in plain NumPy, after the reference and the papers: slow and obvious.

Params are {'layer/name': array}. Images are [B, H, W, C], logits [B, K].
"""

from functools import partial

import numpy as np


def convolution(x, params, name, stride=1):
    """Convolves with SAME padding, as a sum of products over the kernel's positions."""
    kernel = params[f'{name}/kernel']
    size, (height, width) = len(kernel), x.shape[1:3]
    out = [-(-n // stride) for n in (height, width)]
    pads = [max((o - 1) * stride + size - n, 0) for o, n in zip(out, (height, width), strict=True)]
    x = np.pad(x, [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])
    ends = [stride * (o - 1) + 1 for o in out]
    y = sum(
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    )
    return y + params.get(f'{name}/bias', 0)


def dense(x, params, name):
    return x @ params[f'{name}/kernel'] + params[f'{name}/bias']


def max_pool(x):
    """Pools windows of 3×3 pixels with stride 2 and VALID padding."""
    height, width = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return np.max([x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i, j in shifts], axis=0)


def batch_norm(x, params, name):
    """Normalises by the statistics of the batch, or by `mean` and `var` where params hold them, as in evaluation."""
    mean = params.get(f'{name}/mean', x.mean(axis=(0, 1, 2)))
    var = params.get(f'{name}/var', x.var(axis=(0, 1, 2)))
    normalised = (x - mean) / np.sqrt(var + 1e-5)
    return params[f'{name}/scale'] * normalised + params[f'{name}/bias']


def filter_response_norm(x, params, name):
    normalised = x / np.sqrt(np.mean(x**2, axis=(1, 2), keepdims=True) + 1e-6)
    return np.maximum(params[f'{name}/scale'] * normalised + params[f'{name}/bias'], params[f'{name}/threshold'])


def relu(x):
    return np.maximum(x, 0)


def _conv_norm(norm, norm_name):
    def layer(x, params, name, stride=1):
        (conv,) = (key for key in params if key.startswith(f'{name}/') and key.endswith('/kernel'))
        x = convolution(x, params, conv.removesuffix('/kernel'), stride)
        return norm(x, params, f'{name}/{norm_name}')

    return layer


_conv_bn, _conv_frn = _conv_norm(batch_norm, 'norm'), _conv_norm(filter_response_norm, 'frn')


def resnet18(x, params):
    x = relu(_conv_bn(x, params, 'stem'))
    for stage in (1, 2, 3, 4):
        for block in (1, 2):
            name, stride = f'stage{stage}/block{block}', 2 if stage > 1 and block == 1 else 1
            y = relu(_conv_bn(x, params, f'{name}/layer1', stride))
            y = _conv_bn(y, params, f'{name}/layer2')
            x = relu(y + (_conv_bn(x, params, f'{name}/shortcut', stride) if stride == 2 else x))
    return dense(x.mean(axis=(1, 2)), params, 'head')


def pre_activation(x, params, stages, blocks):
    x = convolution(x, params, 'stem')
    for stage in range(1, stages + 1):
        for block in range(1, blocks + 1):
            name, stride = f'stage{stage}/block{block}', 2 if stage > 1 and block == 1 else 1
            activated = relu(batch_norm(x, params, f'{name}/norm1'))
            y = convolution(activated, params, f'{name}/conv1', stride)
            y = convolution(relu(batch_norm(y, params, f'{name}/norm2')), params, f'{name}/conv2')
            if x.shape != y.shape:
                x = convolution(activated, params, f'{name}/shortcut', stride)
            x = x + y
    return dense(relu(batch_norm(x, params, 'norm')).mean(axis=(1, 2)), params, 'head')


def resnet20(x, params):
    """Takes 32×32 images only, because one pool averages the last 8×8 pixels."""
    x = _conv_frn(x, params, 'stem')
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            name, stride = f'stage{stage}/block{block}', 2 if stage > 1 and block == 1 else 1
            y = _conv_frn(_conv_frn(x, params, f'{name}/layer1', stride), params, f'{name}/layer2')
            x = y + (_conv_frn(x, params, f'{name}/shortcut', stride) if stride == 2 else x)
    return dense(x.mean(axis=(1, 2)), params, 'head')


def lenet(x, params):
    for i in (1, 2, 3):
        x = max_pool(relu(convolution(x, params, f'conv{i}')))
    x = relu(dense(x.reshape(len(x), -1), params, 'dense1'))
    return dense(x, params, 'dense2')


def mlp(x, params):
    x = x.reshape(len(x), -1)
    for i in (1, 2):
        x = dense(x, params, f'dense{i}')
        x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
    return dense(x, params, 'dense3')


NETWORKS = {
    'resnet18': resnet18,
    'preactresnet18': partial(pre_activation, stages=4, blocks=2),
    'wrn10x1': partial(pre_activation, stages=3, blocks=1),
    'wrn16x2': partial(pre_activation, stages=3, blocks=2),
    'resnet20': resnet20,
    'lenet': lenet,
    'mlp': mlp,
}


def loss(name, params, images, labels):
    """Returns the mean negative log-likelihood of the softmax."""
    logits = NETWORKS[name](images, params)
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels])
