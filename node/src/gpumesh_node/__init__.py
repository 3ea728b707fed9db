"""gpumesh-node: a provider's machine in the mesh. See README.md."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("gpumesh")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"
