"""GPT-2 small: 124 M parameters, with GPT-2's biases, tanh GELU and tied head.

    python train.py gpt2_124m --data.train 'text:corpus/*.txt'

One GPU of 40 GB or more, bfloat16. 2.5 G tokens in 5000 steps of half a million; the tokenizer is a BPE trained on the
corpus unless tokenizer.path names GPT-2's own tokenizer.json.
"""

from lm.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TrainingConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=12,
            d_model=768,
            num_heads=12,
            activation="gelu_tanh",
            bias=True,
            compute_dtype="bfloat16",
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=50257),
        data=DataConfig(train="builtin:python-stdlib", context=1024),
        training=TrainingConfig(steps=5000, batch_size=480, gradient_accumulation=40),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700, beta2=0.95),
        checkpoint=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=250, max_tokens=1_000_000, batch_size=8),
    )
