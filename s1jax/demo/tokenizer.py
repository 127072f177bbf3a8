"""A small tokenizer made like Qwen's: byte-level BPE, the same special tokens, the same chat format."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2.5's tokenizer cuts a text before it looks for pairs. transformers does so for any directory of this kind of
model, whatever its tokenizer.json says."""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ADDED = ("<|fim_pad|>", "<think>", "</think>")


def build_tokenizer(directory: Path, corpus: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train at most `vocab_size` byte-pair tokens on `corpus`, add Qwen's markers, save in `directory`.

    As in Qwen2.5, `<|im_start|>` is one id and the word after it others, and `<|fim_pad|>` is not special.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in _ADDED])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)
    return fast
