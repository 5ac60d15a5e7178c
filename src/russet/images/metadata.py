"""How a picture was made, as text inside the picture: the ``parameters`` chunk that AUTOMATIC1111's web UI made common.

    a cat on the moon
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7.0, Seed: 42, Size: 512x512, Model: v1-5, Version: Russet 0.1.0

The prompt, which may have several lines; the negative prompt, if there is one; then pairs on one line, a value that
holds a comma, a colon or a line break being quoted as in JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KEY = "parameters"
NEGATIVE = "Negative prompt: "
PAIR = re.compile(r'\s*(?P<name>\w[\w \-/]{0,60}):\s*(?P<value>"(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
FEWEST = 3
"""A last line with fewer pairs than this is taken for a part of the prompt, as the web UI takes it."""


@dataclass(frozen=True)
class Parameters:
    """How a picture was made. ``settings`` are the pairs of the last line, in their order."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """The text of the chunk."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(NEGATIVE + self.negative_prompt)
        lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in self.settings.items()))
        return "\n".join(lines)

    @classmethod
    def of_text(cls, text: str) -> Parameters:
        """Reads the text of a chunk, whoever wrote it; what it does not say is empty."""
        lines = text.strip().split("\n")
        settings = {match["name"]: unquoted(match["value"]) for match in PAIR.finditer(lines[-1])}
        if len(settings) < FEWEST:
            settings = {}
        else:
            lines.pop()
        begin = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
        negative = "\n".join(lines[begin:]).removeprefix(NEGATIVE)
        return cls("\n".join(lines[:begin]), negative, settings)


def quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def unquoted(value: str) -> str:
    if len(value) < 2 or not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value
