"""What olive.json evaluates on: the test samples of the quickstart, in the form of a data set of Olive."""

import numpy as np
from olive.data.registry import Registry


class Digits:
    """Samples of an .npz file with their labels."""

    def __init__(self, path):
        with np.load(path) as arrays:
            self.images, self.labels = arrays["image"], arrays["labels"]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return {"image": self.images[number]}, int(self.labels[number])


@Registry.register_dataset()
def digits(path):
    return Digits(path)


@Registry.register_post_process()
def classes(logits):
    return logits.argmax(1)
