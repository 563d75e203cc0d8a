"""Loading: a folder or a hub id becomes a trunk, a tokenizer and, for reward models, a head."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import field_validator, model_validator
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from palate.models import peft_format
from palate.models.heads import ActionHead, Head, HeadKind, ScalarHead
from palate.models.lora import merge
from palate.models.tokenizer import Tokenizer
from palate.models.trunk import Trunk
from palate.settings import PalateError, Settings, nearest

HEAD_WEIGHTS, HEAD_NOTE = "head.safetensors", "palate.json"
ACTING_FOLDER, ACTING_WEIGHTS, ACTING_NOTE = "heads", "heads.safetensors", "heads.json"
"""Values of actions have a folder of their own: servers read every weight file beside the model's as the model's."""

Use = Literal["policy", "trunk", "reward"]
"""What a model is loaded for. `policy` speaks: causal, with a language-model head and an end token. `trunk` is read
from: where a reward or value model starts. `reward` judges: a trunk with a head that was trained."""


class Loading(Settings):
    """How weights come into memory."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights; logits and losses are float32 in any case."""
    compute: Literal["bfloat16"] | None = None
    """bfloat16: training and rollouts multiply in bfloat16 while weights, their gradients and Adam stay float32. Left
    out, in the weights' own format."""
    device: str = "auto"
    """Where the weights go: auto takes the GPU where there is one, or write cpu, cuda, cuda:1."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """transformers' attention implementation, on padded rows; left out, rows are packed and nothing is padded."""
    cuda_graphs: bool = True
    """On a GPU, record a step of writing once and play it again, without Python and launches for every token."""
    make_causal: bool = False
    """Give an encoder family that can be a decoder (RoBERTa, BERT) its causal mask, so that it may be a policy."""
    end_token: str | None = None
    """The end-of-sequence token, for tokenizers that do not declare one."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third slower."""
    allow_pickle: bool = False
    """Read weights from pickle files (.bin), which can run any code of whoever wrote them."""

    @field_validator("device")
    @classmethod
    def _is_there(cls, device: str) -> str:
        """A run that would find no GPU after an hour of other stages is refused before it starts."""
        if device != "auto":
            _require_device(device)
        return device

    @model_validator(mode="after")
    def _has_masters(self) -> Loading:
        if self.compute is not None and self.dtype != "float32":
            raise ValueError(
                f"compute: {self.compute} is beside weights in float32, and dtype is {self.dtype}. "
                "Leave dtype out, or compute."
            )
        return self

    @property
    def place(self) -> torch.device:
        """The device meant by `device`."""
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(automatic if self.device == "auto" else self.device)


def _require_device(name: str) -> None:
    """ValueError for a device that this machine does not have, or that is none."""
    known = "Write auto, cpu, cuda or cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device is called {name!r}. {known}") from None
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and not count:
        raise ValueError(f"{name} was asked for, but torch finds no GPU here. Write auto or cpu, or mend the driver.")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"there is no {name}: this machine has {count} GPU{'s' * (count > 1)}, the first is cuda:0.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{name} was asked for, but torch cannot use it here. Write auto or cpu.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"palate does not train on {name!r}. {known}")


@dataclass(frozen=True)
class Loaded:
    """A model in memory. `head` is None unless the folder holds one; `source` says where it came from.

    `heads` are what a policy learnt of its actions' values, by role: `q1`, `target_q1`, `value` and their like.
    """

    trunk: Trunk
    tokenizer: Tokenizer
    head: ScalarHead | None
    source: str
    heads: Mapping[str, Head] = field(default_factory=dict[str, Head])


def load(path: str | Path, use: Use = "policy", how: Loading | None = None) -> Loaded:
    """The model in a local folder or under a hub id.

    A folder with a PEFT adapter is its base with the adapter merged. Raises PalateError for a missing folder, a
    folder without weights, pickle weights, weights that are missing (they would be random), a tokenizer of another
    model, a policy that sees the future or cannot end, and a reward model without a trained head.
    """
    how = how or Loading()
    path = str(path)
    folder = Path(path).expanduser()
    if (folder / peft_format.CONFIG).exists():
        return _adapted(folder, use, how)
    _check_folder(path, folder, how)
    with quiet(), _explained(path, how):
        tokenizer = _tokenizer(path, how)
        model, head = _model(path, folder, use, how)
        heads = load_acting(folder, model) if use == "policy" else {}
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    _check_vocabulary(path, tokenizer, rows)
    trunk = trunk_of(model, min(tokenizer.size, rows), how)
    if use == "policy":
        _check_policy(path, trunk, tokenizer)
    placed = {role: one.to(how.place) for role, one in heads.items()}
    return Loaded(trunk, tokenizer, head.to(how.place) if head else None, path, placed)


def trunk_of(model: PreTrainedModel, vocabulary: int, how: Loading) -> Trunk:
    """The model on its device as a trunk that runs as `how` says."""
    cast(nn.Module, model).to(how.place)
    trunk = Trunk(model, vocabulary)
    if how.attention is not None:  # what was asked for is what runs: on padded rows
        trunk.packs = False
    trunk.replays = how.cuda_graphs
    if how.compute is not None:
        trunk.compute = getattr(torch, how.compute)
    if how.checkpoint_activations:
        trunk.checkpoint_activations()
    return trunk


def _adapted(folder: Path, use: Use, how: Loading) -> Loaded:
    base = str(peft_format.read_config(folder).get("base_model_name_or_path") or "")
    if not base:
        raise PalateError(f"{folder / peft_format.CONFIG}: no base model is named. Write base_model_name_or_path.")
    beside = folder / base
    loaded = load(beside if beside.exists() else base, use, how)
    peft_format.load_adapter(loaded.trunk.model, "loaded", folder)
    merge(loaded.trunk.model, "loaded")
    loaded.trunk.requires_grad_(True)
    return loaded


def _check_folder(path: str, folder: Path, how: Loading) -> None:
    """Say what is wrong with a local folder before transformers tries; hub ids are left alone."""
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            near = _neighbour(folder)
            raise PalateError(f"{path}: no such folder.{near} Give a model folder or a hub id such as gpt2.")
        return
    if not (folder / "config.json").exists():
        raise PalateError(f"{path}: no config.json here. Give the folder that save_pretrained wrote.")
    if any(folder.glob("*.safetensors")):
        return
    if not any(folder.glob("*.bin")):
        raise PalateError(f"{path}: no weights (*.safetensors) here. Give the folder that save_pretrained wrote.")
    if not how.allow_pickle:
        raise PalateError(
            f"{path}: the weights are pickle files (.bin), which can run any code of whoever wrote them. "
            "Convert them to safetensors, or trust the author and set allow_pickle: true."
        )


@contextmanager
def quiet() -> Generator[None]:
    """transformers' reports and progress bars stay off: what is wrong is raised here instead."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _explained(path: str, how: Loading) -> Generator[None]:
    """transformers' own faults as one message. They come as many types, all of them about `path`."""
    try:
        yield
    except PalateError:
        raise
    except Exception as fault:  # a damaged or hostile folder makes transformers and torch raise anything
        said = str(fault).strip().splitlines()
        first = said[0][:200].rstrip(".") if said else type(fault).__name__
        if Path(path).expanduser().exists():
            raise PalateError(f"{path}: the model cannot be loaded: {first}. Check the folder's files.") from None
        weights = "" if how.allow_pickle else " Only safetensors weights are read unless allow_pickle is true."
        raise PalateError(
            f"{path}: neither a folder nor a model the hub gave us: {first}.{_neighbour(Path(path).expanduser())} "
            f"Check the spelling and the network (HF_HUB_OFFLINE forbids it).{weights}"
        ) from None


def _neighbour(missing: Path) -> str:
    """ " Did you mean 'model'?" where a folder of nearly that name is there."""
    beside = missing.parent
    return nearest(missing.name, [p.name for p in beside.iterdir() if p.is_dir()]) if beside.is_dir() else ""


def _tokenizer(path: str, how: Loading) -> Tokenizer:
    # AutoTokenizer overrules a declared generic class for some families (qwen2), and with it how text is split.
    generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    door: Any = PreTrainedTokenizerFast if generic else AutoTokenizer
    inner: Any = door.from_pretrained(path, trust_remote_code=False)
    if how.end_token is not None:
        if how.end_token not in inner.get_vocab():
            raise PalateError(f"{path}: the tokenizer has no token {how.end_token!r}. Set end_token to one it has.")
        inner.eos_token = how.end_token
    return Tokenizer(inner)


def _model(path: str, folder: Path, use: Use, how: Loading) -> tuple[PreTrainedModel, ScalarHead | None]:
    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if how.make_causal:
        config.is_decoder = True
    kind = str((getattr(config, "architectures", None) or [""])[0])
    judges = kind.endswith("ForSequenceClassification") or (folder / HEAD_NOTE).exists()
    if use == "policy" and judges:  # with tied embeddings its missing head would be filled in unnoticed
        raise PalateError(f"{path}: a reward model cannot be a policy. Give the folder of a language model.")
    if kind.endswith("ForSequenceClassification") and not (folder / HEAD_NOTE).exists():
        return _classifier(path, config, how)
    speaks = use == "policy" or (use == "trunk" and kind.endswith(("ForCausalLM", "LMHeadModel")))
    if use == "policy" and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise PalateError(
            f"{path}: {config.model_type} is an encoder: it reads a text whole, so it cannot write one token after "
            "another. Use it as a reward or value model, and a causal language model as the policy."
        )
    model = _weights(path, AutoModelForCausalLM if speaks else AutoModel, config, how)
    head = load_head(folder, int(config.get_text_config().hidden_size))
    if use == "reward" and (head is None or not head.trained):
        raise PalateError(
            f"{path}: no trained reward head here, so its scores would be noise. "
            "Train it with a reward stage first, or give the folder of one."
        )
    return model, head


def _weights(path: str, door: Any, config: Any, how: Loading) -> PreTrainedModel:
    """The model with every weight read; a weight that is not in the files is an error, not a random draw."""
    model, report = door.from_pretrained(
        path,
        config=config,
        dtype=getattr(torch, how.dtype),
        attn_implementation=how.attention,
        use_safetensors=None if how.allow_pickle else True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    pooler = getattr(model.base_model, "pooler", None)
    if isinstance(pooler, nn.Module):  # BERT-like poolers are not read by palate, and often not in the files
        model.base_model.pooler = None
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise PalateError(
            f"{path}: {len(missing)} weights are not in its files, for example {missing[0]}; they would be random. "
            "Give the folder as save_pretrained wrote it."
        )
    return model


def _classifier(path: str, config: Any, how: Loading) -> tuple[PreTrainedModel, ScalarHead]:
    """A sequence classifier with one output, written by other software: its score layer is our head."""
    model = _weights(path, AutoModelForSequenceClassification, config, how)
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise PalateError(
            f"{path}: a {config.model_type} classifier judges from its first token through layers of its own; palate "
            "reads the last token. Train a reward model from its base instead."
        )
    if score.out_features != 1:
        raise PalateError(f"{path}: this classifier has {score.out_features} outputs; a reward model has one.")
    head = ScalarHead(score.in_features)
    with torch.no_grad():
        head.last.weight.copy_(score.weight)
        head.last.bias.zero_()
        for bias in (p for name, p in score.named_parameters() if name == "bias"):
            head.last.bias.copy_(bias)
    head.trained = True
    return cast(PreTrainedModel, model.base_model), head


def load_head(folder: Path, width: int) -> ScalarHead | None:
    """The head that `save` left in the folder, or None when there is none."""
    note, weights = folder / HEAD_NOTE, folder / HEAD_WEIGHTS
    if not note.exists() or not weights.exists():
        return None
    facts = cast(dict[str, Any], json.loads(note.read_text(encoding="utf-8")))
    head = ScalarHead(width, facts["head"])
    head.load_state_dict(load_file(weights))
    head.trained = bool(facts["trained"])
    return head


def load_acting(folder: Path, model: PreTrainedModel) -> dict[str, Head]:
    """The heads that `palate.models.save.save_acting` left beside a policy, by role; none where there are none."""
    note = folder / ACTING_FOLDER / ACTING_NOTE
    if not note.exists():
        return {}
    facts = cast(dict[str, dict[str, Any]], json.loads(note.read_text(encoding="utf-8")))
    weights = load_file(note.with_name(ACTING_WEIGHTS))
    width = int(model.config.get_text_config().hidden_size)
    heads: dict[str, Head] = {}
    for role, fact in facts.items():
        tokens, kind = fact.get("tokens"), cast(HeadKind, fact.get("head", "mlp"))
        head = ScalarHead(width, kind) if tokens is None else ActionHead(width, int(tokens))
        head.load_state_dict({k.removeprefix(f"{role}."): w for k, w in weights.items() if k.startswith(f"{role}.")})
        heads[role] = head
    return heads


def _check_vocabulary(path: str, tokenizer: Tokenizer, rows: int) -> None:
    """Only the padding token may lie beyond the embedding table: it is never embedded."""
    beyond = {i for i in tokenizer.inner.get_vocab().values() if i >= rows} - {tokenizer.pad}
    if beyond:
        raise PalateError(
            f"{path}: the tokenizer knows {tokenizer.size} ids but the model embeds {rows}. "
            "Give the model its own tokenizer."
        )


def _check_policy(path: str, trunk: Trunk, tokenizer: Tokenizer) -> None:
    if not trunk.causal:
        raise PalateError(
            f"{path}: this {trunk.family} is bidirectional: its prediction of a token has seen that token, so as a "
            "policy it would learn nothing but to copy. Set make_causal: true, or use it as a reward model."
        )
    if not trunk.caches:
        raise PalateError(f"{path}: {trunk.family} keeps no keys and values, so palate cannot sample from it.")
    _ = tokenizer.end
