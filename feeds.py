"""Where the batches of an epoch come from: images on the device, or read from the host while steps are taken.

Both give a step of training the same images in the same order. A feed has
    choose(epoch, images, labels)       in the jitted step: its batch, of what `of_epoch` gave it
    of_epoch(epoch, done)               yields (images, labels) for each step of a training.Epoch after `done` of them
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from ops import sharding
from runs import hosts

SHARE = 0.4  # of a device's memory that images may take
PART = 1 << 28  # bytes of images that are sent at once for an evaluation of more


class Resident:
    """All images lie on every device, and a step finds its own: nothing is sent for it."""

    def __init__(self, images, labels, mesh):
        self.arrays = sharding.replicate((images, labels), mesh)

    @staticmethod
    def choose(epoch, images, labels):
        chosen = sharding.shard(epoch.batches[epoch.step])
        return images[chosen], labels[chosen]

    def of_epoch(self, epoch, done):
        for _ in range(done, len(epoch.batches)):
            yield self.arrays


class Streamed:
    """Images stay in an array on the host, or in a file that is mapped; the next two batches are read ahead."""

    def __init__(self, images, labels, mesh):
        self.arrays, self.mesh = (images, labels), mesh

    @staticmethod
    def choose(epoch, images, labels):
        del epoch
        return images, labels

    def of_epoch(self, epoch, done):
        batches = np.array(epoch.batches)[done:]
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self._read, indices) for indices in batches[:2]]
            for i in range(len(batches)):
                ahead += [reader.submit(self._read, indices) for indices in batches[i + 2 : i + 3]]
                yield ahead.pop(0).result()

    def _read(self, indices):
        return sharding.place_rows(self.arrays, indices, self.mesh)


def create(images, labels, mesh, stream):
    """Streamed where it is asked for, or where images uint8 [N, H, W, C] would fill a device; else Resident."""
    return (Streamed if stream or _too_large(images) else Resident)(images, labels, mesh)


def parts(images, batch_size, stream=False):
    """Images uint8 [N, H, W, C] that are evaluated, once or several times, as a list for `over_parts`.

    All of them, sent to the devices of the mesh that is set; or parts of whole batches on the host where it is asked
    for, or where they would fill a device.
    """
    if not (stream or _too_large(images)):
        return [sharding.send(images)]
    batch_size = sharding.shareable(batch_size)
    rows = max(PART // images[:1].nbytes // batch_size, 1) * batch_size
    return [images[i : i + rows] for i in range(0, len(images), rows)]


def over_parts(function, parts):
    """The results [..., N, K] of a function of images on the devices, put together on the host; parts: as from `parts`.

    Parts that are on the host are sent when they are due.
    """
    sent = (part if isinstance(part, jax.Array) else sharding.send(part) for part in parts)
    return np.concatenate([jax.device_get(function(part)) for part in sent], axis=-2)


def _too_large(images):
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
    return hosts.from_first(lambda: limit is not None and images.nbytes > SHARE * limit)
