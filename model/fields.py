"""Reading ``config.json`` of a Hugging Face checkpoint by allow-list.

A key that is not read could give wrong scores with no error. So each key is read, or ignored on purpose, or stands at
the value that changes nothing, or is one that the user says to skip; any other is refused by name.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast


class ConfigError(ValueError):
    """The config asks for something that is not implemented, or contradicts itself. The message names the keys."""


IGNORED = {
    # About the file.
    "architectures", "model_type", "transformers_version", "_name_or_path", "_commit_hash",
    "is_decoder",
    # What others make of a reranker: vLLM's keys for Qwen3-Reranker, and sentence-transformers' for a cross-encoder.
    # The prompt and what becomes of its logits are the service's.
    "is_original_qwen3_reranker", "classifier_from_token", "method",
    "sentence_transformers", "sbert_ce_default_activation_function",
    # Ours to choose.
    "torch_dtype", "dtype", "use_cache",
    # Read with the tensors, see ``model.tensors.quantised``.
    "quantization_config", "compression_config",
    # The tokenizer's, and generation's.
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    # The rest of what transformers 4 wrote for generation: _get_global_generation_defaults in configuration_utils.
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "typical_p", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "output_logits", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "renormalize_logits",
    "max_new_tokens", "generation_config", "cache_implementation",
    # What a call returns beside its logits, and how: PreTrainedConfig's.
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict",
    "keys_to_ignore_at_inference", "torchscript", "use_bfloat16", "tf_legacy_loss",
    # Which attention kernel the writer had; see also the prefixes below. The second is transformers 4.3x's, the others
    # are of models' own code.
    "attn_implementation", "_flash_attn_2_enabled", "use_flash_attention_2", "use_flash_attn",
    # Pipelines', tokenizers' and loaders' notes: PreTrainedConfig's, Unsloth's, and of the first conversions of Llama.
    # The number of tokens is max_position_embeddings, whatever max_sequence_length and the tokenizer say.
    "task_specific_params", "finetuning_task", "prefix", "tokenizer_class", "model_max_length", "max_sequence_length",
    "transformers.js_config", "is_llama_config",
    # Llama's in transformers 4: the matmuls were cut into so many parts and the results put together again.
    "pretraining_tp",
    # A classification head's.
    "id2label", "label2id", "num_labels", "problem_type",
    # Training's: dropouts, losses, and trainers' own settings.
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout",
    "router_aux_loss_coef", "loss_type", "neftune_noise_alpha", "use_liger_kernel", "gradient_checkpointing",
}  # fmt: skip
"""Keys that no scoring depends on, in any family."""

IGNORED_PREFIXES = (
    "unsloth_",  # Unsloth's: unsloth_version and unsloth_fixed say which program saved the model
    "_attn_implementation",  # transformers': the attention kernel, with endings _internal and _autoset
)
"""How more of them begin."""

NEUTRAL: Mapping[str, object] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    # What a model of the family has not, said by a config that has the key all the same.
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    # transformers' masks: every layer sees back alone.
    "is_causal": True,
    "use_bidirectional_attention": False,
}
"""Keys that may be present at the one value that changes nothing, in any family."""


class Fields:
    """A config that remembers which of its keys were read, so that the others can be refused.

    A null counts as absent: it is how transformers writes a setting that is off.

    Args:
        trusted: keys that the user says change nothing: they are skipped instead of refused. None: nobody was asked.

    Attributes:
        notes: what a user should know about how the config was read.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str = "config.json", *, trusted: Collection[str] | None = None
    ) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()
        self._where = where
        self._trusted = trusted
        self._read: set[str] = set()
        self.notes: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an integer of at least 1")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """An integer of at least 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an integer of at least 0")
        return value

    def integer_or_none(self, key: str, *, absent: int | None) -> int | None:
        """An integer, or None for null; ``absent`` where the key is not there."""
        if key in self._nulls or (absent is None and key not in self):
            self._read.add(key)
            return None
        return self.integer(key, absent)

    def id_or_none(self, key: str, *, absent: int | None) -> int | None:
        """A token's number, or None for null and for -1, which some configs have; ``absent`` without the key."""
        if key in self._nulls or (absent is None and key not in self):
            self._read.add(key)
            return None
        value = self._get(key, absent)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a token's number, or null")
        return value if value >= 0 else None

    def number_or_none(self, key: str, *, absent: float | None) -> float | None:
        """A number, or None for null; ``absent`` where the key is not there."""
        if key in self._nulls or (absent is None and key not in self):
            self._read.add(key)
            return None
        return self.number(key, absent)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a string")
        return value

    def texts(self, key: str, default: Sequence[str]) -> list[str]:
        value = self._get(key, list(default))
        if not isinstance(value, list) or not all(isinstance(text, str) for text in cast("list[object]", value)):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a list of strings")
        return cast("list[str]", value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Each above 0 and finite."""
        value = self._get(key, None)
        numbers = cast("list[object]", value) if isinstance(value, list) else [value]
        if not isinstance(value, list) or not all(
            isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < float("inf") for n in numbers
        ):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a list of finite numbers above 0")
        return tuple(float(cast(float, n)) for n in numbers)

    def size(self, key: str) -> int:
        """Entries of a nested object, at least 1."""
        value = self._get(key, None)
        if not isinstance(value, dict) or not value:
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an object with entries")
        return len(cast("dict[str, Any]", value))

    def group(self, key: str) -> "Fields":
        """The fields of a nested object."""
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an object")
        return Fields(cast("dict[str, Any]", value), f"{self._where}: {key}")

    def groups(self, key: str) -> "list[Fields]":
        """The fields of each object in a nested object."""
        inner = self.group(key)
        return [inner.group(name) for name, value in inner._values.items() if isinstance(value, dict)]

    def refuse_rest(self, *, ignored: Collection[str] = (), neutral: Mapping[str, object] | None = None) -> None:
        """Refuse every key that was not read, is not ignored, and is not at its neutral value.

        Raises:
            ConfigError: naming all of them with their values; or one that is to be skipped, and has been read.
        """
        neutral, trusted = neutral or {}, self._trusted or ()
        if known := sorted(self._read.intersection(trusted)):
            raise ConfigError(f"trust_config names {', '.join(known)}: keys that this program reads; leave them out")
        rest = {
            key: f"{key}={value!r}" + (f" (only {neutral[key]!r} is implemented)" if key in neutral else "")
            for key, value in sorted(self._values.items())
            if key not in self._read
            and key not in ignored
            and not key.startswith(IGNORED_PREFIXES)
            and not (key in neutral and neutral[key] == value)
        }
        if skipped := [words for key, words in rest.items() if key in trusted]:
            self.notes.append(f"keys of {self._where} that trust_config skips, unread: {'; '.join(skipped)}")
        if refused := [words for key, words in rest.items() if key not in trusted]:
            remedy = "" if self._trusted is None else ". Skip by trust_config only what you know to change no score"
            raise ConfigError(
                f"{self._where} has settings that this program does not implement, and that could change the scores: "
                + "; ".join(refused)
                + remedy
            )

    def _get(self, key: str, default: object) -> object:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise ConfigError(f"{self._where} lacks {key}")
        return value


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands.

    Raises:
        ConfigError: it is absent or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json; name a folder in Hugging Face layout") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}; it must be a JSON object")
    return cast("dict[str, Any]", config)
