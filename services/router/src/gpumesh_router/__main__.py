"""The router's composition root."""

import functools
import secrets

from gpumesh.router.v1.admission_service_pb2_grpc import add_AdmissionServiceServicer_to_server
from gpumesh.router.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from gpumesh_dispatch.caller import Dispatcher
from gpumesh_dispatch.models import Models
from gpumesh_dispatch.tokens import TokenCounter
from gpumesh_router.admissions import Admissions
from gpumesh_router.config import RouterSettings
from gpumesh_router.domain.admission import Desk
from gpumesh_router.front_door import InferenceServicer
from gpumesh_router.publisher import CataloguePublisher
from gpumesh_router.servicer import AdmissionServicer
from gpumesh_router.tokenizers import Tokenizers
from gpumesh_router.upkeep import upkeep
from gpumesh_router.upstreams import Metering, Registry, SchedulerWatch, Upstreams
from gpumesh_runtime.clock import SystemClock
from gpumesh_runtime.lifecycle import Life, run
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.sealing import KeyRing


async def serve(settings: RouterSettings, life: Life) -> None:
    """One router, from start to drain."""
    tls, clock, ring = settings.tls(), SystemClock(), KeyRing(settings.key_ring)
    boot_id = secrets.token_hex(8)
    desk = Desk()
    publisher = CataloguePublisher(desk.catalogue)
    models = Models()
    publisher.on_change = models.replace
    common = (tls, desk, clock, settings.router_id)
    registry = Registry(
        settings.registry_address, *common, timeout_s=settings.lookup_timeout_s, on_catalogue=publisher.replace_models
    )
    metering = Metering(
        settings.metering_address, *common, timeout_s=settings.lookup_timeout_s, on_prices=publisher.publish
    )
    watches = [SchedulerWatch(address, *common) for address in settings.scheduler_addresses]
    admissions = Admissions(
        desk, Upstreams(registry, metering), ring, clock, submit_s=settings.submit_s, settle_s=settings.settle_s
    )
    registry_channel = channel(settings.registry_address, tls)
    tokenizers = Tokenizers(registry_channel)
    servicer = AdmissionServicer(admissions, publisher, tokenizers, router_id=settings.router_id, boot_id=boot_id)
    dispatcher = Dispatcher(admissions, tls, settings.router_id)
    counter = TokenCounter(tokenizers.get)
    front_door = InferenceServicer(dispatcher, admissions, publisher, models, counter)
    internal = Server("router", settings.internal_address, tls, development=settings.development)
    internal.add(servicer, add_AdmissionServiceServicer_to_server)
    public = Server("router", settings.public_address, tls, public=True, development=settings.development)
    public.add(front_door, add_InferenceServiceServicer_to_server)
    await internal.start()
    await public.start()
    dispatcher.start()
    for name, client in (("registry", registry.client), ("metering", metering.client)):
        life.spawn(client.run(), f"{name} link")
    for watch in watches:
        life.spawn(watch.client.run(), "capacity link")
    life.spawn(upkeep(desk, clock), "upkeep")
    life.ready(port=internal.port, public_port=public.port)
    await life.until_stopped()
    servicer.goodbye(drain_ms=int(settings.drain_s * 1000))
    await public.drain()
    await dispatcher.drain(settings.drain_s)
    await public.stop(1.0)
    await internal.stop(1.0)
    await dispatcher.stop()
    counter.close()
    for client in (registry.client, metering.client, *(watch.client for watch in watches)):
        await client.stop()
    await registry_channel.close()


def main() -> None:
    """Entry point."""
    settings = RouterSettings.load()
    run(functools.partial(serve, settings), settings, "router")


if __name__ == "__main__":
    main()
