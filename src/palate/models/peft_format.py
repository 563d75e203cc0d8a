"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palate.models.lora import adapted, adapter_names, attach, freeze_trunk, target_paths
from palate.parallel import whole
from palate.settings import PalateError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNREAD = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices")


def adapter_tensors(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The adapter's weights under PEFT's names; every rank has to ask, sharded ones come whole."""
    tensors: dict[str, Tensor] = {}
    for path, _, low_rank in adapted(model, name):
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = whole(low_rank.a).detach().contiguous().cpu()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = whole(low_rank.b).detach().contiguous().cpu()
    return tensors


def save_adapter(
    model: PreTrainedModel,
    name: str,
    folder: Path,
    base: str,
    task: str = "CAUSAL_LM",
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapter so that PEFT (and vLLM) load it on `base`, a folder or hub id.

    `tensors` are what `adapter_tensors` gave, where several ranks had to bring them together first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers: dict[str, bool] = {}
    rank, scale = 0, 0.0
    for path, layer, low_rank in adapted(model, name):
        layers[path] = isinstance(layer, Conv1D)
        rank, scale = low_rank.a.shape[0], low_rank.scale
    if not layers:
        raise PalateError(f"adapter {name!r}: the model has {sorted(adapter_names(model)) or 'none'}. Name one it has.")
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layers.values()),
        "inference_mode": True,
        "target_modules": _short_names(model, list(layers)),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors or adapter_tensors(model, name), folder / WEIGHTS, metadata={"format": "pt"})


def _short_names(model: PreTrainedModel, paths: list[str]) -> list[str]:
    """Last parts of the paths (`q_proj`) when they name exactly these layers, whole paths otherwise."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    linear = [path for path, module in model.named_modules() if hasattr(module, "weight")]
    return short if sorted(p for p in linear if p.rpartition(".")[2] in short) == sorted(paths) else paths


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked. Raises PalateError for anything but plain LoRA."""
    try:
        config = cast(dict[str, Any], json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError) as fault:
        raise PalateError(f"{folder / CONFIG}: cannot be read: {fault}. Save the adapter again.") from None
    if config.get("peft_type") != "LORA":
        raise PalateError(f"{folder}: {config.get('peft_type')} adapters are not read. Merge it with PEFT first.")
    used = [k for k in _UNREAD if config.get(k)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if used:
        raise PalateError(f"{folder}: the adapter uses {', '.join(used)}, which is not read. Merge it with PEFT first.")
    return config


def load_adapter(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Put PEFT's adapter in `folder` on the model under `name`. Raises PalateError when it does not fit."""
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as fault:
        raise PalateError(f"{folder / WEIGHTS}: cannot be read: {fault}. Save the adapter as safetensors.") from None
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    known = set(target_paths(model, "all-linear"))
    paths = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors})
    for path in paths:
        if path not in known:
            raise PalateError(f"{folder}: the adapter wants a layer {path!r} that is not here. Load its own base.")
    freeze_trunk(model)
    for path in paths:
        low_rank = attach(model, path, name, rank, scale)
        for part, parameter in (("A", low_rank.a), ("B", low_rank.b)):
            value = tensors[f"{_PREFIX}{path}.lora_{part}.weight"]
            if value.shape != parameter.shape:
                raise PalateError(
                    f"{folder}: {path} is {tuple(value.shape)} in the adapter and {tuple(parameter.shape)} here. "
                    "Load the base that the adapter was trained on."
                )
            parameter.data.copy_(value)
