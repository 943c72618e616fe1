"""Llama 2 70B's shape: 69 B parameters, RMSNorm, rotary positions, SwiGLU, 8 key/value heads; 4096 tokens of context.

    python train.py llama_70b --data.train 'text:corpus/*.txt' --parallel.fsdp 64

512 accelerators of 80 GB, bfloat16, 4 M tokens a step: eight replicas, each split over 64. Planned for H100s
(`python -m lm plan llama_70b --mesh data=8,fsdp=64 --device h100`): 36 GB a device, 4.9 s a step at their peak and
1.5 s of exchange, so that MFU can't exceed 57 to 75 %.
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
            num_layers=80,
            d_model=8192,
            num_heads=64,
            num_kv_heads=8,
            d_ff=28672,
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
        training=TrainingConfig(steps=500_000, batch_size=1024, gradient_accumulation=1),
        optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000, beta2=0.95),
        checkpoint=CheckpointConfig(every_steps=1000),
        evaluation=EvaluationConfig(every_steps=500, max_tokens=1_000_000, batch_size=16),
    )
