"""A router's InferenceService that answers as told, over server TLS, for tests of the SDK and the gpumesh command."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumesh.common.v1.job_pb2 import Model, Price, Usage
from gpumesh.node.v1.session_pb2 import FINISH_REASON_STOP, Delta, Frame
from gpumesh.router.v1 import inference_service_pb2 as pb
from gpumesh.router.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.errors import MeshError, Reason, Unauthenticated
from gpumesh_runtime.identity import service_uri
from gpumesh_runtime.rpc.server import Server

JOB_ID = bytes(range(16))
API_KEY = "gm_live_test_secret_crc"


def pieces(*texts: str, charge_nano_usd: int = 1_234) -> list[pb.InferResponse]:
    """A whole answer in the given pieces."""
    frames = [pb.InferResponse(frame=Frame(deltas=[Delta(text=text)])) for text in texts]
    frames.append(pb.InferResponse(frame=Frame(deltas=[Delta(finish_reason=FINISH_REASON_STOP)])))
    usage = Usage(prompt_tokens=7, completion_tokens=len(texts))
    return [
        pb.InferResponse(started=pb.JobStarted(job_id=JOB_ID, model_id="test-model")),
        *frames,
        pb.InferResponse(completed=pb.JobCompleted(usage=usage, charge_nano_usd=charge_nano_usd)),
    ]


@dataclass
class FrontDoor(InferenceServiceServicer):
    """script: what the next Infer answers; an error in it is raised there, None waits until the caller has gone."""

    script: Sequence[pb.InferResponse | MeshError | None] = ()
    requests: list[pb.InferRequest] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""
    folder: Path = Path()

    async def Infer(self, request: pb.InferRequest, context: Any) -> AsyncIterator[pb.InferResponse]:
        """Answers as told."""
        self._check(context)
        self.requests.append(request)
        for step in self.script:
            if isinstance(step, MeshError):
                raise step
            if step is None:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            else:
                yield step

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """One model with a price, one without."""
        self._check(context)
        return pb.ListModelsResponse(
            models=[Model(model_id="test-model", aliases=["t"], context_tokens=2048), Model(model_id="unpriced")],
            prices={"test-model": Price(input_nano_usd_per_mtok=50_000_000, output_nano_usd_per_mtok=200_000_000)},
        )

    @staticmethod
    def _check(context: Any) -> None:
        if ("authorization", f"Bearer {API_KEY}") not in context.invocation_metadata():
            raise Unauthenticated(Reason.INVALID_API_KEY, "The API key is not valid.")

    def client_file(self, api_key: str = API_KEY) -> Path:
        """A client.json for this door."""
        path = self.folder / "client.json"
        content = {
            "base_url": "http://127.0.0.1:1/v1",
            "api_key": api_key,
            "model": "test-model",
            "grpc_target": self.address,
            "ca_file": str(self.folder / "ca" / "ca.crt"),
        }
        path.write_text(json.dumps(content))
        return path


@asynccontextmanager
async def front_door(folder: Path) -> AsyncIterator[FrontDoor]:
    """Serves one on a free port."""
    ca = FileCa.load_or_create(folder / "ca")
    door = FrontDoor(folder=folder)
    server = Server("router", "127.0.0.1:0", ca.issue_files("router", service_uri("router")), public=True)
    server.add(door, add_InferenceServiceServicer_to_server)
    await server.start()
    door.address = f"127.0.0.1:{server.port}"
    try:
        yield door
    finally:
        await server.stop(0)
