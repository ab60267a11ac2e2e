"""Loading a student: found, read, made a function of its tokens alone, and proven; or refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lite_mentor import attention
from lite_mentor.assets import published, resolve_student, scratch_folder, source_of
from lite_mentor.device import compute_dtype, memory_left
from lite_mentor.errors import UserError
from lite_mentor.proof import prove
from lite_mentor.student import Student
from lite_mentor.tiny import tiny_student, tiny_tokenizer


def load_student(
    name: str,
    *,
    quant: str = "nf4",
    lora_rank: int = 16,
    lora_alpha: int = 32,
    device: str = "cpu",
    dtype: str = "auto",
    seed: int = 0,
    gradient_checkpointing: bool = False,
    rollout_weights: str = "auto",
    context: int | None = None,
) -> Student:
    """The student that `name` means (a folder, a hub id, `smollm2-135m` or `tiny`), with fresh adapters from `seed`.

    No sequence will have more than `context` tokens; by default, than the model was made for. A GPU becomes the
    process's current one: streams, graphs, generators and events then belong to it. Raises UserError when the student
    cannot be had, does not fit, or computes something that the trainer would not reproduce.
    """
    compute = compute_dtype(device, dtype)
    if quant == "nf4":
        _check_bitsandbytes()
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    try:
        model, tokenizer, origin = _load(name, quant, device, compute, gradient_checkpointing)
        how = dict(lora_rank=lora_rank, lora_alpha=lora_alpha, rollout_weights=rollout_weights)
        return _take_over(model, tokenizer, context, seed, name=name, **origin, **how)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--student {name} does not fit on {device}; take a smaller one, --quant nf4 or --rollout-weights "
            "unmerged. " + memory_left(device)
        ) from error


def _load(
    name: str, quant: str, device: str, compute: torch.dtype, gradient_checkpointing: bool
) -> tuple[PreTrainedModel, object, dict[str, str]]:
    """The model, its tokenizer, and where they came from."""
    # cuDNN's attention builds a plan for every length, which costs more than it saves where each row has another one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    with _without_bars():
        if name == "tiny":
            with scratch_folder() as scratch:
                model, tokenizer = _read(tiny_student(scratch), name, quant, device, compute)
            origin = dict(source="random weights", published=name)
        else:
            folder = resolve_student(name)
            model, tokenizer = _read(folder, name, quant, device, compute)
            origin = dict(source=source_of(folder), published=published(name, folder))
    if gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        # Without dropout there is no randomness to replay, and a CUDA graph could not read the generator's state.
        enable({"use_reentrant": False, "preserve_rng_state": False})
    # Training mode, for good. Checkpointing needs it, and on a CPU bitsandbytes repacks the 4-bit weights of a module
    # in evaluation mode, in place, into a layout that has no backward: gradients would silently be wrong.
    model.train()
    _silence(model)
    return model, tokenizer, origin


def _take_over(model: PreTrainedModel, tokenizer, context: int | None, seed: int, **how) -> Student:
    """The student made of a model, proven. Whatever the model's own code raises on the way becomes a sentence."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            student = Student(model, tokenizer, context=fix_rotary(model, context), **how)
        prove(student, context or student.context or getattr(student.config, "max_position_embeddings", 2048))
        if student.device.type == "cuda":  # what the proof took counts as free again
            torch.cuda.empty_cache()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model that was not written for this may fail in any way
        raise UserError(
            f"The student {how['name']} ({model.config.model_type}) cannot be trained here: its own code fails under "
            f"this trainer's attention and adapters ({type(error).__name__}: {_reason(error)}); choose a Llama, Qwen2, "
            "Qwen3 or Gemma3 model."
        ) from error
    return student


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A student's tokenizer alone. Raises UserError."""
    if name == "tiny":
        return tiny_tokenizer()
    folder = resolve_student(name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # broken files may fail in any way
        raise UserError(
            f"--student {name}: its tokenizer cannot be loaded from {folder} ({_reason(error)}); it must hold "
            "tokenizer.json and tokenizer_config.json, or be a model of the hub that does."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what it says, and its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


def _check_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        raise UserError(
            f"--quant nf4 needs bitsandbytes, which cannot be imported ({error}); pip install bitsandbytes, or give "
            "--quant none."
        ) from error


def _read(folder: Path, name: str, quant: str, device: str, dtype: torch.dtype):
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"--student {name}: {folder} holds an adapter (adapter_config.json), which would be left out; merge it "
            "into its model (PEFT's merge_and_unload) and give the result, or take the adapter's files away."
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization if quant == "nf4" else None,
            attn_implementation=attention.NAME,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # broken files, and a model's own code, may fail in any way
        if isinstance(error, KeyError) and error.args == (attention.NAME,):
            raise UserError(
                f"--student {name}: the code of this kind of model has no place for another attention than its own; "
                "choose a Llama, Qwen2, Qwen3 or Gemma3 model."
            ) from error
        raise UserError(
            f"--student {name} cannot be loaded from {folder} ({_reason(error)}); it must hold config.json, "
            "tokenizer.json and model.safetensors of a causal language model."
        ) from error
    # Transformers would fill in what is missing with random numbers, and quantise a matrix of any shape.
    damaged = {str(key) for key in info["missing_keys"]} | {key for key, *_ in info["mismatched_keys"]}
    for module_name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            damaged.add(f"{module_name}.weight")
    if damaged:
        raise UserError(
            f"--student {name}: in {folder}, {len(damaged)} tensors are missing or have the wrong shape, such as "
            f"{min(damaged)}; download or export the model again."
        )
    _check_tokens(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    return model, tokenizer


def _check_tokens(tokenizer, rows: int, name: str) -> None:
    """Raise UserError for a token that text can hold and the embedding, of so many rows, cannot.

    Gemma 3 has one behind its rows: it is special, and its template never writes it.
    """
    added, template = tokenizer.added_tokens_decoder, str(tokenizer.chat_template)
    for token, i in tokenizer.get_vocab().items():
        if i >= rows and not (i in added and added[i].special and token not in template):
            raise UserError(
                f"--student {name}: its tokenizer has the token {token!r} with the id {i}, and its embedding only "
                f"{rows} rows; resize the model's embedding (resize_token_embeddings), or use the model's tokenizer."
            )


def _silence(model: PreTrainedModel) -> None:
    """No randomness: the policy that is trained is the policy that sampled. Dropout is often no module, but a rate."""
    for owner in (model.config.get_text_config(), *model.modules()):
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
        for key, value in vars(owner).items():
            if isinstance(value, float) and "drop" in key:
                setattr(owner, key, 0.0)


def fix_rotary(model: PreTrainedModel, context: int | None) -> int | None:
    """Fix rotary embeddings that depend on the longest position of a forward (longrope, dynamic NTK) for good.

    Else a row's neighbours would decide its logits, and keys in the cache would be older than the queries' scale. They
    get what `context` tokens ask for; by default, as many as the model was made for. Returns that number, or None
    where there are no such embeddings.
    """
    found = [
        (module, layer, kind)
        for module in model.modules()
        for layer, kind in _kinds(module).items()
        if kind == "longrope" or "dynamic" in kind
    ]
    if not found:
        return None
    config = model.config.get_text_config()
    if context is None:
        factors = [_rope(config, layer)["factor"] for _, layer, kind in found if "dynamic" in kind]
        context = int(config.max_position_embeddings * max(factors, default=1))
    last_11 = torch.tensor([[context - 1]], device=model.device)
    for module, layer, _ in found:  # asked for the longest position, it takes that one's scale
        module(torch.zeros(1, device=model.device), last_11, **({} if layer is None else {"layer_type": layer}))
    for module, layer, _ in found:  # and does not change it again
        if layer is None:
            module.rope_type = "default"
        else:
            module.rope_type = {**module.rope_type, layer: "default"}
    return context


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kinds of a rotary embedding, by layer type where those differ."""
    kinds = getattr(module, "rope_type", None) or {}
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _rope(config, layer: str | None) -> dict:
    return config.rope_parameters if layer is None else config.rope_parameters[layer]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers' progress bars off; whoever had them on gets them back."""
    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()
