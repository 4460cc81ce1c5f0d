"""The sizes of a model's parameters, from what a person has at hand: a count, a class, or files. Reads no weights."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConfigError

_SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_MOST = 10**14
# Of safetensors; what is not among them (packed 4-bit weights, for example) is not trained by a torch optimizer.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_CONFIG_BYTES = 1 << 20

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter that is trained. ``dtype`` is the model's own; None: nothing says it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """The parameters of a model, and in words where they are from."""

    source: str
    parameters: tuple[Parameter, ...]
    has_shapes: bool = True
    """False: there is one parameter, which stands for all."""

    @property
    def numel(self) -> int:
        """Of all parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)


def parse_count(text: str, most: int = _MOST) -> int:
    """``"7B"``, ``"350M"``, ``"1.5e9"`` as a number. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?(?:[eE]\d+)?)\s*([A-Za-z]?)\s*", text)
    if match and match[2].upper() in _SCALES:
        with contextlib.suppress(ValueError, OverflowError):
            count = round(float(match[1]) * _SCALES[match[2].upper()])
            if 1 <= count <= most:
                return count
    raise ConfigError(f"{text!r} is not a count: write a number, or one with K, M, B or T, for example 7B")


def of_count(count: int) -> Model:
    """A model of which only the size is known."""
    return Model("a count alone", (Parameter("all parameters", (count,)),), has_shapes=False)


def load_model(text: str, arguments: Mapping[str, Any] | None = None) -> Model:
    """What ``text`` names: a class (``package.module:Class``), a ``.safetensors`` file or index, a ``config.json``, or
    a folder with such files.

    Args:
        text: The name.
        arguments: What a class is called with.

    Raises:
        ConfigError: It names nothing of these, or cannot be read; the message says why.
    """
    path = Path(text)
    if not path.exists() and re.fullmatch(r"[\w.]+:[\w.]+", text):
        return _of_class(text, arguments or {})
    if arguments is not None:
        raise ConfigError(f"arguments are for a class (package.module:Class), and {text!r} is none")
    if not path.exists():
        raise ConfigError(
            f"{text!r} is neither a file or folder that exists nor a class: write package.module:Class, or the path of "
            "a .safetensors file, a folder with some, or a config.json"
        )
    try:
        return _of_folder(path) if path.is_dir() else _of_file(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _of_class(text: str, arguments: Mapping[str, Any]) -> Model:
    module_name, _, names = text.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the command is not started by `python -m`, which has it there
    try:
        made: Any = importlib.import_module(module_name)
        for name in names.split("."):
            made = getattr(made, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{text} cannot be found: {error}") from error
    try:
        with torch.device("meta"):
            module = made(**arguments)
    except Exception as error:  # whatever somebody's code raises
        shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        hint = ""
        with contextlib.suppress(TypeError, ValueError):
            hint = f". It takes {inspect.signature(made)}: give them as --model-args, a JSON object"
        raise ConfigError(
            f"{text}({shown}) cannot be made on the meta device: {type(error).__name__}: {error}{hint}"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"{text} makes a {type(module).__name__}, not a torch.nn.Module")
    found = tuple(Parameter(n, tuple(p.shape), p.dtype) for n, p in module.named_parameters() if p.requires_grad)
    return _checked(Model(f"{text}, made on the meta device", found), text)


def _of_folder(folder: Path) -> Model:
    indices, shards = (sorted(folder.glob(pattern)) for pattern in ("*.safetensors.index.json", "*.safetensors"))
    if len(indices) == 1:
        return _of_index(indices[0])
    if shards:
        return _of_safetensors(shards, str(folder))
    if (folder / "config.json").is_file():
        return _of_config(folder / "config.json")
    raise ConfigError(f"{folder} has no .safetensors file and no config.json")


def _of_file(path: Path) -> Model:
    if path.name.endswith(".safetensors"):
        return _of_safetensors([path], str(path))
    if path.name.endswith(".index.json"):
        return _of_index(path)
    if path.suffix == ".json":
        return _of_config(path)
    raise ConfigError(f"{path} is neither a .safetensors file, nor an index of some, nor a config.json")


def _of_index(path: Path) -> Model:
    names = _read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{path} is no index of safetensors files: it has no weight_map")
    return _of_safetensors([path.parent / name for name in sorted(set(names.values()))], str(path))


def _of_safetensors(paths: list[Path], source: str) -> Model:
    found = []
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() in _DTYPES:
                        found.append(Parameter(name, tuple(part.get_shape()), _DTYPES[part.get_dtype()]))
        except (SafetensorError, FileNotFoundError) as error:
            raise ConfigError(f"{path} is no whole safetensors file: {error}") from error
    files = f" ({len(paths)} files)" if len(paths) > 1 else ""
    return _checked(Model(f"the floating-point tensors of {source}{files}", tuple(found)), source)


def _checked(model: Model, source: str) -> Model:
    if not model.numel:
        raise ConfigError(f"{source} has no floating-point parameters to train")
    return model


# Hugging Face's config.json, of the architectures whose parameters follow from it.


def _of_config(path: Path) -> Model:
    config = _read_json(path)
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"{path} is of model_type {kind!r}, whose parameters are not known here: only those of "
            f"{', '.join(_ARCHITECTURES)} are. Name the model's .safetensors files or its class, or give --parameters"
        )
    named = config.get("torch_dtype", config.get("dtype"))
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    dtype = dtype if dtype in _DTYPES.values() else None
    shapes = _ARCHITECTURES[kind](_Keys(config, path))
    return Model(f"{path} ({kind})", tuple(Parameter(name, shape, dtype) for name, shape in shapes))


class _Keys:
    """The keys of a config.json, checked as they are asked for."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self._config = config
        self._path = path

    def number(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            wrong = "is missing" if value is None else f"is {value!r:.40}, not a positive number"
            raise ConfigError(f"{self._path}: {name} {wrong}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._config.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._path}: {name} is {value!r:.40}, not true or false")
        return value


def _llama(keys: _Keys, *, qkv_bias: bool = False, head_norms: bool = False) -> Shapes:
    hidden, inner, vocab = (keys.number(name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = keys.number("num_attention_heads")
    head = keys.number("head_dim", max(hidden // heads, 1))
    queries, values = heads * head, keys.number("num_key_value_heads", heads) * head
    all_bias, mlp_bias = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    yield "embed_tokens.weight", (vocab, hidden)
    for layer in range(keys.number("num_hidden_layers")):
        at = f"layers.{layer}"
        for name, rows, columns, bias in (
            ("q_proj", queries, hidden, qkv_bias or all_bias),
            ("k_proj", values, hidden, qkv_bias or all_bias),
            ("v_proj", values, hidden, qkv_bias or all_bias),
            ("o_proj", hidden, queries, all_bias),
            ("gate_proj", inner, hidden, mlp_bias),
            ("up_proj", inner, hidden, mlp_bias),
            ("down_proj", hidden, inner, mlp_bias),
        ):
            yield f"{at}.{name}.weight", (rows, columns)
            if bias:
                yield f"{at}.{name}.bias", (rows,)
        for name in ("q_norm", "k_norm") if head_norms else ():
            yield f"{at}.{name}.weight", (head,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", (hidden,)
    yield "norm.weight", (hidden,)
    if not keys.flag("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, hidden)


def _gpt2(keys: _Keys) -> Shapes:
    hidden = keys.number("n_embd")
    inner = keys.number("n_inner", 4 * hidden)
    yield "wte.weight", (keys.number("vocab_size"), hidden)
    yield "wpe.weight", (keys.number("n_positions"), hidden)
    for layer in range(keys.number("n_layer")):
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            yield f"h.{layer}.{name}.weight", (rows, columns)
            yield f"h.{layer}.{name}.bias", (columns,)
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            yield f"h.{layer}.{name}", (hidden,)
    yield "ln_f.weight", (hidden,)
    yield "ln_f.bias", (hidden,)
    if not keys.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (keys.number("vocab_size"), hidden)


_ARCHITECTURES: dict[str, Callable[[_Keys], Shapes]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": lambda keys: _llama(keys, qkv_bias=True),
    "qwen3": lambda keys: _llama(keys, head_norms=True),
    "gpt2": _gpt2,
}


def _read_json(path: Path) -> dict[str, Any]:
    limit = _MAX_CONFIG_BYTES if path.name == "config.json" else 64 * _MAX_CONFIG_BYTES
    if path.stat().st_size > limit:
        raise ConfigError(f"{path} is larger than such a file is")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content
