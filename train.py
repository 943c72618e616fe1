"""Trains a language model: python train.py [PRESET | path/to/preset.py] [--workdir DIR] [--SECTION.FIELD VALUE ...]"""

from collections.abc import Sequence

from lm import api, cli


def train(arguments: Sequence[str]) -> None:
    config, workdir = cli.train_arguments(arguments, api.preset)
    api.train(config, workdir)


if __name__ == "__main__":
    cli.main(train)
