"""A small translation model of two CPU cores and an hour: 3 + 3 layers, a joint BPE, by the recipe of speedrun_char.

    python train.py translate_small --data.train pairs:train.tsv --data.validation pairs:valid.tsv
    python eval.py runs/translate_small --task translation --data pairs:test.tsv --num-beams 4

It is for short sentences, some hundred thousand pairs of them; several share a row of 64 tokens on each side. Training
ends by wall time, 40 minutes. On Tatoeba's 162,913 English-French pairs (split by English sentence) and two cores of a
2.5 GHz Xeon, which has no bfloat16 instructions, so with --model.compute-dtype float32 and
--optimizer.newton-schulz-dtype float32:

| updates | BLEU on 200 validation pairs, greedy | perplexity of a target token, all 1,000 |
| 500     | 25.0                                 | 7.05                                    |
| 1000    | 34.0                                 | 4.65                                    |
| 1500    | 38.4                                 | 3.99                                    |
| 2000    | 39.4                                 | 3.52                                    |
| 2500    | 40.2                                 | 3.30                                    |
| 2979    | 45.9 (all 1,000)                     | 3.17                                    |

and 49.5 (47.9 to 51.1) on 2,000 held-out pairs with four beams, 42.6 minutes after the start of the first command.
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
            d_model=192,
            num_heads=3,
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
        data=DataConfig(train="pairs:train.tsv", validation="pairs:valid.tsv", context=64, packing="best_fit"),
        training=TrainingConfig(steps=None, seconds=2400.0, batch_size=24, label_smoothing=0.1),
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
        evaluation=EvaluationConfig(
            every_steps=500, batch_size=64, task="translation", task_every_steps=500, task_max_tokens=64
        ),
        observe=ObserveConfig(every_steps=10),
    )
