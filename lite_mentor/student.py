"""The student: a frozen base (NF4 or dense) with LoRA adapters, its reference policy, and its rollout weights.

    trained by     hidden(...)          base + adapters, with gradients
    compared with  reference()          the same weights, adapters off: no second copy
    sampled from   rollout_hidden(...)  a dense copy, dequant(base) + scaling B A, rebuilt after every update

The base is never written to. A merge is computed afresh from the frozen base and the float32 adapters each time, so
nothing accumulates and rollouts cannot drift.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lite_mentor import attention
from lite_mentor.assets import resolve_student
from lite_mentor.errors import UserError
from lite_mentor.tiny import tiny_model


class Student:
    """A causal language model whose adapters learn. Everything but the adapters is frozen."""

    def __init__(self, model: PreTrainedModel, tokenizer, *, lora_rank: int, lora_alpha: int, dtype: torch.dtype):
        self.tokenizer, self.dtype, self.config = tokenizer, dtype, model.config.get_text_config()
        self.device = model.device
        self.softcap, self.logit_scale = _logit_shape(self.config)
        self.eos_ids = _eos_ids(model, tokenizer)
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=_linear_names(model), lora_dropout=0.0)
        self.model = get_peft_model(model, lora, autocast_adapter_dtype=True)
        self._base = self.model.get_base_model()
        self._rollout = RolloutWeights(self._base, dtype)

    @property
    def head_weight_VH(self) -> torch.Tensor:
        """The frozen head."""
        return self._base.get_output_embeddings().weight

    def hidden(self, ids_1T: torch.Tensor, positions_1T: torch.Tensor, plan) -> torch.Tensor:
        """Final normed hidden states [T, H] of a packed row, differentiable in the adapters."""
        return self._forward(self._base.base_model, ids_1T, positions_1T, plan)

    def rollout_hidden(self, ids_1T: torch.Tensor, positions_1T: torch.Tensor, plan) -> torch.Tensor:
        """The same from the rollout weights, as of the last `refresh_rollout_weights`."""
        return self._forward(self._rollout.model.base_model, ids_1T, positions_1T, plan)

    def rollout_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] in float32: what is sampled must agree with what the trainer's float32 head will recompute."""
        logits_RV = self._rollout.logits(hidden_RH) * self.logit_scale
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)

    def refresh_rollout_weights(self) -> None:
        """Rebuild the rollout weights from the frozen base and the adapters as they are now."""
        self._rollout.refresh()

    def _forward(self, backbone: nn.Module, ids_1T, positions_1T, plan) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = backbone(
                input_ids=ids_1T.to(self.device),
                position_ids=positions_1T.to(self.device),
                attention_mask=None,
                use_cache=False,
                plan=plan,
            )
        return out.last_hidden_state[0].to(self.dtype)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Adapters off: inside, `hidden` is the reference policy's."""
        with self.model.disable_adapter():
            yield

    def trainable(self) -> list[nn.Parameter]:
        """The adapters' parameters, in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapters by name, as PEFT names them."""
        return get_peft_model_state_dict(self.model)

    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put adapters back. Raises UserError when they belong to another student or rank."""
        mine = self.adapter_state()
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in state.items()}:
            raise UserError("These adapters belong to another student or --lora-rank; use the one they were made with.")
        set_peft_model_state_dict(self.model, dict(state))

    def save_adapter(self, path: Path) -> None:
        """Write the adapters in PEFT's own format."""
        self.model.save_pretrained(path, safe_serialization=True)

    def describe(self) -> str:
        """One line: what is trained, on what."""
        trained = sum(p.numel() for p in self.trainable())
        total = sum(p.numel() for p in self._rollout.model.parameters())
        return f"student: {total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained, {self.dtype} on {self.device}"


class RolloutWeights:
    """A dense twin of the base: linear layers of its own, everything else shared with it."""

    def __init__(self, base: PreTrainedModel, dtype: torch.dtype):
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                _plain(base.config), dtype=dtype, attn_implementation=attention.NAME
            ).eval()
        self.merged: list[tuple[LoraLayer, nn.Parameter]] = []
        inside_lora: tuple[str, ...] = ()
        for name, module in base.named_modules():
            if name.startswith(inside_lora) and inside_lora:
                continue
            if isinstance(module, LoraLayer):
                inside_lora = (*inside_lora, name + ".")
                shape = (module.out_features, module.in_features)
                weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=base.device), requires_grad=False)
                twin = self.model.get_submodule(name)
                twin.weight, twin.bias = weight, module.get_base_layer().bias
                self.merged.append((module, weight))
                continue
            twin = self.model.get_submodule(name) if name else self.model
            for key, parameter in module.named_parameters(recurse=False):
                setattr(twin, key, parameter)
            for key, buffer in module.named_buffers(recurse=False):
                twin.register_buffer(key, buffer, persistent=False)
        head_VH = self.model.get_output_embeddings().weight.detach()
        # A CPU has no bf16 product with a float32 result, so there the head is kept in float32.
        self.head_VH = head_VH.float() if head_VH.device.type == "cpu" else head_VH

    @torch.no_grad()
    def refresh(self) -> None:
        """weight <- round(dequant(base) + scaling B A), computed in float32."""
        for layer, weight in self.merged:
            weight.copy_(_dense(layer.get_base_layer()).float() + layer.get_delta_weight("default").float())

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """[R, V] float32."""
        if hidden_RH.device.type == "cpu" or hidden_RH.dtype == torch.float32:
            return F.linear(hidden_RH.float(), self.head_VH.float())
        return torch.mm(hidden_RH, self.head_VH.t(), out_dtype=torch.float32)


def _dense(linear: nn.Module) -> torch.Tensor:
    """The weight of a base layer, dequantised when it is NF4."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.weight


def _plain(config):
    """The model's config without its quantisation, so that a dense twin can be built from it."""
    config = type(config).from_dict(config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_student(
    name: str,
    *,
    quant: str = "nf4",
    lora_rank: int = 16,
    lora_alpha: int = 32,
    device: str = "cpu",
    dtype: str = "auto",
    seed: int = 0,
    cache: Path | None = None,
    gradient_checkpointing: bool = False,
) -> Student:
    """A student by folder, hub id, `smollm2-135m` or `tiny`. Raises UserError when it cannot be had or understood."""
    compute = compute_dtype(device, dtype)
    torch.manual_seed(seed)
    if name == "tiny":
        model, tokenizer = tiny_model(seed=0, dtype=compute)
        model = model.to(device)
    else:
        model, tokenizer = _load(resolve_student(name, cache), name, quant, device, compute)
    model.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(seed)
    return Student(model, tokenizer, lora_rank=lora_rank, lora_alpha=lora_alpha, dtype=compute)


def _load(folder: Path | str, name: str, quant: str, device: str, dtype: torch.dtype):
    quantization = None
    if quant == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=attention.NAME,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--student {name} cannot be loaded from {folder}: {reason} "
            "Point it at a folder with config.json, tokenizer.json and model.safetensors, or at a hub id."
        ) from error
    return model, tokenizer


def compute_dtype(device: str, requested: str) -> torch.dtype:
    """The dtype to compute in: bf16 where this hardware is faster in it, measured; asked-for dtypes are taken."""
    if requested != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[requested]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        return best

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Every linear layer but the head: the head is frozen, which is what makes its fused loss cheap."""
    head = model.get_output_embeddings()
    return sorted({n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head})


def _logit_shape(config) -> tuple[float | None, float]:
    """(softcap, scale): logits = softcap(head(hidden) * scale), as Gemma, Cohere and Granite name them."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    attention_cap = getattr(config, "attn_logit_softcapping", None)
    if attention_cap or (getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)):
        raise UserError(
            f"Students of type {config.model_type} with softcapped or sliding-window attention are not supported yet; "
            "choose a Llama, Qwen2, Qwen3 or SmolLM model."
        )
    return softcap, scale


def _eos_ids(model: PreTrainedModel, tokenizer) -> tuple[int, ...]:
    """Every id that ends an assistant turn."""
    generation = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(generation if isinstance(generation, list) else [generation])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
