"""Types of options that several parts need; pydantic checks them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def _whole(value: Any) -> Any:
    """5e3 stands for 5000, as BasicSR's own option files have it."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Int = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Int, Field(gt=0)]
NotNegativeInt = Annotated[Int, Field(ge=0)]
