"""The beginning of a long text, as much of it as decides its first tokens.

A text encoder reads 77 tokens, and a prompt may have millions of characters. So the text is cut after a few thousand,
and the first tokens of that beginning are taken where no later character can change them:

* tokens of a complete piece (a word, a digit, a run of symbols: byte pairs are merged within pieces only) that ends
  well before the cut;
* tokens at the start of a piece that goes on beyond the cut, as in a text without spaces. No token has more than
  ``longest`` bytes, so one of any ``longest`` neighbouring positions is a border between two tokens of the whole piece.
  No merge crosses that border, so the tokens before it are those of the text before it alone. Where all beginnings
  that end at one of these positions have the same first tokens, the whole piece has them too.

Where neither holds, a longer beginning is tried, and at last the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

START = 4096  # characters; a text up to this length is never cut
FACTOR = 8  # each further beginning is so many times longer
MARGIN = 64  # characters before the cut that are not relied on, at least
SPACES = 256  # characters that a run of white space keeps, at least

STARTERS = (
    "[\x21-\x7e\u00c0-\u02ff\u0400-\u0482\u2010-\u2027\u2190-\u27bf\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
    "\U0001f300-\U0001faff\U00020000-\U0002a6df]"
)
"""Characters that Unicode's NFC neither composes nor reorders with those before them: a text may be cut there."""

WHITE = r" \t\n\r\f\v\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space

FOREIGN = "\uffff"  # stands for no byte: the byte pairs before it are merged as if the piece went on


@dataclass(frozen=True)
class Head:
    """A beginning of a text in which long runs of white space are shortened.

    gaps: for each shortened run, where it ends in ``text`` and how many characters are left out up to there.
    whole: whether nothing but white space is left out.
    """

    text: str
    gaps: tuple[tuple[int, int], ...]
    whole: bool

    def place(self, offset: int) -> int:
        """Where a character of ``text`` is in the text that this is a beginning of."""
        return offset + next((missing for place, missing in reversed(self.gaps) if place <= offset), 0)


def heads(text: str, added: int) -> Iterator[Head]:
    """Longer and longer beginnings of a text, at last the whole. added: characters of the longest added token."""
    spaces, size = max(SPACES, 4 * added), START
    while size < len(text):
        found = re.compile(STARTERS).search(text, size)
        if found is None:
            break
        yield shortened(text[: found.start()], spaces, whole=False)
        size = max(size * FACTOR, found.start())
    yield shortened(text, spaces, whole=True)


def shortened(text: str, kept: int, *, whole: bool) -> Head:
    """The text with at most ``kept`` characters in each run of spaces, of which the tokenizer makes one anyway."""
    parts, gaps, start, length, missing = [], [], 0, 0, 0
    for run in re.finditer(rf"[{WHITE}]{{{kept + 1},}}", text):
        parts.append(text[start : run.start() + kept])
        length += len(parts[-1])
        missing += run.end() - run.start() - kept
        gaps.append((length, missing))
        start = run.end()
    return Head("".join([*parts, text[start:]]), tuple(gaps), whole)


@dataclass(frozen=True)
class Pieces:
    """What is known of the tokens of a beginning.

    needed: how many of the first tokens are asked for. added: characters of the longest added token.
    longest: characters of the longest token of the vocabulary. unknown: the token for bytes that have none.
    byte_pairs: a piece → its tokens. end_of_word: what marks the last token of a piece.
    """

    needed: int
    added: int
    longest: int
    unknown: str
    end_of_word: str
    byte_pairs: Callable[[str], Sequence[str]]

    @property
    def margin(self) -> int:
        return max(MARGIN, 4 * self.added)

    def certain(self, head: Head, encoded: Any) -> bool:
        """Whether no later text changes the first ``needed`` tokens. encoded: ``head.text`` by ``tokenizers``."""
        if head.whole:
            return True
        if len(encoded.ids) <= self.needed:
            return False
        words, last = encoded.word_ids, encoded.word_ids[self.needed - 1]
        stop = next((i for i in range(self.needed, len(words)) if words[i] != last), None)
        if stop is None:
            return self._stable(encoded.tokens, words.index(last))
        end: int = encoded.offsets[stop - 1][1]
        return end <= len(head.text) - self.margin

    def _stable(self, tokens: Sequence[str], first: int) -> bool:
        """Whether the tokens from ``first`` to the last that is asked for are certain, their piece being cut."""
        if self.unknown in tokens[first:]:
            return False
        piece, wanted = "".join(tokens[first:]).removesuffix(self.end_of_word), list(tokens[first : self.needed])
        start, most = len("".join(wanted)) + self.longest, len(piece) - 4 * self.margin  # 4 bytes a character
        while start + self.longest <= most:
            if all(self._begins(piece[:end], wanted) for end in range(start, start + self.longest)):
                return True
            start *= 2
        return False

    def _begins(self, piece: str, wanted: list[str]) -> bool:
        return list(self.byte_pairs(piece + FOREIGN))[: len(wanted)] == wanted
