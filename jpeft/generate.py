"""`jpeft.generate`; what it does is in `jpeft.generation`, whose name no function shadows."""

from __future__ import annotations

from jpeft.generation import generate

__all__ = ["generate"]
