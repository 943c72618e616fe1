"""The base model of "Attention Is All You Need" (Vaswani et al. 2017): 6 + 6 layers, post-norm, sinusoidal positions.

    python train.py transformer_base --data.train pairs:train.tsv --data.validation pairs:valid.tsv
    python eval.py runs/transformer_base --task translation --data pairs:test.tsv --num-beams 4 --length-penalty 0.6

63 million parameters with the 37,000 subwords that source and target share. A batch has about 25,000 tokens on each
side; the paper took 100,000 such steps, 12 hours of eight P100 GPUs, for 27.3 BLEU from English to German (WMT 2014,
4.5 million pairs, the last five checkpoints averaged). Measured here: nothing; the data and the hardware are yours.
Where it departs from the paper: pairs are packed into rows, and attention probabilities have dropout too.
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

D_MODEL, WARMUP_STEPS = 512, 4000


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            family="encoder_decoder",
            num_layers=6,
            d_model=D_MODEL,
            num_heads=8,
            d_ff=2048,
            norm="layernorm",
            norm_position="post",
            activation="relu",
            positions="sinusoidal",
            bias=True,
            share_embeddings=True,
            tie_embeddings=True,
            embedding_scale=True,
            dropout=0.1,
            init_std=D_MODEL**-0.5,
            compute_dtype="bfloat16",
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=37_000),
        data=DataConfig(train="pairs:train.tsv", context=256, packing="best_fit"),
        training=TrainingConfig(steps=100_000, batch_size=96, label_smoothing=0.1),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=(D_MODEL * WARMUP_STEPS) ** -0.5,
            schedule="inverse_sqrt",
            warmup_steps=WARMUP_STEPS,
            beta2=0.98,
            epsilon=1e-9,
            weight_decay=0.0,
            clip_norm=None,
        ),
        checkpoint=CheckpointConfig(every_steps=5000, keep=5),
        evaluation=EvaluationConfig(
            every_steps=5000, task="translation", task_every_steps=5000, task_max_tokens=256, task_beams=4
        ),
        observe=ObserveConfig(every_steps=10),
    )
