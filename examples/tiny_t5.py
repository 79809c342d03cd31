"""Makes a T5 of half a million parameters with random weights and a tokenizer of bytes, to try a configuration with.

    python examples/tiny_t5.py runs/tiny-t5
    jpeft train configs/t5.yaml model.source=runs/tiny-t5

No package of pip carries a pretrained T5. With a connection to the hub, configs/t5.yaml takes one from there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import jpeft

SPECIALS = ["<pad>", "</s>", "<unk>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and an end behind each text."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def main(folder: Path) -> None:
    """Writes the model to `folder`, as it would come from the hub."""
    reads = tokenizer()
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": len(reads),
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    jpeft.models.save(jpeft.models.from_config(config, task="seq2seq-lm", rngs=nnx.Rngs(0)), folder)
    reads.save_pretrained(folder)
    print(f"{folder}: a T5 with random weights; jpeft train configs/t5.yaml model.source={folder}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny-t5"))
    except (OSError, jpeft.JpeftError) as error:
        sys.exit(str(error))
