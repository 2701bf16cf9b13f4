"""A training of which the second process fails in its second epoch."""

import os

from recipes import train
from recipes.recipe import RecipeError

train_epoch = train.train_epoch


def failing(training, epoch, *arguments):
    if os.environ["RANK"] == "1" and epoch == 1:
        raise RecipeError("this one has failed")
    return train_epoch(training, epoch, *arguments)


train.train_epoch = failing
if __name__ == "__main__":
    train.main()
