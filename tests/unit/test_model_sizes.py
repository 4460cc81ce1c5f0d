"""The sizes of models, from counts, classes, safetensors headers and Hugging Face's configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offload_opt import ConfigError
from offload_opt.model_sizes import load_model, of_count, parse_count

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
QWEN2_7B = {
    **LLAMA_3_8B,
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN3_8B = {
    **LLAMA_3_8B,
    "model_type": "qwen3",
    "head_dim": 128,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}


class Tiny(torch.nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, 3)
        self.tied = self.first
        self.frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("text", "count"),
    [("7B", 7 * 10**9), ("350m", 35 * 10**7), ("1.5e9", 15 * 10**8), ("12_000", 12000), ("2 T", 2 * 10**12)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "0", "-7B", "7X", "7GiB", "1e400", "1e99", "0.1"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a count"):
        parse_count(text)


def test_a_count_has_no_shapes() -> None:
    assert (of_count(5).numel, of_count(5).has_shapes) == (5, False)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        ({**LLAMA_3_8B, "model_type": "mistral", "vocab_size": 32000}, 7_241_732_096),
        (QWEN2_7B, 7_615_616_512),
        (QWEN3_8B, 8_190_735_360),
        (GPT2, 124_439_808),
    ],
)
def test_the_models_that_everybody_knows(tmp_path: Path, config: dict[str, Any], count: int) -> None:
    model = load_model(written(tmp_path / "config.json", config))
    assert model.numel == count
    assert load_model(str(tmp_path)) == model
    assert model.parameters[0].dtype == (torch.bfloat16 if "torch_dtype" in config else None)


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    tied = load_model(written(tmp_path / "config.json", {**LLAMA_3_8B, "tie_word_embeddings": True}))
    assert 8_030_261_248 - tied.numel == 128256 * 4096


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**LLAMA_3_8B, "model_type": "mixtral"}, "model_type 'mixtral', whose parameters are not known here"),
        ({}, "model_type None"),
        ({**LLAMA_3_8B, "hidden_size": None}, "hidden_size is missing"),
        ({**LLAMA_3_8B, "vocab_size": "many"}, "vocab_size is 'many', not a positive number"),
        ({**LLAMA_3_8B, "attention_bias": 3}, "attention_bias is 3, not true or false"),
        ("{", "is not JSON"),
        ([1], "is not a JSON object"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_model(written(tmp_path / "config.json", content))


def test_a_class_is_made_without_memory() -> None:
    name = f"{__name__}:Tiny"
    model = load_model(name)
    assert [p.shape for p in model.parameters] == [(3, 4), (3,)]
    assert load_model(name, {"width": 10**6}).numel == 3 * 10**6 + 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:Tiny", "No module named"),
        (f"{__name__}:Tinny", "has no attribute 'Tinny'"),
        (f"{__name__}:written", r"cannot be made on the meta device: TypeError.*It takes \(path"),
        ("collections:OrderedDict", "makes a OrderedDict, not a torch.nn.Module"),
        ("torch.nn:ReLU", "has no floating-point parameters"),
        ("nothing/of/the.sort", "neither a file or folder that exists nor a class"),
    ],
)
def test_classes_that_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_model(name)


def test_arguments_are_for_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="arguments are for a class"):
        load_model(written(tmp_path / "config.json", GPT2), {"width": 1})


def test_safetensors_files_shards_and_indices(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(3, 4, dtype=torch.bfloat16), "n": torch.zeros(9, dtype=torch.int64)},
        tmp_path / "1.safetensors",
    )
    save_file({"b": torch.zeros(5)}, tmp_path / "2.safetensors")
    one = load_model(str(tmp_path / "1.safetensors"))
    assert [(p.name, p.shape, p.dtype) for p in one.parameters] == [("a", (3, 4), torch.bfloat16)]
    assert load_model(str(tmp_path)).numel == 17
    index = {"weight_map": {"a": "1.safetensors", "n": "1.safetensors"}}
    name = written(tmp_path / "model.safetensors.index.json", index)
    assert load_model(name).numel == load_model(str(tmp_path)).numel == 12


def test_files_that_are_refused(tmp_path: Path) -> None:
    for name, content, said in (
        ("a.safetensors", "version https://git-lfs.github.com/spec/v1", "no whole safetensors file"),
        ("model.safetensors.index.json", {"weight_map": {"a": "gone.safetensors"}}, "no whole safetensors file"),
        ("b.index.json", {}, "it has no weight_map"),
        ("weights.bin", "", "neither a .safetensors file"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_model(written(tmp_path / name, content))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.safetensors file and no config\.json"):
        load_model(str(tmp_path / "empty"))
