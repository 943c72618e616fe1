"""T5 small, version 1.0 (Raffel et al. 2020, arXiv:1910.10683): 6 + 6 layers, ReLU, relative positions, a tied head.

    python train.py t5_small --init-from T5_DIR --data.train pairs:train.tsv --data.validation pairs:valid.tsv
    python eval.py runs/t5_small --task translation --data pairs:test.tsv --num-beams 4

60.5 million parameters with a vocabulary of 32,128 as T5 has. It is for going on from a folder of Hugging Face's
layout, whose shape and tokenizer then take the place of those below, so that Flan-T5 and larger ones open the same
way. The optimizer is the one that T5 is fine-tuned by, AdaFactor at a constant rate of 0.001 in batches of 128 rows of
512 tokens. A task's prefix ("translate English to German: ") is the user's, in the text of the sources.
Without --init-from it trains new weights on a BPE of the text, and transformer_base is the better start: T5 draws its
tables fifty times as large as init_std does.
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
            family="encoder_decoder",
            num_layers=6,
            d_model=512,
            num_heads=8,
            head_dim=64,
            d_ff=2048,
            norm="rmsnorm",
            norm_epsilon=1e-6,
            activation="relu",
            positions="relative",
            attention_scale=1.0,
            logit_scale=512**-0.5,
            dropout=0.1,
            hidden_dropout=True,
            compute_dtype="bfloat16",
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=32_128),
        data=DataConfig(train="pairs:train.tsv", context=512, packing="best_fit"),
        training=TrainingConfig(steps=10_000, batch_size=128, gradient_accumulation=8),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
        evaluation=EvaluationConfig(every_steps=1000, batch_size=8),
    )
