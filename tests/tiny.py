"""Small stand-ins for the real things: a tokenizer made like Qwen's, so that no test needs a download."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "think answer assistant user system Wait, Final Answer: the sum of 3 and 4 is 7. So 12 * 5 = 60.\n",
    "You are a helpful assistant. How many apples does she have? Let me check this again step by step.\n\n",
]


def tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE tokenizer with Qwen's special tokens and chat format in `directory`; return it.

    As in Qwen2.5, `<|im_start|>` is one id and "think" another, and `<|fim_pad|>` is not special.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    bpe.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    bpe.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<|fim_pad|>", "<think>", "</think>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)
    return fast
