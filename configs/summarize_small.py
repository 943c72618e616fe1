"""Summaries of a paragraph in a sentence, from nothing but pairs of them: 3 + 3 layers, a joint BPE.

    python train.py summarize_small --data.train 'pairs:jsonl:train.jsonl#source,target' \
        --data.validation 'pairs:jsonl:valid.jsonl#source,target'
    python eval.py runs/summarize_small --task summarization --data 'pairs:jsonl:test.jsonl#source,target' --num-beams 4

It is sized for sources of up to 512 tokens. A list of sentences is one source, a list of targets several references of
which the first is trained on, so that SciTLDR's files are read as they are. Some thousand pairs teach it to write like
summaries and little about what they are of; t5_small --init-from begins with a trained T5. On SciTLDR, in 16 minutes
on two busy cores of a 2.5 GHz Xeon with --model.compute-dtype float32 and --optimizer.newton-schulz-dtype float32:
ROUGE-1 29.5 (28.9 to 30.2) on its test part with four beams, less than the 31.3 of its abstracts' first sentences.
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
            num_heads=4,
            norm="rmsnorm",
            activation="relu2",
            positions="rotary",
            qk_norm=True,
            zero_init_outputs=True,
            tie_embeddings=True,
            logit_softcap=15.0,
            compute_dtype="bfloat16",
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=4096),
        data=DataConfig(
            train="pairs:jsonl:train.jsonl#source,target",
            validation="pairs:jsonl:valid.jsonl#source,target",
            source_context=512,
            context=64,
            packing="best_fit",
        ),
        training=TrainingConfig(steps=400, batch_size=8, label_smoothing=0.1),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=3e-3,
            schedule="linear",
            warmup_steps=0,
            final_learning_rate=0.0,
            beta1=0.8,
            beta2=0.95,
            weight_decay=0.1,
        ),
        evaluation=EvaluationConfig(every_steps=100, batch_size=32, task="summarization", task_max_tokens=64),
        observe=ObserveConfig(every_steps=10),
    )
