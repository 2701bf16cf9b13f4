"""A training of which the second process alone sees NaN, in its second step."""

import os

import torch

from recipes import train

create_loaders = train.create_loaders


class Poisoned:
    def __init__(self, loader):
        self.loader = loader
        self.sampler, self.dataset = loader.sampler, loader.dataset
        self.step = 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels in self.loader:
            bad = self.step == 1 and os.environ["RANK"] == "1"
            self.step += 1
            yield images * (torch.nan if bad else 1), labels


def poisoned(*arguments):
    loaders = create_loaders(*arguments)
    return loaders._replace(train=Poisoned(loaders.train))


train.create_loaders = poisoned
if __name__ == "__main__":
    train.main()
