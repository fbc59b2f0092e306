"""The files of a model folder, which may come from anybody: what is read of them, and what is refused unread.

Nothing here builds a model. Sizes are compared with the headers of the weights, so that a configuration which asks for
more than there is costs a message, not the machine's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pertoken.errors import ModelError
from pertoken.files import plain_file, plain_files
from pertoken.text import names, reason, shown

__all__ = ["check_fallback", "count_weights", "read_json", "save_tokenizer", "weight_files", "write_json"]


_MOST_EXPERTS = 100_000  # a layer's may be one tensor, so their number does not show in that of the tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError."""
    try:
        values = json.loads(plain_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); name a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({reason(error)}); copy or download it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object; copy or download it again")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """As Hugging Face writes it. Raises OSError."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """`tokenizer.save_pretrained(folder)`. Raises OSError, for which the Rust of `tokenizers` has a bare Exception.

    Of several chat templates all are written into tokenizer_config.json, for a checkpoint has no folders.
    """
    several = isinstance(tokenizer.chat_template, dict)
    try:
        tokenizer.save_pretrained(folder, **({"save_jinja_files": False} if several else {}))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or several with an index. Raises ModelError where there is none, where
    there are pickles only, and where an index names anything but files of the folder itself."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise ModelError(f"{index}: weight_map is not an object of file names; copy or download it again")
        found = sorted(set(named.values()))
        outside = [name for name in found if not _is_file_name(name)]
        if outside or not found:
            raise ModelError(f"{index}: weight_map names {names(outside)}; it must name files of this folder alone")
        return [folder / name for name in found]
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise ModelError(
            f"{folder / pickled[0]}: pertoken does not unpickle model folders; convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ModelError(f"{folder}: no model.safetensors; name a folder with weights")


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def count_weights(files: list[Path]) -> tuple[int, int]:
    """(tensors, numbers in them) by the headers of safetensors files. Raises ModelError for files that are none."""
    tensors = numbers = 0
    for file in files:
        try:
            with safe_open(plain_file(file), framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    size = 1
                    for length in weights.get_slice(name).get_shape():
                        size *= length
                    tensors, numbers = tensors + 1, numbers + size
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read ({reason(error)}); copy or download it again") from None
    return tensors, numbers


def check_fallback(folder: Path) -> int:
    """The number of numbers in the weights of a folder that transformers is to open.

    Raises ModelError for what transformers would act on before it looks at a weight: more layers or experts than there
    can be, attention whose code is fetched from elsewhere, and an adapter, which names another model.
    """
    try:
        plain_files(folder)
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read ({error.strerror}); remove it") from None
    num_tensors, numbers = count_weights(weight_files(folder))
    path = folder / "config.json"
    for key, value in _items(read_json(path)):
        what = f"{path}: {names([key])}={shown(value)}"
        # max_window_layers says from which layer on windows would begin; transformers' own default is 28.
        counts_layers = "layer" in key and key != "max_window_layers"
        most = num_tensors if counts_layers else _MOST_EXPERTS if key.endswith("experts") else math.inf
        if isinstance(value, int) and value > most:
            raise ModelError(f"{what}: more than the {num_tensors} tensors in the weights can be; correct it")
        if key.endswith("attn_implementation") and "/" in str(value):
            raise ModelError(f"{what}: code from elsewhere, which is not fetched; take the key out")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: an adapter; merge it into its model and save that (PEFT's merge_and_unload)")
    return numbers


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
