"""Llama 2 7B's shape: 6.7 B parameters, RMSNorm, rotary positions, SwiGLU; 4096 tokens of context.

    python train.py llama_7b --data.train 'text:corpus/*.txt' --parallel.fsdp 64

64 accelerators of 80 GB, bfloat16, 4 M tokens a step. Planned for H100s (`python -m lm plan llama_7b --mesh fsdp=64
--device h100`): 15 GB a device, 4.1 s a step at their peak and 0.5 s of exchange, so that MFU can't exceed 67 to 75 %.
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
            num_layers=32,
            d_model=4096,
            num_heads=32,
            d_ff=11008,
            norm="rmsnorm",
            activation="swiglu",
            positions="rotary",
            tie_embeddings=False,
            compute_dtype="bfloat16",
            scan_layers=True,
            remat=True,
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=32_000),
        data=DataConfig(train="builtin:python-stdlib", context=4096),
        training=TrainingConfig(steps=500_000, batch_size=1024, gradient_accumulation=4),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95),
        checkpoint=CheckpointConfig(every_steps=1000),
        evaluation=EvaluationConfig(every_steps=500, max_tokens=1_000_000, batch_size=16),
    )
