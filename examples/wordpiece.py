"""BERT tokenisation in plain Python: basic splitting, then WordPiece.

The rules are those that ``tokenizer.json`` names: clean the text, set CJK
ideographs apart, strip accents, lower the case, split at white space and
punctuation, and cut every word greedily into the longest known pieces.
A file that asks for anything else is refused instead of being read wrongly.
Character classes come from the running Python, so a character younger than the
Unicode tables of another tokenizer may be split differently there.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

# Blocks whose characters stand alone as words: Han ideographs, not kana or hangul.
CJK_BLOCKS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPiece:
    """Tokenizer of an uncased BERT model.

    Parameters
    ----------
    path : path-like
        The ``tokenizer.json`` of the model.
    max_length : int
        Longest sequence, ``[CLS]`` and ``[SEP]`` included; the rest is cut off.

    Raises
    ------
    ValueError
        If the file asks for rules that are not implemented here.
    """

    def __init__(self, path: str | Path, max_length: int = 256) -> None:
        spec = json.loads(Path(path).read_text(encoding="utf-8"))
        _check(spec)
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        model = spec["model"]
        self.max_length = max_length
        self.vocab: dict[str, int] = model["vocab"]
        self.prefix: str = model["continuing_subword_prefix"]
        self.longest_word: int = model["max_input_chars_per_word"]
        self.unknown = self.vocab[model["unk_token"]]
        self.cls, self.sep, self.pad = (self.vocab[t] for t in ("[CLS]", "[SEP]", "[PAD]"))
        self._special = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self._split_special = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, between ``[CLS]`` and ``[SEP]``."""
        ids: list[int] = []
        for part in self._split_special.split(text):
            if part in self._special:
                ids.append(self._special[part])
                continue
            for word in split_words(part):
                ids += self._pieces(word)
        return [self.cls, *ids[: self.max_length - 2], self.sep]

    def _pieces(self, word: str) -> list[int]:
        found = self._cache.get(word)
        if found is None:
            found = self._cache[word] = self._cut(word)
        return found

    def _cut(self, word: str) -> list[int]:
        if len(word) > self.longest_word:
            return [self.unknown]
        ids: list[int] = []
        start = 0
        while start < len(word):
            lead = self.prefix if start else ""
            for end in range(len(word), start, -1):
                token = self.vocab.get(lead + word[start:end])
                if token is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                # One piece that is not known makes the whole word unknown.
                return [self.unknown]
        return ids


def split_words(text: str) -> list[str]:
    """Words and single punctuation marks of ``text``, normalised."""
    chars: list[str] = []
    for c in text:
        if c in "\0\ufffd" or _is_control(c):
            continue
        chars.append(f" {c} " if _is_cjk(c) else " " if c.isspace() else c)
    # Accents fall before the case does, and case falls one character at a time:
    # str.lower() on a whole word would give the Greek final sigma.
    bare = (
        c for c in unicodedata.normalize("NFD", "".join(chars)) if unicodedata.category(c) != "Mn"
    )
    out: list[str] = []
    for c in "".join(ch.lower() for ch in bare):
        out.append(f" {c} " if _is_punctuation(c) else c)
    return "".join(out).split()


def _is_control(c: str) -> bool:
    return c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs")


def _is_cjk(c: str) -> bool:
    code = ord(c)
    return code >= 0x3400 and any(low <= code <= high for low, high in CJK_BLOCKS)


def _is_punctuation(c: str) -> bool:
    # The printable ASCII symbols all count, "$" and "^" too, whatever their category.
    if c.isascii():
        return "!" <= c <= "~" and not c.isalnum()
    return unicodedata.category(c).startswith("P")


def _check(spec: dict) -> None:
    normalizer, model = spec["normalizer"], spec["model"]
    wanted = {
        "normalizer type": (normalizer.get("type"), "BertNormalizer"),
        "clean_text": (normalizer.get("clean_text"), True),
        "handle_chinese_chars": (normalizer.get("handle_chinese_chars"), True),
        # None follows lowercase, which is on.
        "strip_accents": (normalizer.get("strip_accents") in (None, True), True),
        "lowercase": (normalizer.get("lowercase"), True),
        "pre_tokenizer": (spec["pre_tokenizer"].get("type"), "BertPreTokenizer"),
        "post_processor": (spec["post_processor"].get("type"), "TemplateProcessing"),
        "model type": (model.get("type"), "WordPiece"),
    }
    for name, (found, needed) in wanted.items():
        if found != needed:
            raise ValueError(f"tokenizer.json: {name} is {found!r}, only {needed!r} is implemented")
