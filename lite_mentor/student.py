"""The student: a frozen base with LoRA adapters, its reference policy, and the weights that rollouts sample from.

    hidden(...)           base + adapters, with gradients                             what is trained
    reference()           the same with earlier adapters, or with none: no second base     what it is compared with
    rollout_hidden(...)   a dense twin: dequant(base) + scaling B A, rounded once     what is sampled

The base is never written to. The twin is computed afresh from the frozen base and the float32 adapters after every
update, never un-merged, so nothing accumulates and rollouts cannot drift. Where the twin does not fit, base and
adapters themselves are sampled from ("unmerged"): little to refresh, but three products a layer instead of one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from transformers import PreTrainedModel

from lite_mentor.attention import CacheShape, PackedPlan, Plan, Survey
from lite_mentor.errors import UserError
from lite_mentor.files import read_file, replace_folder
from lite_mentor.fused import FusedLinear, SharedProduct, same_input
from lite_mentor.norms import fuse_norms

# Importing bitsandbytes on a CPU logs that an optional kernel was not found; what it has instead is what we want.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward from" not in r.getMessage())
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

from lite_mentor.lora import Adapters, dequantised  # noqa: E402


class Student:
    """A causal language model whose adapters learn; everything else is frozen.

    `model` is the PEFT model, `config` the text model's configuration, `eos_ids` the tokens that its files name as an
    end (its chat template may close turns by another, Chat.end_id), `softcap` and `logit_scale` how the head's products
    become logits: softcap(logit_scale * hidden @ head.T). `cache` is what the engine keeps of a token. `published` is
    the name by which others find the base, and `context` the most tokens of a sequence, where it depends on them.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer, *, name: str, source: str, published: str, lora_rank: int,
        lora_alpha: int, rollout_weights: str = "auto", context: int | None = None,
    ):  # fmt: skip
        self.tokenizer, self.name, self.source, self.context = tokenizer, name, source, context
        self.config, self.dtype, self.device = model.config.get_text_config(), model.dtype, model.device
        self.softcap, self.logit_scale = _logit_shape(self.config)
        self.eos_ids = _eos_ids(model, tokenizer)
        self.quantised = getattr(model, "is_loaded_in_4bit", False)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise UserError(
                f"The head of the student {name} has a bias, which the fused loss lacks; use another student."
            )
        if self.device.type == "cuda":
            fuse_norms(model)
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():  # peft asks transformers under an attribute's old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            try:
                self.model = get_peft_model(model, lora)
            except ValueError as error:
                raise UserError(f"Adapters cannot be put on the student {name}: {error}") from error
        lora.base_model_name_or_path = published
        self.base: PreTrainedModel = self.model.get_base_model()
        if isinstance(self.base.get_output_embeddings(), LoraLayer):
            raise UserError("The student's head has an adapter; the fused loss needs a frozen head, so leave it out.")
        self._adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._reference: dict[str, torch.Tensor] = {}
        merged = rollout_weights == "merged" or (rollout_weights == "auto" and twin_fits(self.base))
        layers, (groups, self.cache) = dict(adapted_layers(self.base)), self._survey()
        self._rollout = RolloutWeights(self.base, groups if merged else None)
        self._lora = Adapters([[layers[name] for name in names] for names in groups], self.dtype)
        self.refresh_rollout_weights()

    @property
    def head_weight_VH(self) -> torch.Tensor:
        """The frozen head, never quantised."""
        return self.base.get_output_embeddings().weight

    @property
    def rollout_model(self) -> PreTrainedModel:
        """The model that rollouts are sampled from, as of the last `refresh_rollout_weights`."""
        return self._rollout.model

    def hidden(self, ids_1T: torch.Tensor, positions_1T: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The final normed hidden states [T, H] of a packed row, differentiable in the adapters."""
        self._lora.refresh()
        return self._forward(self.base, ids_1T, positions_1T, plan)

    def rollout_hidden(self, ids_1T: torch.Tensor, positions_1T: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The same from the rollout weights, as of the last `refresh_rollout_weights`."""
        return self._forward(self._rollout.model, ids_1T, positions_1T, plan)

    def rollout_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] in float32: what is sampled agrees with what the loss's float32 head will recompute."""
        logits_RV = self._rollout.head(hidden_RH)
        if self.logit_scale != 1:
            logits_RV = logits_RV * self.logit_scale
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)

    def refresh_rollout_weights(self) -> None:
        """Rebuild the rollout weights from the frozen base and the adapters as they are now."""
        self._rollout.refresh()
        self._lora.refresh()

    def _survey(self) -> tuple[list[list[str]], CacheShape]:
        """Which adapted layers read the same tensor, and what attention keeps, as a run over a few tokens shows."""
        ids_1T = torch.arange(4)[None]
        survey = Survey(PackedPlan([0], [-1], 4, self.device))
        groups = same_input(dict(adapted_layers(self.base)), lambda: self._forward(self.base, ids_1T, ids_1T, survey))
        return groups, survey.shape()

    def _forward(self, model: PreTrainedModel, ids_1T, positions_1T, plan: Plan) -> torch.Tensor:
        ids_1T, positions_1T = ids_1T.to(self.device), positions_1T.to(self.device)
        return backbone(model, ids_1T, positions_1T, plan).to(self.dtype)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `hidden` is the reference policy's: with the adapters of `keep_reference`, or with none.

        Kept ones change places with the trained ones, in place: autograd raises at a backward whose forward was before.
        """
        if not self._reference:
            with self.model.disable_adapter():
                yield
            return
        self._exchange_adapters()
        try:
            yield
        finally:
            self._exchange_adapters()

    @torch.no_grad()
    def _exchange_adapters(self) -> None:
        kept, mine = list(self._reference.values()), [self._adapter[name] for name in self._reference]
        held = [tensor.clone() for tensor in kept]
        torch._foreach_copy_(kept, mine)  # a few launches, of hundreds of tensors
        torch._foreach_copy_(mine, held)
        self._lora.refresh()

    def keep_reference(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Make a copy of these adapters, by default those it has now, the reference: 4 bytes a parameter.

        Raises UserError when they belong to another model.
        """
        state = self.adapter_state() if state is None else state
        self._check_adapters(state)
        self._reference = {name: tensor.to(self.device, copy=True) for name, tensor in state.items()}

    def reference_state(self) -> dict[str, torch.Tensor]:
        """The reference's adapters by name; empty where it has none. The live tensors, as of `adapter_state`."""
        return dict(self._reference)

    def trainable(self) -> list[nn.Parameter]:
        """The adapters' parameters, float32, in a fixed order."""
        return list(self._adapter.values())

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapters by name. These are the live tensors: copy what must outlast the next update."""
        return {name: p.detach() for name, p in self._adapter.items()}

    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put adapters back and refresh the rollout weights. Raises UserError when they belong to another model."""
        self._check_adapters(state)
        for name, tensor in self.adapter_state().items():
            tensor.copy_(state[name])
        self.refresh_rollout_weights()

    def _check_adapters(self, state: Mapping[str, torch.Tensor]) -> None:
        mine = self.adapter_state()
        if {n: (t.shape, t.dtype) for n, t in mine.items()} != {n: (t.shape, t.dtype) for n, t in state.items()}:
            raise UserError("The adapters were made for another student or another --lora-rank; use theirs.")

    def save_adapter(self, path: Path) -> None:
        """Write the adapters to the folder `path` in PEFT's own format, at once. Raises UserError when it cannot."""
        # PEFT's own save_pretrained would also ask the hub about the base and write an empty model card.
        tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        config = self.model.peft_config["default"].to_dict() | {"inference_mode": True}
        # Its sets in an order that does not depend on how strings hash: equal runs write equal bytes.
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        files = {
            "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
            "adapter_model.safetensors": save(
                {n: t.cpu().contiguous() for n, t in tensors.items()}, metadata={"format": "pt"}
            ),
        }
        try:
            replace_folder(Path(path), files)
        except OSError as error:
            raise UserError(
                f"The adapters could not be written to {path} ({error.strerror or error}); make room or rights there."
            ) from error

    def load_adapter(self, path: Path) -> None:
        """Read a LoRA adapter in PEFT's format, on the same layers and of the same rank, so that it acts as in PEFT.

        Raises UserError when it is not there, belongs to another student, or does what LoRA alone does not.
        """
        saved, scaling = _read_adapter(Path(path))
        mine = {name.replace(".default.", "."): name for name in self._adapter}
        if saved.keys() != mine.keys():
            name = min(saved.keys() ^ mine.keys())
            raise UserError(
                f"The adapter in {path} was made for another student or for other layers ({name} is only in one of "
                "the two); use an adapter of all linear layers of this one."
            )
        own = self.model.peft_config["default"]
        factor = scaling / (own.lora_alpha / own.r)  # B takes what its scaling differs by from ours
        found = {mine[name]: tensor.to(self.device, torch.float32) for name, tensor in saved.items()}
        self.load_adapter_state({name: t * factor if "lora_B" in name else t for name, t in found.items()})

    def fingerprint(self) -> str:
        """sha256 of a sample of the base: of each tensor its name, shape, and the bytes of 256 numbers spread over it.

        Other weights differ everywhere, so the sample finds them; to hash billions of them would take long.
        """
        digest = hashlib.sha256()
        for name, tensor in self.base.named_parameters():
            if not tensor.requires_grad:
                flat = tensor.detach().reshape(-1)
                chosen = flat[:: max(1, flat.numel() // 256)].contiguous().cpu()
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(chosen.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: the student, where it came from, and what is trained."""
        total = parameters(self.base) / 1e6
        trained = sum(p.numel() for p in self._adapter.values()) / 1e6
        lora, base = self.model.peft_config["default"], "NF4" if self.quantised else "unquantised"
        sampled = "" if self._rollout.layers else "; rollouts through the adapters, without merged weights"
        if self.context:
            sampled += f"; rotary embeddings scaled for sequences of up to {self.context} tokens"
        return (
            f"{self.name} ({self.source}): {total:.1f} M parameters, {base}, {str(self.dtype)[6:]} on {self.device}; "
            f"training {trained:.2f} M in adapters of rank {lora.r}{sampled}"
        )


class RolloutWeights:
    """What is sampled from: a dense twin of the base, or the base with its adapters.

    The twin's adapted layers have weights of their own; all its other tensors are the base's. `groups` has the adapted
    layers by name; those of one group read the same tensor, and are one product. None: no twin.
    """

    def __init__(self, base: PreTrainedModel, groups: list[list[str]] | None):
        self.model, self.layers = base, []
        if groups is not None:
            tensors = [*base.parameters(), *base.buffers()]
            self.model = copy.deepcopy(base, {id(t): t for t in tensors}).eval()
            layers = dict(adapted_layers(base))
            for names in groups:
                self._replace({name: layers[name] for name in names})
        head_VH = base.get_output_embeddings().weight.detach()
        # No CPU product of bf16 matrices gives float32, so there the head is kept in float32 as well.
        self.head_VH = head_VH.float() if head_VH.device.type == "cpu" else head_VH

    def _replace(self, group: dict[str, LoraLayer]) -> None:
        first, *others = group.values()
        sizes = [layer.out_features for layer in group.values()]
        how = dict(dtype=self.model.dtype, device=self.model.device)
        weight = torch.empty(sum(sizes), first.in_features, **how)
        biases = [layer.get_base_layer().bias for layer in group.values()]
        if others:
            filled = [torch.zeros(n, **how) if b is None else b.detach() for n, b in zip(sizes, biases, strict=True)]
            bias = None if all(b is None for b in biases) else torch.cat(filled)
            product = SharedProduct(weight, bias, sizes)
            twins = [FusedLinear(product, i) for i in range(len(sizes))]
        else:
            twins = [nn.Linear(first.in_features, first.out_features, bias=False, device="meta")]
            twins[0].weight, twins[0].bias = nn.Parameter(weight, requires_grad=False), biases[0]
        for (name, layer), twin in zip(group.items(), twins, strict=True):
            self.model.set_submodule(name, twin)
            self.layers.append((layer, twin.weight.data))

    @torch.no_grad()
    def refresh(self) -> None:
        """weight <- round(dequant(base) + scaling B A), in place, computed in float32."""
        for layer, weight in self.layers:
            dense = dequantised(layer.get_base_layer()).float()
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight.copy_(torch.addmm(dense, up, down, alpha=layer.scaling["default"]))

    def head(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """hidden @ head.T [R, V], float32 sums of exact products."""
        if hidden_RH.device.type != "cpu":
            if hidden_RH.dtype is torch.float32:
                return F.linear(hidden_RH, self.head_VH.float())
            return torch.mm(hidden_RH, self.head_VH.t(), out_dtype=torch.float32)
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        if hidden_RH.dtype is torch.bfloat16:  # narrowing these operands again loses nothing, and is twice as fast
            matmul.fp32_precision = "bf16"
        try:
            return F.linear(hidden_RH.float(), self.head_VH)
        finally:
            matmul.fp32_precision = before


def backbone(model: PreTrainedModel, ids_1T: torch.Tensor, positions_1T: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The final hidden states [T, H] of a packed row."""
    out = model.base_model(input_ids=ids_1T, position_ids=positions_1T, plan=plan, use_cache=False)
    return out.last_hidden_state[0]


def adapted_layers(base: PreTrainedModel) -> list[tuple[str, LoraLayer]]:
    """The layers with adapters, by name. Raises UserError for one that is not linear."""
    found = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in found:
        if not isinstance(layer.get_base_layer(), nn.Linear):
            kind = type(layer.get_base_layer()).__name__
            raise UserError(f"The student has a layer ({name}) of type {kind}, which is not supported; use another.")
    return found


_SHOWN_BY_TENSORS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "task_type", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "peft_version", "init_lora_weights",
}  # fmt: skip
"""Of a LoRA's settings, what is read, or decides no more than which tensors there are, or only how it was trained."""


def _read_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """A LoRA's tensors, and what its products are multiplied by."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(read_file(file))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if config["peft_type"] != "LORA" or rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"{config['peft_type']} of rank {rank} and alpha {alpha}")
        file = folder / "adapter_model.safetensors"
        tensors = load(read_file(file))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as an adapter ({error}); name a folder with a PEFT LoRA.") from error
    usual = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in _SHOWN_BY_TENSORS and value and value != usual.get(name):
            raise UserError(f"The adapter in {folder} has {name} set, which this trainer does not compute; merge it.")
    # Some ways to begin take their share out of the base, which is then another one.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise UserError(
            f"The adapter in {folder} belongs to a base that was changed with it ({config['init_lora_weights']}); "
            "merge it into that base, and give the result as the student."
        )
    return tensors, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def twin_fits(base: PreTrainedModel) -> bool:
    """Do merged weights take under two fifths of the GPU's free memory? The update and the cache need the rest."""
    if base.device.type != "cuda":
        return True
    entries = sum(layer.in_features * layer.out_features for _, layer in adapted_layers(base))
    return entries * base.dtype.itemsize < 0.4 * torch.cuda.mem_get_info(base.device)[0]


def parameters(base: PreTrainedModel) -> int:
    """Of the model without adapters; four-bit weights count as what they stand for."""
    total = 0
    for name, p in base.named_parameters():
        state = getattr(p, "quant_state", None)
        total += 0 if "lora_" in name else p.numel() if state is None else math.prod(state.shape)
    return total


def _logit_shape(config) -> tuple[float | None, float]:
    """(softcap, scale) as Gemma, Cohere and Granite name them."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


def _eos_ids(model: PreTrainedModel, tokenizer) -> tuple[int, ...]:
    generation = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, *(generation if isinstance(generation, list) else [generation])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
