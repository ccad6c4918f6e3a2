"""What is read of an encoder's ``config.json`` and of the names of its tensors, and what is refused."""

from typing import Any

import pytest

from model.config import Encoder, ModelConfig, Rope
from model.families.registry import ENCODERS, from_hf
from model.fields import ConfigError
from model.sizes import Sizes, layout
from model.tensors.names import known_name
from tests.tiny_encoders import COMMON
from tests.tiny_encoders import ENCODERS as TINY


def with_(kind: str, without: tuple[str, ...] = (), **keys: Any) -> ModelConfig:
    config = {**COMMON, **TINY[kind], **keys}
    return from_hf({key: value for key, value in config.items() if key not in without})


def test_positions_begin_behind_the_pad() -> None:
    assert with_("bert").encoder == Encoder(token_types=2, positions=130)
    assert with_("xlm-roberta").encoder == Encoder(token_types=1, positions=132, first_position=2, pad_token_id=1)
    assert [with_(kind).context_length for kind in ("bert", "xlm-roberta", "modernbert")] == [130, 130, 130]
    assert with_("xlm-roberta", pad_token_id=4).context_length == 127


def test_two_ropes_and_windows() -> None:
    old, new = with_("modernbert"), with_("modernbert-mean")
    assert (old.rope, old.local_rope, old.window, old.sliding) == (Rope(4321.0), Rope(77.0), 11, (False, True, False))
    assert (new.rope, new.local_rope, new.window, new.sliding) == (Rope(3210.0), Rope(55.0), 21, (True, False, True))
    bare = with_(
        "modernbert", ("global_rope_theta", "local_rope_theta", "local_attention", "global_attn_every_n_layers")
    )
    assert (bare.rope, bare.local_rope, bare.window, bare.sliding) == (Rope(1.6e5), Rope(1e4), 65, (False, True, True))


@pytest.mark.parametrize("kind", TINY)
def test_classes_are_read_whatever_the_last_token_is(kind: str) -> None:
    config = with_(kind, num_labels=3)
    assert (config.classes, config.pad_token_id, config.tied_head) == (3, None, False)


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        ("bert", {"is_decoder": True}, "is_decoder=True .only False"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("bert", {"hidden_size": 50}, "hidden_size 50 is not a multiple"),
        ("xlm-roberta", {"pad_token_id": None}, "pad_token_id is null"),
        ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling is 'max'"),
        ("modernbert", {"classifier_activation": "gelu_new"}, "classifier_activation is 'gelu_tanh'"),
        ("modernbert", {"layer_types": ["full_attention"]}, "it must name 3 layers"),
        ("modernbert", {"new_setting": 7}, "new_setting=7"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(kind: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_(kind, **keys)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("bert.encoder.layer.3.output.LayerNorm.gamma", "encoder.layer.3.output.LayerNorm.weight"),
        ("bert.embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("roberta.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("classifier.dense.weight", "classifier.dense.weight"),
        ("model.layers.0.attn.Wqkv.weight", "model.layers.0.attn.Wqkv.weight"),
        ("layers.0.attn.Wqkv.weight", "model.layers.0.attn.Wqkv.weight"),
        ("embeddings.tok_embeddings.weight", "model.embeddings.tok_embeddings.weight"),
        ("final_norm.weight", "model.final_norm.weight"),
    ],
)
def test_tensors_have_the_family_s_names(name: str, known: str) -> None:
    assert known_name(name) == known
    tables = [family.weights(with_(kind, num_hidden_layers=4, layer_types=None)) for kind, family in TABLES]
    assert any(known in table for table in tables)


TABLES = [(family.model_type, family) for family in ENCODERS.values()]


def test_calls_hold_the_longest_sequence_and_no_prefixes() -> None:
    config = with_("modernbert", max_position_embeddings=8192)
    flat = layout(config, Sizes(), dtype="float32", implementation="native")
    assert (flat.longest, flat.ladder[-1].tokens, flat.sizes.chunks, flat.pool.shape[0]) == (8192, 8192, (), 1)
    assert [shape.tokens for shape in flat.ladder if shape.tokens > 1024] == [1536, 2048, 3072, 4096, 6144, 8192]
    bins = layout(config, Sizes(call_tokens=4096, large_calls=True), dtype="bfloat16", implementation="paged")
    assert max(shape.width for shape in bins.ladder) == 8192
    short = layout(config, Sizes(), dtype="float32", implementation="native", max_prompt_tokens=512)
    assert (short.longest, short.ladder[-1].tokens) == (512, 1024)
