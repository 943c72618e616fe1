"""Trains a language model: python train.py [PRESET | path/to/preset.py] [--workdir DIR] [--SECTION.FIELD VALUE ...]"""

from collections.abc import Sequence

from lm import cli


def train(argv: Sequence[str]) -> None:
    from lm import api  # here, so that Ctrl-C ends the command cleanly while JAX is loading

    config, workdir = cli.train_arguments(argv, api.preset)
    api.train(config, workdir)


if __name__ == "__main__":
    cli.main(train)
