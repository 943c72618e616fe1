"""nanoGPT's CPU setting for character-level text: a GPT-2 shape of 0.8 M parameters, on any text file.

    python train.py shakespeare_char --data.train text:input.txt

Two CPU cores, two to three minutes; on Shakespeare (1.1 MB) 1.88 nats a character over the last tenth of the text.
"""

from lm.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TrainingConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=4, d_model=128, num_heads=4),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(train="text:input.txt", context=64),
        training=TrainingConfig(steps=2000, batch_size=12),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99, weight_decay=0.1),
        checkpoint=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=500, batch_size=64),
        observe=ObserveConfig(sample_prompt="\n", sample_tokens=60),
    )
