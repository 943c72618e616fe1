"""Run by test_processes.py: scores a text in process I of N, each with two devices, and prints the result.

python -m tests.evaluation.two_processes ADDRESS N I
"""

from __future__ import annotations

import json
import sys

import jax

from lm.config import ModelConfig, ParallelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize
from lm.evaluation.perplexity import Evaluator
from lm.nn import language_model, params
from lm.parallel import make_mesh, parameter_shardings
from tests.data.memory_corpus import corpus_of

TEXTS = ["the cat sat on the mat, and the dog sat on the cat " * 3, "x", "žluťoučký kůň 👩‍🚀 pěl", "0123456789abcdef"]


def result(mesh):
    """What an evaluation says, with the surprisal of every token: all but its time."""
    cfg = RunConfig(model=ModelConfig(num_layers=1, d_model=32, num_heads=2, init_std=0.3)).resolve(258).model
    specs = language_model.model_specs(cfg)
    tree = jax.jit(
        lambda: params.initialize(specs, jax.random.key(0)), out_shardings=parameter_shardings(mesh, specs)
    )()
    store = tokenize(corpus_of(*TEXTS), ByteTokenizer(), processes=1)
    tokens = []
    evaluator = Evaluator(cfg, store, ByteTokenizer(), window=16, stride=5, batch_size=6, mesh=mesh)
    scores = evaluator(tree, each_document=lambda number, ids, nats: tokens.append(nats.tolist()))
    return {"nats": scores.nats_per_token, "error": scores.standard_error, "count": scores.tokens, "tokens": tokens}


def main() -> None:
    address, number, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    jax.distributed.initialize(address, number, index)
    assert jax.device_count() == 2 * number and jax.local_device_count() == 2
    print(json.dumps(result(make_mesh(ParallelConfig(fsdp=2)))))


if __name__ == "__main__":
    main()
