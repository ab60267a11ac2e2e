"""Students of random weights with the sizes of known ones, written in seconds, for machines that reach no hub.

Neither speed nor memory depends on the weights. The tokenizer is the tiny student's, so most of the vocabulary has no
text, and what such a student says ends at the length limit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lite_mentor.tiny import tiny_tokenizer

QWEN3 = dict(
    architecture="qwen3", vocab_size=151_936, num_attention_heads=16, num_key_value_heads=8, head_dim=128, tied=True,
    dtype="bfloat16",
)  # fmt: skip
SHAPES = {
    "qwen3-0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28),
    "qwen3-1.7b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28),
    "qwen3-4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}
"""What they have beside QWEN3, or instead of it; from their config.json."""
BLOCK = (1 << 24) + 43
"""Random numbers that are drawn; longer weights repeat them. Odd, so that no two rows of a matrix are equal."""


def random_student(folder: Path, shape: str, **changes: object) -> Path:
    """Write the student of that shape, less what `changes` says, to `folder`; returns the folder."""
    sizes = {**QWEN3, **SHAPES[shape], **changes}
    tokenizer, tied = tiny_tokenizer(), bool(sizes.pop("tied"))
    special = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = AutoConfig.for_model(
        sizes.pop("architecture"), tie_word_embeddings=tied, max_position_embeddings=16_384, **special, **sizes
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors, at = {}, 0
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if weight.dim() == 1:  # the scales of norms
            tensors[name] = torch.ones(weight.shape, dtype=torch.bfloat16)
            continue
        tensors[name] = torch.empty(weight.shape, dtype=torch.bfloat16)
        left = tensors[name].view(-1)
        while len(left):
            part = numbers[at : at + len(left)]
            left[: len(part)], left = part, left[len(part) :]
            at = (at + len(part)) % BLOCK
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(argv: list[str]) -> None:
    """Write one."""
    parser = argparse.ArgumentParser(prog="python -m bench random-student")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="fewer than the real one has")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    changes = {"num_hidden_layers": options.layers} if options.layers else {}
    print(random_student(options.out, options.shape, **changes))
