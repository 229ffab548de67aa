import numpy as np
from sklearn.datasets import load_digits


def even_or_odd(folder, split):
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    part = slice(0, 1400) if split == 'train' else slice(1400, None)
    return images[part], digits.target[part] % 2


even_or_odd.class_names = ('even', 'odd')
