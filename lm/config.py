"""The configuration of a whole run: frozen dataclasses with an exact JSON round trip; `lm/validation.py` checks them.

`None` always means "off" or "derived from another field". Nothing here
imports the rest of `lm` but `lm/fields.py`, which knows no field.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from typing import Any, Literal, NamedTuple

from lm.fields import InputError as InputError
from lm.fields import build

SCHEMA_VERSION = 1
GATED = ("swiglu", "geglu")
"""The activations that act on a gate, which multiplies the hidden units."""


class LayerKind(NamedTuple):
    """All that layers of one stack differ in."""

    window: int | None
    rotary_base: float
    rotary_factor: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape and the arithmetic of the network."""

    family: Literal["decoder", "encoder_decoder"] = "decoder"
    """decoder: a causal stack alone, a language model. encoder_decoder: its layers also read, by cross-attention, what
    an encoder has made of a source: for translation and summarisation, on pairs of texts."""
    num_layers: int = 4
    """Layers in the stack; of an encoder_decoder in the decoder."""
    encoder_layers: int | None = None
    """encoder_decoder: layers in the encoder. None: num_layers."""
    d_model: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads a layer."""
    num_kv_heads: int | None = None
    """Key/value heads a layer (grouped-query attention). None: num_heads."""
    head_dim: int | None = None
    """Width of a head. None: d_model / num_heads."""
    d_ff: int | None = None
    """Hidden width of the feed-forward block. None: 4 d_model; if it is gated 8/3 d_model, rounded up to 64."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalisation."""
    norm_position: Literal["pre", "post", "both"] = "pre"
    """Normalise before each block (with a final norm after the stack) or after each residual sum (without); both is
    pre, and again each block's output before it is added (Gemma 2)."""
    norm_offset: bool = False
    """RMSNorm multiplies by 1 + scale (Gemma)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"] = "gelu"
    """Nonlinearity of the feed-forward block; gelu is exact, gelu_tanh GPT-2's approximation. swiglu and geglu are
    gated, by SiLU and by gelu_tanh."""
    positions: Literal["learned", "sinusoidal", "rotary", "relative", "none"] = "learned"
    """How the model is told the order of tokens. relative: a learned number for each head and distance is added to the
    scores of self-attention (T5)."""
    max_positions: int | None = None
    """Rows of a learned position table, in tokens. None: data.context, or data.source_context if that is more."""
    rotary_base: float | tuple[float, ...] = 10_000.0
    """Base wavelength of rotary positions, in tokens; several repeat over the layers."""
    rotary_factor: float | tuple[float, ...] = 1.0
    """How many times longer rotary positions reach, as rotary_scaling says; several repeat over the layers."""
    rotary_scaling: Literal["linear", "llama3"] = "linear"
    """linear: positions are divided by rotary_factor. llama3: only the long wavelengths are stretched by it."""
    rotary_low_frequency_factor: float = 1.0
    """llama3: wavelengths above rotary_original_positions over this are stretched in full."""
    rotary_high_frequency_factor: float = 4.0
    """llama3: wavelengths below rotary_original_positions over this are kept."""
    rotary_original_positions: int = 8192
    """llama3: tokens of context that the model was first trained on."""
    relative_buckets: int = 32
    """relative: how many numbers a head has, for single distances and ever longer ranges of them."""
    relative_max_distance: int = 128
    """relative: from this many tokens on all distances share one number."""
    window: int | None | tuple[int | None, ...] = None
    """Sliding window: a token sees this many, itself and those just before it. Several repeat over the layers. None:
    all."""
    attention_scale: float | None = None
    """Factor on attention scores. None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Bound attention scores to (-c, c) by c tanh(x / c). None: off."""
    qk_norm: bool = False
    """RMS-normalise every query and key head."""
    tie_embeddings: bool = True
    """Use the embedding table as the output head."""
    share_embeddings: bool = True
    """encoder_decoder: encoder and decoder use one embedding table. False: source_tokenizer may differ from
    tokenizer."""
    logit_scale: float | None = None
    """Factor on what the head reads. None: off."""
    bias: bool = False
    """Biases in the linear layers and in LayerNorm."""
    qkv_bias: bool | None = None
    """Biases on queries, keys and values. None: as bias says."""
    head_bias: bool = False
    """A bias on the logits."""
    embedding_scale: bool = False
    """Multiply embeddings by sqrt(d_model)."""
    dropout: float = 0.0
    """Dropout rate on embeddings, attention probabilities and the output of each block."""
    hidden_dropout: bool = False
    """Apply the dropout rate inside the feed-forward block too."""
    logit_softcap: float | None = None
    """Bound logits to (-c, c) by c tanh(x / c). None: off."""
    initializer: Literal["normal", "torch"] = "normal"
    """normal: N(0, init_std), outputs of blocks scaled by one over the root of their number in the stack. torch:
    PyTorch's own layer defaults."""
    init_std: float = 0.02
    """Standard deviation of the normal initializer."""
    zero_init_outputs: bool = False
    """Draw the output projections of attention and feed-forward blocks as zeros: each block begins as the identity."""
    vocab_size: int | None = None
    """Tokens in the vocabulary. None: as many as the tokenizer has."""
    source_vocab_size: int | None = None
    """encoder_decoder without share_embeddings: tokens in the vocabulary of sources. None: as many as their tokenizer
    has."""
    start_id: int | None = None
    """encoder_decoder: the id that a target follows. None: the tokenizer's BOS, else its EOS."""
    vocab_multiple: int = 64
    """Vocabulary tables are padded up to a multiple of this; padded logits are -inf."""
    compute_dtype: Literal["float32", "bfloat16", "tensorfloat32"] = "float32"
    """Activations and operands of matrix products. Sums, parameters, norms, softmax and loss stay in float32."""
    attention: Literal["auto", "reference", "prefix", "shifted", "blockwise", "cudnn", "splash"] = "auto"
    """What computes attention. reference: all scores at once. prefix: those that causality leaves. shifted: the same
    without their maxima, for scoring. blockwise: a block at a time, for long rows. cudnn and splash: fused kernels of
    NVIDIA GPUs and TPUs. auto picks by device, context and model, and the log says which."""
    scan_layers: bool = False
    """Run the stack by lax.scan (constant compile time) instead of unrolled (faster on CPU)."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    @property
    def has_encoder(self) -> bool:
        return self.family == "encoder_decoder"

    @property
    def source_layers(self) -> int:
        """Layers in the encoder."""
        return self.num_layers if self.encoder_layers is None else self.encoder_layers

    @property
    def encoder(self) -> ModelConfig:
        """The encoder's stack as a config of its own, resolved if this one is."""
        vocab_size = self.vocab_size if self.share_embeddings else self.source_vocab_size
        return dataclasses.replace(
            self, family="decoder", num_layers=self.source_layers, encoder_layers=None, vocab_size=vocab_size
        )

    @property
    def padded_source_vocabulary(self) -> int:
        """Rows of the encoder's own vocabulary table, where there is one."""
        return self.encoder.padded_vocabulary

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ff_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        if self.activation in GATED:
            return -(-8 * self.d_model // (3 * 64)) * 64
        return 4 * self.d_model

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def score_scale(self) -> float:
        return self.head_width**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def layer_pattern(self) -> tuple[LayerKind, ...]:
        """The kinds of layers, repeated over the stack: layer i is of kind i modulo their number."""
        kinds = [
            LayerKind(_nth(self.window, i), _nth(self.rotary_base, i), _nth(self.rotary_factor, i))
            for i in range(self.num_layers)
        ]
        period = next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))
        return tuple(kinds[:period])

    @property
    def vocabulary(self) -> int:
        """Tokens in the vocabulary of a resolved config."""
        assert self.vocab_size is not None, "the config is not resolved: vocab_size is None"
        return self.vocab_size

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the vocabulary tables: `vocabulary` rounded up to `vocab_multiple`."""
        return -(-self.vocabulary // self.vocab_multiple) * self.vocab_multiple

    @property
    def position_rows(self) -> int:
        """Rows of the learned position table of a resolved config."""
        assert self.max_positions is not None, "the config is not resolved: max_positions is None"
        return self.max_positions


MOST_TOKENS = 2**24
"""In a vocabulary, fewer than these: sixty times the largest in use, and room for them is reserved."""


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["bytes", "bpe", "file"] = "bytes"
    """bytes: the 256 bytes with BOS and EOS. bpe: a BPE trained on data.train. file: one that is there, at path."""
    path: str | None = None
    """Of kind "file": a tokenizer.json, a SentencePiece .model, a tiktoken rank file, GPT-2's vocab.json with its
    merges.txt beside it, or the folder of one."""
    vocab_size: int = 4096
    """Tokens in a trained BPE, special tokens included."""
    byte_fallback: bool = False
    """Train the BPE on characters, with byte tokens for those left out, instead of on bytes."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens of a trained BPE besides BOS and EOS."""


@dataclasses.dataclass(frozen=True)
class SourceTokenizerConfig:
    """How sources become token ids, where an encoder has an embedding table of its own (model.share_embeddings False).
    The fields are those of the tokenizer section."""

    kind: Literal["shared", "bytes", "bpe", "file"] = "shared"
    """shared: by the same tokenizer as targets. bpe: a BPE trained on the sources of data.train."""
    path: str | None = None
    """Of kind "file": as tokenizer.path."""
    vocab_size: int = 4096
    """Tokens in a trained BPE, special tokens included."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into rows."""

    train: str = "builtin:python-stdlib"
    """Source of the training text: builtin:, tfds:, text:, jsonl:, parquet:, tokens:, pairs:, mix: (see README.md)."""
    validation: str | tuple[str, ...] | None = None
    """Source of the validation text; several as NAME=SOURCE each, the first chooses the best checkpoint. None: the
    dataset's own validation or test split, else a tenth of train."""
    context: int = 256
    """Row length, in tokens; of an encoder_decoder that of targets."""
    source_context: int | None = None
    """encoder_decoder: row length of sources, in tokens. None: context."""
    long_pairs: Literal["truncate", "drop"] = "truncate"
    """encoder_decoder: what becomes of pairs with a side longer than its row. truncate: cut to the row's length. drop:
    left out. Either is counted."""
    max_length_ratio: float | None = None
    """encoder_decoder: leave out pairs whose longer side has more than this many times the tokens of the other. None:
    off."""
    document_separator: str | None = None
    """Splits each text file into documents. None: one document a file."""
    pair_separator: str = "\n"
    """Between the two sides of a pair where they make one document."""
    prompt_loss: bool = False
    """Train on the prompts too, that is on the first side of pairs, and score them."""
    packing: Literal["split", "best_fit", "padded"] = "split"
    """split: documents one after another, cut at row ends. best_fit: packed so that none is cut that fits in a row.
    padded: a row for each document, for a long one several."""
    loader_threads: int = 2
    """Threads that make batches ahead of time. Changes no batch."""
    tokenizer_processes: int | None = None
    """Processes that tokenise. None: as many as there are cores. Changes no token."""

    @property
    def validation_sources(self) -> tuple[str, ...]:
        """The sources of `validation`, as they were given; none where it is None."""
        return (self.validation,) if isinstance(self.validation, str) else self.validation or ()

    @property
    def source_length(self) -> int:
        """Row length of sources."""
        return self.context if self.source_context is None else self.source_context


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    """The update rule. muon: for the matrices of the layers, with adamw for embeddings, head and vectors; its updates
    are as large as adamw's, so that one learning rate serves both. adafactor: the learning rate is relative to the
    size of the parameters."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """How the learning rate decays after the warmup. wsd: not before the last decay_fraction of the budget, then
    linearly."""
    warmup_steps: int = 100
    """Steps of linear warmup from 0."""
    final_learning_rate: float = 0.1
    """Where cosine, linear and wsd end, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """wsd: the part of the budget after the warmup in which the learning rate decays."""
    embedding_factor: float = 1.0
    """Learning rate of embedding tables, a tied head among them, as a multiple of learning_rate."""
    head_factor: float = 1.0
    """Learning rate of an untied head, as a multiple of learning_rate."""
    vector_factor: float = 1.0
    """Learning rate of norms and biases, as a multiple of learning_rate."""
    beta1: float = 0.9
    """Decay of the first moment; sgd: momentum, 0 for none."""
    beta2: float = 0.99
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    momentum: float = 0.95
    """muon: decay of the Nesterov momentum."""
    newton_schulz: Literal["jordan", "polar_express"] = "jordan"
    """muon: polynomials of the iteration that orthogonalises an update. jordan: the same in every step. polar_express:
    the best in each for what the steps before leave, so that three steps may do; which learns faster depends on the
    run."""
    newton_schulz_steps: int = 5
    """muon: steps of that iteration."""
    newton_schulz_dtype: Literal["float32", "bfloat16", "tensorfloat32"] = "bfloat16"
    """muon: operands of that iteration's products, as model.compute_dtype."""
    muon_by_head: bool = False
    """muon: whether query, key and value of each head are orthogonalised by themselves, or those of all heads together.
    By themselves it takes less time."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices and tables; norms and biases have none."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm. None: off."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and on how much at once. Set exactly one of steps, tokens, epochs and seconds."""

    steps: int | None = 1000
    """Budget in optimizer updates."""
    tokens: int | None = None
    """Budget in tokens, rounded up to whole steps."""
    epochs: float | None = None
    """Budget in passes over the training text, rounded up to whole steps."""
    seconds: float | None = None
    """Budget in seconds of wall time in the loop, evaluations included, compilation of the training step not."""
    batch_size: int = 16
    """Rows in the global batch of one update."""
    gradient_accumulation: int = 1
    """Micro-batches that the batch is cut into, to save memory."""
    ema_decay: float | None = None
    """Average the weights over steps with this decay; the averaged ones are evaluated and read, training goes on from
    the raw ones. None: off."""
    label_smoothing: float | None = None
    """What is minimised takes this much of the probability from the target and spreads it over the whole vocabulary;
    what is reported doesn't. None: off."""
    z_loss: float | None = None
    """Factor of log² Z, Z = sum of exp(logits), in what is minimised (PaLM: 1e-4); it keeps the logits from drifting.
    None: off."""
    max_skipped_steps: int = 10
    """Steps without a finite loss and gradient change nothing; more than this many in a row end the run."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. The last step, the best and a stopped one are always saved."""

    every_steps: int | None = None
    """Save every N steps. None: off."""
    keep: int | None = 2
    """Most recent checkpoints to keep, besides the best. None: all."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation in the loop and at the end."""

    every_steps: int | None = None
    """Evaluate every N steps. None: at the end only."""
    max_tokens: int | None = None
    """In the loop, take the first documents by hash of their id, up to this many tokens. The final one takes all."""
    batch_size: int = 32
    """Windows in a batch. Changes no result."""
    window: int | None = None
    """Longest input the model sees, in tokens. None: data.context."""
    stride: int | None = None
    """New tokens that each window scores. None: the window."""
    task: Literal["translation", "summarization"] | None = None
    """On pairs: write the second sides of some validation pairs from their first, and score them by BLEU and chrF
    (translation) or ROUGE (summarization). None: off."""
    task_every_steps: int | None = None
    """Do so every N steps. None: at the end only."""
    task_documents: int = 200
    """Pairs to do it for in the loop, the first by hash of their id. The final one takes all."""
    task_max_tokens: int = 128
    """New tokens at most for each."""
    task_beams: int = 1
    """Beams of the search; 1 is greedy."""
    best: Literal["nats", "task"] = "nats"
    """What the best checkpoint is chosen by: nats a token, or the task's BLEU or ROUGE-L."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes. Their product is the number of devices used, the first ones."""

    data: int | None = None
    """Replicas, each with its part of the batch. None: all devices that the other axes leave."""
    fsdp: int = 1
    """Devices over which each replica's parameters and optimizer state are split, and its batch with them."""
    tensor: int = 1
    """Devices over which heads, feed-forward width and vocabulary are split."""
    strategy: Literal["spmd", "pmap"] = "spmd"
    """spmd: one program over the mesh, all axes. pmap: whole replicas, one a device, as jax.pmap runs them: data
    parallelism alone."""
    rules: tuple[str, ...] = ()
    """Which mesh axes split which axes of the arrays, where it isn't as built in: NAME=AXIS, NAME=AXIS+AXIS, or NAME=
    to split nothing. The names are those of lm/parallel.py: embed, mlp, heads, kv_heads, vocab and others."""


@dataclasses.dataclass(frozen=True)
class ObserveConfig:
    """What is written and shown while training."""

    every_steps: int = 1
    """Write a line of metrics every N steps."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run (extra: tensorboard)."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (extra: wandb)."""
    profile: bool = False
    """Write a profiler's trace of steps 4 to 8 after each start into RUN/profile."""
    sample_prompt: str | None = ""
    """After training, sample a continuation of this prompt. None: off."""
    sample_tokens: int = 128
    """Tokens of the sample."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    source_tokenizer: SourceTokenizerConfig = field(default_factory=SourceTokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    init_from: str | None = None
    """A model to go on from: its weights, its tokenizer, and its model section but for dropout and how it is computed.
    None: new weights."""

    def resolve(self, vocab_size: int, source_vocab_size: int | None = None, first_id: int | None = None) -> RunConfig:
        """Fills what the tokenizers and the context decide, so that the model can be built from the config alone.

        A model may have more tokens than its tokenizer, as many published ones do; not fewer.

        Args:
          source_vocab_size: of the sources' own tokenizer; None: it is the same.
          first_id: what the tokenizer begins texts with.
        """
        data, model = self.data, self.model
        filled: dict[str, Any] = {"max_positions": model.max_positions or data.context}
        tokens = [("vocab_size", "tokenizer", vocab_size)]
        if model.has_encoder:
            filled["max_positions"] = model.max_positions or max(data.context, data.source_length)
            filled["start_id"] = first_id if model.start_id is None else model.start_id
            if not model.share_embeddings:
                tokens.append(("source_vocab_size", "source_tokenizer", source_vocab_size or vocab_size))
        for name, section, size in tokens:
            filled[name] = getattr(model, name) or size
            if filled[name] < size and self.init_from is None:  # a published tokenizer may name tokens without a row
                raise InputError(
                    f"model.{name} is {filled[name]} but the {section} has {size} tokens: "
                    f"leave model.{name} at None, or use the {section} it was set for"
                )
        start_id = filled.get("start_id")
        if start_id is not None and start_id >= filled["vocab_size"]:
            raise InputError(
                f"model.start_id is {start_id}, but the vocabulary has {filled['vocab_size']} tokens: leave it at "
                "None, or set one of their ids"
            )
        return dataclasses.replace(self, model=dataclasses.replace(model, **filled))

    def going_on_from(self, model: ModelConfig) -> RunConfig:
        """This config with the model and the tokenizer of `init_from`, whose model section is given."""
        kept = {name: getattr(self.model, name) for name in RUNTIME}
        tokenizer = TokenizerConfig("file", self.init_from)
        return dataclasses.replace(self, model=dataclasses.replace(model, **kept), tokenizer=tokenizer)

    def to_json(self) -> str:
        """The config as JSON text; `from_json` gives it back exactly."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Reads what `to_json` wrote. Raises InputError on another schema, an unknown field or a wrong type."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise InputError("not a run config: the JSON is not an object")
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise InputError(
                f"config has schema_version {version!r}, this version of lm reads {SCHEMA_VERSION}: "
                "open it with the lm that wrote it"
            )
        return build(cls, values)


RUNTIME = ("dropout", "hidden_dropout", "compute_dtype", "attention", "scan_layers", "remat")
"""Fields of `ModelConfig` that say how a model is run, and nothing of what its weights mean."""


def _nth(pattern: Any, index: int) -> Any:
    """Entry `index` of a repeating pattern; a single value is one of length one."""
    return pattern[index % len(pattern)] if isinstance(pattern, tuple) else pattern


BUDGETS = ("steps", "tokens", "epochs", "seconds")
"""The fields of `TrainingConfig` of which exactly one is set."""
