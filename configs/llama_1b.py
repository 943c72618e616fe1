"""A Llama shape of 1.2 B parameters: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    python train.py llama_1b --data.train 'text:corpus/*.txt' --parallel.fsdp 8

Eight accelerators of 80 GB, bfloat16, parameters and optimizer state split over them; the sizes are Llama 3.2 1B's.
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
            num_layers=16,
            d_model=2048,
            num_heads=32,
            num_kv_heads=8,
            d_ff=8192,
            norm="rmsnorm",
            activation="swiglu",
            positions="rotary",
            rotary_base=500_000.0,
            compute_dtype="bfloat16",
            scan_layers=True,
            remat=True,
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=128_256),
        data=DataConfig(train="builtin:python-stdlib", context=2048),
        training=TrainingConfig(steps=20_000, batch_size=256, gradient_accumulation=4),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, beta2=0.95),
        checkpoint=CheckpointConfig(every_steps=1000),
        evaluation=EvaluationConfig(every_steps=500, max_tokens=1_000_000, batch_size=16),
    )
