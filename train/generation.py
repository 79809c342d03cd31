"""Texts that a model writes after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import jpeft
from train.examples import Reader


def generate_texts(
    model: Any,
    reader: Reader,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    chat: bool = False,
    **sampling: Any,
) -> list[str]:
    """What the model writes after each prompt (token ids), up to its end token or, in a chat, the end of its turn."""
    ends = reader.ends(chat=chat)
    length = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    skipped = 1 if hasattr(model, "encode") else length  # a decoder's start token, or the prompt
    made = jpeft.generate(model, ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=ends, **sampling)
    texts = []
    for row in np.asarray(made):
        new = [int(token) for token in row[skipped:]]
        end = next((at for at, token in enumerate(new) if token in ends), len(new))
        texts.append(reader.tokenizer.decode(new[:end], skip_special_tokens=True))
    return texts
