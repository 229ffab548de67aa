from flax import linen as nn

from models import BatchNorm, Conv


class Small(nn.Module):
    num_classes: int
    rate: float = 0.2

    @nn.compact
    def __call__(self, images, train):
        x = images
        for features in (16, 32):
            x = nn.relu(BatchNorm()(Conv(features, (3, 3), strides=2, use_bias=False)(x), train))
        x = nn.Dropout(self.rate, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes)(x)
