"""The classic PyTorch tutorial model: torch.nn.TransformerEncoder's post-norm layers under a causal mask.

    python train.py torch_tutorial --data.train text:train.txt --data.validation text:valid.txt

Embedding x sqrt(d_model), sinusoidal positions, ReLU, dropout 0.5, an untied linear decoder with bias, PyTorch's own
initialisation. Two CPU cores, some minutes. The optimizer is AdamW, not the tutorial's SGD at 5.
"""

from lm.config import (
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
            num_layers=2,
            d_model=200,
            num_heads=2,
            d_ff=200,
            norm="layernorm",
            norm_position="post",
            activation="relu",
            positions="sinusoidal",
            tie_embeddings=False,
            bias=True,
            head_bias=True,
            embedding_scale=True,
            dropout=0.5,
            hidden_dropout=True,
            initializer="torch",
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=8192),
        data=DataConfig(train="builtin:python-stdlib", context=35),
        training=TrainingConfig(steps=None, epochs=1.0, batch_size=20),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=100, beta2=0.999, weight_decay=0.0, clip_norm=0.5),
        evaluation=EvaluationConfig(every_steps=1000, max_tokens=50_000, batch_size=64),
    )
