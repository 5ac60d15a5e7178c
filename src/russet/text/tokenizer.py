"""CLIP's tokenizer: text to the ids that the text encoder reads.

The algorithm is the one published with CLIP (Radford et al. 2021, arXiv:2103.00020; github.com/openai/CLIP), run by the
``tokenizers`` library: Unicode NFC, runs of whitespace to one space, lower case; then words, single digits and
runs of symbols are split apart, and the bytes of each piece are merged by a table of pairs, ``</w>`` marking its end.
The algorithm is fixed; a checkpoint brings the vocabulary, the merges and the special tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch

from russet.component import Component
from russet.config import Config
from russet.errors import ArgumentTypeError, ConfigError, InputError
from russet.text import tokenizer_files
from russet.text.tokenizer_files import ROLES, Files, content
from russet.text.tokenizer_head import START, Head, Pieces, heads

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"

Padding = Literal["max_length", "longest", "do_not_pad"]


@dataclass(frozen=True, kw_only=True)
class CLIPTokenizerConfig(Config):
    """tokenizer_config.json. A special token is its text, or its text with matching rules, as JSON has it:
    ``{"content": "<|endoftext|>", "lstrip": false, "rstrip": false, "single_word": false, "normalized": true}``.
    """

    model_max_length: int = 77
    bos_token: str | Mapping[str, Any] = field(default="<|startoftext|>", hash=False)
    eos_token: str | Mapping[str, Any] = field(default="<|endoftext|>", hash=False)
    unk_token: str | Mapping[str, Any] = field(default="<|endoftext|>", hash=False)
    pad_token: str | Mapping[str, Any] = field(default="<|endoftext|>", hash=False)

    def check(self) -> None:
        self.require(self.model_max_length >= 2, f"model_max_length must be 2 or more, not {self.model_max_length}")
        for role in ROLES:
            text = content(self[role])
            self.require(isinstance(text, str) and text != "", f"{role} must be a text, not {self[role]!r}")


@dataclass(frozen=True)
class Encoding:
    """Texts as ids, by name (``encoding.input_ids``) and by key (``encoding["input_ids"]``).

    input_ids: [B, N] int64, or lists of ints.
    attention_mask: the same shape; 1 where a token is, 0 where there is only padding.
    """

    input_ids: Any
    attention_mask: Any

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def keys(self) -> tuple[str, ...]:
        return ("input_ids", "attention_mask")


class CLIPTokenizer(Component):
    """Text to ids and back, equal to transformers' CLIPTokenizer.

    Safe to use from several threads: it holds no state between calls but the tokens that were added.

    Args:
        vocab: token → id, ids from 0 without a gap.
        merges: pairs of tokens in the order in which they are merged.
        config: the special tokens and the length of the text encoder; keyword arguments win over it.
        added: further whole tokens → id, following the vocabulary, as textual inversion makes them.

    Raises:
        ConfigError: the parts do not fit together.
    """

    config_class = CLIPTokenizerConfig
    config: CLIPTokenizerConfig

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        config: Mapping[str, Any] | None = None,
        *,
        added: Mapping[str, int] | None = None,
        **changes: Any,
    ) -> None:
        self.config = CLIPTokenizerConfig.of(config, changes)
        self.model_max_length = self.config.model_max_length
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (content(self.config[role]) for role in ROLES)
        self._vocab, self._merges, self._added = dict(vocab), list(merges), dict(added or {})
        self._tokenizer = build(self._vocab, self._merges, self.unk_token)
        # By text, so that each is added once: where two roles share a text but not its rules, the last one's hold.
        special = {content(self.config[role]): added_token(self.config[role]) for role in ROLES}
        self._tokenizer.add_special_tokens(list(special.values()))
        for text, number in sorted(self._added.items(), key=lambda item: item[1]):
            self._tokenizer.add_tokens([text])
            if self._tokenizer.token_to_id(text) != number:
                raise ConfigError(f"added token {text!r} has id {number}, which does not follow the ids before it")
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            self._id(content(self.config[role])) for role in ROLES
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> NoReturn:
        """Always raises ConfigError: a config does not hold the vocabulary."""
        raise ConfigError("a tokenizer needs its vocabulary beside its config; use from_pretrained or from_files")

    @classmethod
    def from_files(cls, folder: Path) -> CLIPTokenizer:
        """Reads a tokenizer folder: vocab.json and merges.txt, or tokenizer.json, which holds both.

        Raises:
            MissingFile, CorruptFile: a file is absent or damaged.
            ConfigError: the files do not fit together.
        """
        vocab, merges, data, added = tokenizer_files.read(folder)
        config = CLIPTokenizerConfig.from_dict(data, str(folder / "tokenizer_config.json"))
        try:
            return cls(vocab, merges, config, added=added)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None

    def save(self, folder: Path) -> None:
        """Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json (and added_tokens.json).

        Raises:
            CheckpointError: a file cannot be written.
        """
        tokenizer_files.write(folder, Files(self._vocab, self._merges, self.config.to_dict(), self._added))

    # -- text to ids

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: Padding | bool = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        return_tensors: Literal["pt"] | None = "pt",
    ) -> Encoding:
        """Encodes texts, each begun by the bos token and ended by the eos token.

        Differs from transformers in the defaults, which are what a text encoder wants: padded and cut to
        ``max_length`` (default ``model_max_length``), as tensors [B, N].

        Args:
            padding: ``"max_length"``; ``"longest"`` or True, to the longest text; ``"do_not_pad"`` or False.
            truncation: cut what is longer than ``max_length``; the eos token stays. ``cut`` returns what is lost.
            return_tensors: ``"pt"``, or None for lists (for one text a flat list).

        Raises:
            ArgumentTypeError: a text is no str.
            InputError: an argument has a value that cannot be used, or a text is no valid Unicode.
        """
        batch = [texts] if isinstance(texts, str) else list(texts)
        limit = self._limit(max_length)
        rows = [self._ids(text, limit if truncation else None) for text in batch]
        longest = max(map(len, rows), default=0)
        widths = {"max_length": limit, "longest": longest, True: longest, "do_not_pad": 0, False: 0}
        if padding not in widths:
            raise InputError(f"padding must be max_length, longest or do_not_pad, not {padding!r}")
        gaps = [max(0, widths[padding] - len(row)) for row in rows]
        ids = [row + [self.pad_token_id] * gap for row, gap in zip(rows, gaps, strict=True)]
        mask = [[1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]
        if return_tensors == "pt":
            if len({len(row) for row in ids}) > 1:
                raise InputError("texts of different lengths make no tensor; pad them, or take return_tensors=None")
            return Encoding(*(torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in (ids, mask)))
        if return_tensors is not None:
            raise InputError(f'return_tensors must be "pt" or None, not {return_tensors!r}')
        return Encoding(ids[0], mask[0]) if isinstance(texts, str) else Encoding(ids, mask)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text, neither padded nor cut."""
        ids = self._ids(text, None)
        return ids if add_special_tokens else ids[1:-1]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of one text, without bos and eos; ``</w>`` ends a word."""
        return list(self._encoded(text).tokens)

    def cut(self, text: str, max_length: int | None = None) -> str:
        """The part of ``text`` that does not fit into ``max_length`` tokens with bos and eos; "" where all fits."""
        room = self._limit(max_length) - 2
        head, encoded = self._beginning(text, room + 1)
        return text[head.place(encoded.offsets[room][0]) :] if len(encoded.ids) > room else ""

    def _ids(self, text: str, limit: int | None) -> list[int]:
        ids = self._encoded(text).ids if limit is None else self._beginning(text, limit - 2)[1].ids[: limit - 2]
        return [self.bos_token_id, *ids, self.eos_token_id]

    def _beginning(self, text: str, needed: int) -> tuple[Head, Any]:
        """As much of a text as decides its first ``needed`` tokens, and that encoded: they are those of the text."""
        if isinstance(text, str) and len(text) > START and needed > 0:
            return self._beginning_of_long_text(text, needed)
        return Head(text, (), whole=True), self._encoded(text)

    def _beginning_of_long_text(self, text: str, needed: int) -> tuple[Head, Any]:
        check_unicode(text)
        added = max(map(len, (*self._added, *(content(self.config[role]) for role in ROLES))))
        pieces = Pieces(needed, added, self._longest, self.unk_token, END_OF_WORD, self._byte_pairs)
        for head in heads(text, added):
            encoded = self._encoded(head.text)
            if pieces.certain(head, encoded):
                break
        return head, encoded

    def _byte_pairs(self, piece: str) -> list[str]:
        return [token.value for token in self._tokenizer.model.tokenize(piece)]

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._vocab))

    def _encoded(self, text: str) -> Any:
        if not isinstance(text, str):
            raise ArgumentTypeError(f"a text must be a str, not {type(text).__name__}: {text!r}")
        check_unicode(text)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _id(self, token: str) -> int:
        return cast(int, self._tokenizer.token_to_id(token))

    def _limit(self, max_length: int | None) -> int:
        limit = self.model_max_length if max_length is None else max_length
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise ArgumentTypeError(f"max_length must be an int, not {limit!r}")
        if limit < 2:
            raise InputError(f"max_length must be 2 or more, to hold bos and eos, not {limit}")
        return limit

    # -- ids to text

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = False) -> str:
        """The text of ids: lower case, one space between tokens that end a word."""
        numbers = [int(number) for number in ids]
        text: str = self._tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens)
        return text.replace(END_OF_WORD, " ").strip()

    def batch_decode(
        self, rows: Sequence[Sequence[int]] | torch.Tensor, *, skip_special_tokens: bool = False
    ) -> list[str]:
        """The texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    # -- the vocabulary

    @property
    def vocab_size(self) -> int:
        """The number of tokens without the added ones; ``len(tokenizer)`` counts those too."""
        return len(self._vocab)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def convert_tokens_to_ids(self, token: str) -> int:
        """A token's id; that of the unk token where there is no such token."""
        return self.unk_token_id if self._tokenizer.token_to_id(token) is None else self._id(token)

    def add_tokens(self, tokens: Sequence[str]) -> int:
        """Adds whole tokens behind the vocabulary, as textual inversion needs; how many of them were new.

        Raises:
            ArgumentTypeError, InputError: a token is no str, or is empty.
        """
        for token in tokens:
            if not isinstance(token, str):
                raise ArgumentTypeError(f"a token must be a str, not {type(token).__name__}: {token!r}")
            if not token.strip():
                raise InputError("a token must not be empty")
        before = len(self)
        self._tokenizer.add_tokens(list(tokens))
        numbers = {token: self._id(token) for token in tokens}
        self._added.update({token: number for token, number in numbers.items() if number >= before})
        return len(self) - before


def build(vocab: dict[str, int], merges: list[tuple[str, str]], unk: str) -> Tokenizer:
    """The algorithm of the module's docstring with a vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    try:
        model = BPE(
            vocab=vocab, merges=merges, unk_token=unk, continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD
        )
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"the merges do not fit the vocabulary: {error}") from None
    tokenizer = Tokenizer(model)
    spaces, pieces = (
        normalizers.Replace(Regex(r"\s+"), " "),
        pre_tokenizers.Split(Regex(PIECES), "removed", invert=True),
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 40) : error.start + 40]
        raise InputError(f"the text is no valid Unicode (a lone surrogate at {error.start}): {near!r}") from None


def added_token(token: str | Mapping[str, Any]) -> AddedToken:
    """A special token with its matching rules; one that is only a text is matched as it is written."""
    from tokenizers import AddedToken

    rules = {} if isinstance(token, str) else token
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(content(token), **{name: bool(rules.get(name, False)) for name in names})
