"""What is known of an operator before it runs: from its schema, and by name where the schema does not tell."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

UNINITIALISED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
VIEWS_BY_NAME = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "lift"}
WAITS = {"equal", "allclose", "nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive"}
PRODUCTS = {"convolution", "linear", "mm", "addmm", "bmm", "baddbmm"}
HALF = (torch.float16, torch.bfloat16)
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
ANY_DEVICE = INDEXING | {"copy_", "_to_copy", "set_"}


@dataclass(frozen=True)
class Operator:
    """What is known of an operator from its schema: ``name`` is ``"add.Tensor"``, ``base`` is ``"add"``."""

    func: Any
    namespace: str
    name: str
    base: str
    arguments: tuple[tuple[str, Any], ...]  # names and defaults
    is_view: bool
    is_random: bool
    writes: bool  # into an argument: in place, or ``out=``

    @classmethod
    @functools.cache
    def of(cls, func: Any) -> Operator:
        schema = func._schema
        namespace, plain = schema.name.split("::")
        aliases = [result.alias_info for result in schema.returns if result.alias_info is not None]
        base = plain if plain in INDEXING | ANY_DEVICE else plain.rstrip("_")
        return cls(
            func=func,
            namespace=namespace,
            name=plain + (f".{schema.overload_name}" if schema.overload_name else ""),
            base=base,
            arguments=tuple((a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments),
            is_view=plain in VIEWS_BY_NAME
            or torch.Tag.inplace_view in func.tags
            or any(not alias.is_write for alias in aliases),
            is_random=torch.Tag.nondeterministic_seeded in func.tags,
            writes=any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments),
        )

    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Arguments by name, defaults filled in."""
        return {
            **dict(self.arguments),
            **{name: arg for (name, _), arg in zip(self.arguments, args, strict=False)},
            **kwargs,
        }
