"""Trains a language model: python train.py [PRESET | path/to/preset.py] [--workdir DIR] [--SECTION.FIELD VALUE ...]"""

from collections.abc import Sequence

from lm import allocator, cli


def train(argv: Sequence[str]) -> None:
    allocator.keep_freed_memory()
    with cli.loading():
        from lm import api

    allocator.compute_inline()
    config, workdir, arguments = cli.train_arguments(argv, api.preset)
    arguments.connect()
    api.train(config, workdir)


if __name__ == "__main__":
    cli.main(train)
