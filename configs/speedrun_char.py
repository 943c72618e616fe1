"""nanoGPT's CPU setting by a modern recipe: the same width, depth, context and tokens a step, a tenth of the steps.

    python train.py speedrun_char --data.train text:input.txt

On Shakespeare (1.1 MB) 1.87 nats a character over the last tenth of the text, scored in blocks of the context as
nanoGPT scores it, and 1.55 with --training.steps 2000. The settings were chosen on that tenth. A CPU without bfloat16
instructions is faster with --model.compute-dtype float32, and comes to the same loss.
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
            num_layers=4,
            d_model=128,
            num_heads=4,
            norm="rmsnorm",
            activation="relu2",
            positions="rotary",
            rotary_base=100.0,
            qk_norm=True,
            zero_init_outputs=True,
            tie_embeddings=False,
            logit_softcap=15.0,
            compute_dtype="bfloat16",
        ),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(train="text:input.txt", context=64),
        training=TrainingConfig(steps=200, batch_size=12),
        optimizer=OptimizerConfig(
            name="muon",
            newton_schulz="polar_express",
            newton_schulz_steps=3,
            newton_schulz_dtype="float32",
            muon_by_head=True,
            learning_rate=5e-3,
            embedding_factor=3.0,
            head_factor=3.0,
            schedule="linear",
            warmup_steps=0,
            final_learning_rate=0.0,
            momentum=0.9,
            beta1=0.8,
            beta2=0.95,
            weight_decay=0.0,
        ),
        evaluation=EvaluationConfig(batch_size=64),
        observe=ObserveConfig(sample_prompt=None),
    )
