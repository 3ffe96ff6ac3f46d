"""The artifact directory: `writer` writes it, `reader` reads and verifies it. docs/artifact-format.md is the contract."""

from cfmoe.artifact.reader import Artifact

__all__ = ["Artifact"]
