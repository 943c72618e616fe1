"""A config.json of Hugging Face, read field by field, so that none that changes the result is passed over."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lm.config import InputError, ModelConfig
from lm.fields import nearest

Kind = TypeVar("Kind")

PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
PLAIN |= {"relu": "relu", "relu2": "relu2"}
"""Activations without a gate, as transformers and as we call them."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "scale_attn_by_inverse_layer_idx": (False,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Fields that change the result, with the values (None besides) at which they don't: refused at any other, unless the
family reads them."""

HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "attn_pdrop", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "decoder_start_token_id", "dtype",
    "embd_pdrop", "eos_token_id", "finetuning_task", "gradient_checkpointing", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "keys_to_ignore_at_inference", "label2id",
    "max_window_layers", "model_type", "n_ctx", "output_attentions", "output_hidden_states", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "sep_token_id",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
"""Fields that don't change what a model says of a text: dropout, how it was made, how it is cached or shown."""


class Fields:
    """The fields of a config.json over the defaults of its family."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: Path | str):
        self._values, self._defaults, self.where = values, defaults, where
        self._read: set[str] = set()

    def get(self, name: str, kind: type[Kind]) -> Kind:
        """A field that must have a value of its kind."""
        value = self.maybe(name, kind)
        if value is None:
            raise InputError(f"{self.where} has no {name}: the model can't be built without it")
        return value

    def maybe(self, name: str, kind: type[Kind]) -> Kind | None:
        """A field that may be null or, where its family has no default, absent: None then."""
        self._read.add(name)
        value = self._values.get(name, self._defaults.get(name))
        if kind is float and type(value) is int:
            value = float(value)
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if value is not None and type(value) is not kind:
            raise InputError(f"{self.where}: {name} is {value!r}, it must be of type {kind.__name__}")
        return value

    def choice(self, name: str, known: Mapping[str, str]) -> str:
        """What a field's value is called here, by a table of those that are implemented."""
        value = self.get(name, str)
        if value not in known:
            raise self.refuse(name, value, f"is not implemented{nearest(value, known)}; known are {', '.join(known)}")
        return known[value]

    def refuse(self, name: str, value: Any, why: str) -> InputError:
        """For the caller to raise: a value that isn't implemented."""
        return InputError(f"{self.where}: {name} {value!r} {why}")

    def check_rest(self, harmless: tuple[str, ...]) -> None:
        """Looks at the fields that nobody has read: refuses those that would change the result, warns of unknown ones
        that seem to say something."""
        rest = {name: value for name, value in self._values.items() if name not in self._read and value is not None}
        for name in harmless:
            rest.pop(name, None)
        for name, allowed in NEUTRAL.items():
            if name in rest and rest[name] not in allowed:
                raise self.refuse(name, rest[name], "changes the result and is not implemented for this architecture")
        known = HARMLESS | set(NEUTRAL)
        unknown = {
            name: value for name, value in rest.items() if name not in known and value not in (False, {}, [], "")
        }
        if unknown:
            listed = ", ".join(f"{name} = {value!r}" for name, value in sorted(unknown.items()))
            warnings.warn(f"{self.where}: fields that lm doesn't know and leaves out: {listed}", stacklevel=2)


def called(cfg: ModelConfig, known: Mapping[str, str]) -> str:
    """The family's name of the activation; another's where it has none, which the comparison then finds out."""
    return next((theirs for theirs, ours in known.items() if ours == cfg.activation), next(iter(known)))
