"""A pipeline's networks while one run is open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from russet.planning.plan import Plan
from russet.residency import placement

if TYPE_CHECKING:
    from russet.residency.moving import Movable


class OpenRun:
    """Has networks at work, one at a time, each in the form that a plan asks for.

    A network stays where it is when its block ends, until another one works or the run is closed: entering the same
    one again, once a denoising step, costs next to nothing.
    """

    def __init__(self, pipe: Movable, plan: Plan) -> None:
        self._pipe, self._plan = pipe, plan
        self._working: tuple[str, Plan] | None = None
        self._stack = contextlib.ExitStack()
        pipe._replace(plan)
        placement.carry_out(plan, pipe._present())

    @contextlib.contextmanager
    def at_work(self, component: str, plan: Plan) -> Iterator[None]:
        """The network is on its device, in the form that the plan asks for, until the block ends."""
        if self._working is None or self._working[0] != component or self._working[1] is not plan:
            self._stack.close()
            self._working = None
            if plan is not self._plan:
                self._stack.enter_context(self._changed(component, plan))
            self._stack.enter_context(self._pipe.at_work(component, plan))
            self._working = component, plan
        yield

    def close(self) -> None:
        """Puts the network that worked last back where it rests."""
        self._working = None
        self._stack.close()

    @contextlib.contextmanager
    def _changed(self, component: str, plan: Plan) -> Iterator[None]:
        """Has one network in another precision: half-precision weights go to float32 and back without a loss."""
        network = self._pipe._present()[component]
        dtype = next(network.parameters()).dtype
        network.to(placement.dtype_named(plan.dtype(component)))
        placement.carry_out(plan, {component: network})
        try:
            yield
        finally:
            network.to(dtype)
            placement.carry_out(self._plan, {component: network})
