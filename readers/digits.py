"""Reads the digits that scikit-learn ships, without a file or internet access."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASS_NAMES = tuple('0123456789')


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns handwritten digits (Alpaydin & Kaynak, 1998), enlarged from 8×8 to 32×32 pixels. Does not use `folder`.

    The training split has 1,437 images and the test split 360: uint8 [N, 32, 32, 1], with labels int32 [N].
    """
    del folder
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BILINEAR)) for p in pixels])
    parts = train_test_split(images[..., None], digits.target, test_size=360, random_state=0, stratify=digits.target)
    images, labels = (parts[0], parts[2]) if split == 'train' else (parts[1], parts[3])
    return images, labels.astype(np.int32)
