"""GGUF -> Hugging Face folder: a tiny model there and back, and the demo model's tokenizer."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from model.config import Rope
from model.families.registry import from_hf
from model.fields import read_config
from model.gguf.convert import GgufError, convert, main
from model.gguf.tokenizer import PRES
from serve_app.model_source import resolve
from tests.tiny import SPECIALS, make_llama, write_json
from tests.tiny_families import config_of, make_family
from tests.tiny_gguf import SENTENCEPIECE, Edit, write_gemma3_gguf, write_gguf


def tiny(folder: Path, **options: Any) -> Path:
    return make_llama(folder / "source", tokenizer=True, layers=1, vocab=271, **options)


def converted(folder: Path, path: Path) -> Path:
    said: list[str] = []
    convert(path, folder / "made", say=said.append)
    assert said[0].startswith("converting: 0 of ")
    return folder / "made"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_there_and_back(tmp_path: Path, tied: bool, biases: bool) -> None:
    """Tensors bit for bit, q and k unpermuted (their biases too), and every size and constant of the config."""
    source = tiny(tmp_path, tied=tied, attention_bias=biases, mlp_bias=biases)
    made = converted(tmp_path, write_gguf(source, tmp_path / "x.gguf"))
    expected, found = load_file(source / "model.safetensors"), load_file(made / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    assert from_hf(read_config(made)) == from_hf(read_config(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source", "x.gguf"]


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_quantised_tensors_are_expanded(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    source = tiny(tmp_path, width=64, heads=4, kv_heads=2, head_width=16, ff=96)
    found = load_file(
        converted(tmp_path, write_gguf(source, tmp_path / "x.gguf", quantised=kind)) / "model.safetensors"
    )
    for name, tensor in load_file(source / "model.safetensors").items():
        expected = dequantize(quantize(tensor, kind), kind) if tensor.ndim == 2 else tensor
        assert found[name].dtype == np.float32
        # Blocks lie within a row, so that permuting rows and quantising commute.
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def tiny_gemma(folder: Path) -> Path:
    """A tiny Gemma 3. The constants that are not in its GGUF file have the values of all published models."""
    source = make_family(folder / "source", "gemma3")
    config = config_of("gemma3") | {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    write_json(source / "config.json", config | {"query_pre_attn_scalar": config["head_dim"]})
    return source


def test_gemma_3_there_and_back(tmp_path: Path) -> None:
    source = tiny_gemma(tmp_path)
    made = converted(tmp_path, write_gemma3_gguf(source, tmp_path / "x.gguf"))
    expected, found = load_file(source / "model.safetensors"), load_file(made / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # A norm's scale is stored with 1 added, which rounds it.
        atol = 1e-7 if name.endswith("norm.weight") else 0
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=atol, err_msg=name)
    assert from_hf(read_config(made)) == from_hf(read_config(source))


def test_a_tokenizer_of_sentencepiece_type(tmp_path: Path) -> None:
    made = converted(tmp_path, write_gemma3_gguf(tiny_gemma(tmp_path), tmp_path / "x.gguf"))
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    for text, tokens in {
        " the": ["▁the"],
        "then": ["t", "he", "n"],
        " in\n\n": ["▁in", "\n\n"],
        "a    b": ["a", "   ", "▁", "b"],
        "é": ["<0xC3>", "<0xA9>"],
        "": [],
    }.items():
        encoded = tokenizer.encode(text)
        assert encoded.tokens == ["<bos>", *tokens]
        assert encoded.ids == [SENTENCEPIECE.index(token) for token in encoded.tokens]
        assert tokenizer.decode(encoded.ids) == text


def test_absent_keys_and_linear_rope(tmp_path: Path) -> None:
    def edit(keys: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        for key in ("vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length"):
            del keys[f"llama.{key}"]
        del keys["llama.rope.freq_base"]
        keys["llama.rope.scaling.type"] = "linear"
        keys["llama.rope.scaling.factor"] = 2.5

    source = tiny(tmp_path, heads=6, kv_heads=6, head_width=8)
    config = from_hf(read_config(converted(tmp_path, write_gguf(source, tmp_path / "x.gguf", edit=edit))))
    assert (config.vocab_size, config.kv_heads, config.head_width) == (271, 6, 8)
    assert config.rope == Rope(10_000.0, "linear", 2.5)


def test_the_tokenizer_of_the_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny(tmp_path)
    made = converted(tmp_path, write_gguf(source, tmp_path / "x.gguf"))
    tokenizer, original = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (made, source))
    for text in (" Yes the 你好🙂 hours\n\n", "", "<|im_start|>user\nthe<|im_end|>", "  in  "):
        assert tokenizer.encode(text).ids == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    fast = AutoTokenizer.from_pretrained(made)
    assert (fast.bos_token, fast.eos_token, fast.chat_template) == (*SPECIALS[1:], "{{ messages }}")
    assert fast(" Yes the").input_ids == original.encode(" Yes the").ids


@pytest.mark.parametrize(("pre", "says", "adds"), [
    ("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False),
])  # fmt: skip
def test_bos_is_added_as_the_file_says(tmp_path: Path, pre: str, says: bool | None, adds: bool) -> None:
    def edit(keys: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        keys["tokenizer.ggml.pre"] = pre
        if says is not None:
            keys["tokenizer.ggml.add_bos_token"] = says

    made = converted(tmp_path, write_gguf(tiny(tmp_path), tmp_path / "x.gguf", edit=edit))
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    plain = tokenizer.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("the").ids == ([1, *plain] if adds else plain)


@pytest.mark.parametrize("bos", [True, False])
def test_an_end_is_added_where_the_file_says_so(tmp_path: Path, bos: bool) -> None:
    def edit(keys: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        keys["tokenizer.ggml.add_bos_token"] = bos
        keys["tokenizer.ggml.add_eos_token"] = True

    made = converted(tmp_path, write_gguf(tiny(tmp_path), tmp_path / "x.gguf", edit=edit))
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    plain = tokenizer.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("the").ids == [*([1] if bos else []), *plain, 2]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "It's 2026 now", ["It", "'s", "Ġ", "2", "0", "2", "6", "Ġnow"]),
        ("smollm", "a  b½", ["a", "Ġ", "Ġb", "Â½"]),
        ("llama-bpe", "It's 12345 now", ["It", "'s", "Ġ", "123", "45", "Ġnow"]),
        ("llama-bpe", "I'LL (say)\n\n x", ["I", "'LL", "Ġ(", "say", ")ĊĊ", "Ġx"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in PRES[pre].steps().pre_tokenize_str(text)] == pieces


def set_key(key: str, value: Any) -> Edit:
    return lambda keys, _: keys.update({key: value})


def drop_key(key: str) -> Edit:
    return lambda keys, _: keys.pop(key)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (set_key("general.architecture", "qwen9"), ["'qwen9'", "known: llama, mistral3, qwen2"]),
        (set_key("llama.expert_count", 8), ["llama.expert_count"]),
        (set_key("llama.attention.head_count_kv", [2, 3]), ["llama.attention.head_count_kv", "between layers"]),
        (set_key("llama.rope.dimension_count", 4), ["llama.rope.dimension_count is 4", "10"]),
        (set_key("llama.attention.value_length", 12), ["llama.attention.value_length is 12", "10"]),
        (set_key("llama.rope.scaling.type", "dynamic"), ["'dynamic'", "known: none, linear, yarn"]),
        (drop_key("llama.block_count"), ["llama.block_count is missing"]),
        (set_key("tokenizer.ggml.model", "bert"), ["'bert'", "known: gpt2, llama"]),
        (set_key("tokenizer.ggml.pre", "kimi-k2"), ["'kimi-k2'", "llama-bpe", "qwen2", "smollm", "tekken"]),
        (drop_key("tokenizer.ggml.merges"), ["tokenizer.ggml.merges is missing"]),
        (lambda _, tensors: tensors.update({"blk.0.ffn_sub_norm.weight": np.ones(5, np.float32)}), ["'blk.0.ffn_sub"]),
    ],
)
def test_refused_by_name(tmp_path: Path, edit: Edit, named: list[str]) -> None:
    path = write_gguf(tiny(tmp_path), tmp_path / "x.gguf", edit=edit)
    with pytest.raises(GgufError) as refusal:
        convert(path, tmp_path / "made")
    for word in named:
        assert word in str(refusal.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (set_key("gemma3.attn_logit_softcapping", 30.0), ["gemma3.attn_logit_softcapping"]),
        (drop_key("gemma3.attention.sliding_window"), ["gemma3.attention.sliding_window is missing"]),
        (set_key("tokenizer.ggml.remove_extra_whitespaces", True), ["tokenizer.ggml.remove_extra_whitespaces is set"]),
    ],
)
def test_gemma_3_refused_by_name(tmp_path: Path, edit: Edit, named: list[str]) -> None:
    path = write_gemma3_gguf(tiny_gemma(tmp_path), tmp_path / "x.gguf", edit=edit)
    with pytest.raises(GgufError) as refusal:
        convert(path, tmp_path / "made")
    for word in named:
        assert word in str(refusal.value)


def test_a_quantisation_that_is_not_known_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("model.gguf.convert.dequantize", unknown)
    path = write_gguf(tiny(tmp_path), tmp_path / "x.gguf")
    with pytest.raises(GgufError, match="quantisation F32"):
        convert(path, tmp_path / "made")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "x.gguf"]


@pytest.mark.parametrize("fraction", [0, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, fraction: float) -> None:
    path = write_gguf(tiny(tmp_path), tmp_path / "x.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(GgufError, match=r"x\.gguf is not a whole GGUF file"):
        convert(path, tmp_path / "made")


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(tmp_path / "x.gguf", tmp_path / "made")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tiny(tmp_path), tmp_path / "x.gguf")
    assert main([str(path), str(tmp_path / "made")]) == 0
    assert "converting: 0 of" in capsys.readouterr().out
    assert main([str(path), str(tmp_path / "made")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([str(tmp_path / "absent.gguf"), str(tmp_path / "other")]) == 1
    assert "absent.gguf" in capsys.readouterr().err


def test_the_conversion_loads_no_jax() -> None:
    code = "import sys, model.gguf.convert; print(sorted({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.demo
def test_the_tokenizer_of_the_demo_model() -> None:
    """The fixed workloads store these ids with their scores: each digit is a token, the space before it too."""
    folder = resolve("demo")
    assert from_hf(read_config(folder)).vocab_size == 49152
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, ids in {
        " Yes": [9230],
        " No": [2838],
        "\nItem: x96 x81This', b'\nAnswer:": [
            198, 12659, 42, 1792, 41, 38, 1792, 40, 33, 1348, 923, 278, 23, 198, 21350, 42,
        ],
        "\nDocument: oct: 0:o ; bin: 0:b \".format(42) 'int: 42;\nAnswer:": [
            198, 24217, 42, 14530, 42, 216, 32, 42, 95, 8544, 10047, 42, 216, 32, 42, 82, 14626, 3477, 24, 36, 34, 25,
            637, 591, 42, 216, 36, 34, 43, 198, 21350, 42,
        ],
        "<|im_start|><|im_end|>": [1, 2],
    }.items():  # fmt: skip
        assert tokenizer.encode(text).ids == ids
