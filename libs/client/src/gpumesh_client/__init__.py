"""gpumesh for Python programs over gRPC.

from gpumesh_client import Client

with Client.from_file("client.json") as mesh:
    for piece in mesh.stream([("user", "Hello!")]):
        print(piece.text, end="")
"""

from gpumesh_client.client import Answer, Chunk, Client
from gpumesh_client.files import ClientFile, ConfigurationError
from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.reasons import Reason

__all__ = ["Answer", "Chunk", "Client", "ClientFile", "ConfigurationError", "MeshError", "Reason"]
