"""The runtime's two exceptions, and how a status of the C API becomes one of them."""

from __future__ import annotations

from cfmoe.errors import CFMoEError, RuntimeFault

__all__ = ["CFMoEError", "Cancelled", "RuntimeFault"]


class Cancelled(CFMoEError):
    """A call that :meth:`Session.cancel` ended."""
