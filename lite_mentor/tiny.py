"""The `tiny` student: random weights and a byte-level tokenizer, so that everything runs anywhere in seconds.

Nothing is downloaded. The head and the embeddings are frozen and random, like every base weight, and the adapters must
do all the learning; so they are drawn wide enough that a normed hidden state can prefer one token clearly.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from lite_mentor import attention

_SPECIAL = ["<|im_start|>", "<|im_end|>"]
_CORPUS = [
    '<tool_call>{"name": "add", "arguments": {"a": , "b": }}</tool_call>',
    '<tool_call>{"name": "subtract", "arguments": {"a": , "b": }}</tool_call>',
    '<tool_call>{"name": "multiply", "arguments": {"a": , "b": }}</tool_call>',
    "<tool_response></tool_response> \\boxed{} What is plus minus times ? Error: \nsystem\nuser\nassistant\n",
]
_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t.function.name + ' ' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """All 256 bytes, the words of the call syntax, digits one by one; a ChatML template that names the tools."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=_TEMPLATE,
        name_or_path="tiny",
    )  # fmt: skip


def tiny_model(
    *, seed: int, dtype: torch.dtype, architecture: str = "llama", hidden: int = 128, layers: int = 4
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random model of the architecture and the tokenizer it goes with; equal seeds give equal weights."""
    tokenizer = tiny_tokenizer()
    kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config}
    config = kinds[architecture](
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                std = 1.0 if "embed_tokens" in name else 0.25 if "lm_head" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.to(dtype).eval(), tokenizer
