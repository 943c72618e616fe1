"""A small translation model of two CPU cores and an hour: 3 + 3 layers, a joint BPE, by the recipe of speedrun_char.

    python train.py translate_small --data.train pairs:train.tsv --data.validation pairs:valid.tsv
    python eval.py runs/translate_small --task translation --data pairs:test.tsv --num-beams 4

It is for short sentences, some hundred thousand pairs of them; several share a row of 128 tokens on each side. Training
ends by wall time, 50 minutes, so that ten of an hour are left to write and score the translations of the validation
text. Measured here: nothing yet; size and rates are carried over from other presets.
"""

from lm.config import (
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
        model=ModelConfig(
            family="encoder_decoder",
            num_layers=3,
            encoder_layers=3,
            d_model=256,
            num_heads=4,
            norm="rmsnorm",
            activation="relu2",
            positions="rotary",
            rotary_base=1000.0,
            qk_norm=True,
            zero_init_outputs=True,
            tie_embeddings=False,
            logit_softcap=15.0,
            compute_dtype="bfloat16",
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=8192),
        data=DataConfig(train="pairs:train.tsv", validation="pairs:valid.tsv", context=128, packing="best_fit"),
        training=TrainingConfig(steps=None, seconds=3000.0, batch_size=24, label_smoothing=0.1),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=5e-3,
            embedding_factor=3.0,
            schedule="linear",
            warmup_steps=0,
            final_learning_rate=0.0,
            beta1=0.8,
            beta2=0.95,
            weight_decay=0.0,
        ),
        evaluation=EvaluationConfig(every_steps=500, batch_size=64, task="translation", task_max_tokens=96),
        observe=ObserveConfig(every_steps=10),
    )
