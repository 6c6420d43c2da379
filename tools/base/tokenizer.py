"""The base's own byte-pair tokenizer, in CLIP's format, learned from the captions."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY = 3072
LENGTH = 32  # tokens, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"


def learn(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Learn merges from captions and save `tokenizer/` so that transformers' CLIPTokenizer loads it."""
    raw = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    raw.train_from_iterator(captions, trainer)
    model = json.loads(raw.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dict(model["vocab"])
    for symbol in sorted(alphabet):  # every byte can also end a word, so that no text is unknown
        vocabulary.setdefault(symbol + "</w>", len(vocabulary))
    for special in (START, END):
        vocabulary[special] = len(vocabulary)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    # The two files that transformers before version 5 reads.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer
