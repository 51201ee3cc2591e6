"""Which words of a caption stand for which concept: a class under any of its names, a colour, a place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# the names by which captions call the classes of CIFAR-10, the usual one first
CLASS_WORDS: dict[str, tuple[str, ...]] = {
    "airplane": ("airplane", "plane", "aircraft"),
    "automobile": ("car", "automobile"),
    "bird": ("bird",),
    "cat": ("cat", "feline"),
    "deer": ("deer",),
    "dog": ("dog", "canine"),
    "frog": ("frog", "amphibian"),
    "horse": ("horse",),
    "ship": ("ship", "boat", "vessel"),
    "truck": ("truck", "lorry"),
}

OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "animal": ("animal",),
    "vehicle": ("vehicle",),
    "grey": ("grey", "gray"),
    "dark": ("dark", "dim"),
    "bright": ("bright", "light"),
    "sky": ("sky", "air", "flying"),
    "water": ("water", "sea", "waves"),
    "grass": ("grass", "meadow", "lawn"),
    "road": ("road", "street", "asphalt"),
    "ground": ("ground", "soil", "earth"),
}


def words_for(concept: str) -> tuple[str, ...]:
    """The words or phrases that name ``concept``, in small letters; of one that is not listed its own name.

    ``sea_lion`` and ``sea lion`` are one concept, named by the phrase ``sea lion``.
    """
    name = concept.lower().replace("_", " ").strip()
    return CLASS_WORDS.get(name) or OTHER_WORDS.get(name) or (name,)


def mentions(caption: str, concept: str) -> bool:
    """Whether ``caption`` names ``concept`` by one of its words, as whole words and also in the plural with -s."""
    text = f" {' '.join(_words(caption))} "
    return any(f" {phrase} " in text or f" {phrase}s " in text for phrase in words_for(concept))


def share_naming(captions: Iterable[str], concept: str) -> float:
    """The share of ``captions`` that name ``concept``; nan of none."""
    found = [mentions(caption, concept) for caption in captions]
    return sum(found) / len(found) if found else float("nan")


def concepts_in(caption: str, concepts: Sequence[str]) -> list[str]:
    """Those of ``concepts`` that ``caption`` names, in their order."""
    return [concept for concept in concepts if mentions(caption, concept)]


def _words(caption: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in caption.lower()).split()


PAD, START, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"

SPECIAL = (PAD, START, END, UNKNOWN, IMAGE)


def word_tokenizer(words: Sequence[str]) -> Any:
    """A transformers tokenizer that splits at blanks: ``SPECIAL`` are tokens 0 to 4, then ``words`` in order.

    Text starts with ``<s>``; other words become ``<unk>``. Letters are made small.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    index = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(index, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, index[START])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
