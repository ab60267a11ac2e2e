"""A student of under a million random parameters, for continuous integration and for tests: built, never downloaded.

Its tokenizer spells text in bytes (ids 0 to 255 are the byte values), with two special tokens for ChatML and whole
tokens for the words of our prompts and of a call's syntax, so that a prompt is short and a call is few decisions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

_SYNTAX = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", '{"name": "', '", "arguments": {"a": ',
    ', "b": ', "}}", "\\boxed{", "system\n", "user\n", "assistant\n",
)  # fmt: skip
_WORDS = (
    "You solve problems by calling tools To call one write name arguments and stop its result comes back Give the "
    "final answer as boxed Tools number add subtract multiply What is plus minus times"
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, two special tokens, then whole tokens; a plain ChatML template without tools."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    # Byte-level tokenizers write byte b as chr(b) where that is printable, and the others as the characters after 255.
    hidden = iter(sorted(c for c in alphabet if ord(c) > 255))
    characters = [chr(b) if chr(b) in alphabet else next(hidden) for b in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (TURN_START, TURN_END)])
    words = [form for word in _WORDS.split() for form in (word, " " + word)]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in (*_SYNTAX, *words)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def tiny_student(
    folder: Path, *, architecture: str = "llama", tied: bool = False, seed: int = 0, **config: object
) -> Path:
    """Write a random student to `folder`, the same one for the same arguments, and return the folder.

    `architecture` is a model type of transformers with Llama's field names: llama, qwen2, qwen3, gemma3_text, ...
    """
    tokenizer = tiny_tokenizer()
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,  # with 4, whether it learns to copy digits within a cold start is a matter of luck
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=128**-0.5,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **sizes | config), trust_remote_code=False
        )
        # The head stays frozen and random, so its rows must be long enough for a confident softmax: a normalised
        # hidden state along a row of length 5.7 has a logit of 64, and of -6 to 6 with the others.
        for embedding in dict.fromkeys((model.get_input_embeddings(), model.get_output_embeddings())):
            torch.nn.init.normal_(embedding.weight, std=0.5)
    model.save_pretrained(folder)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises no kind of its own
        raise OSError(str(error)) from error
    return Path(folder)
