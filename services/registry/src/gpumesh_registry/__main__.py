"""The registry's process: who and what."""

import asyncio

from gpumesh.registry.v1.account_service_pb2_grpc import add_AccountServiceServicer_to_server
from gpumesh.registry.v1.directory_service_pb2_grpc import add_DirectoryServiceServicer_to_server
from gpumesh.registry.v1.enrolment_service_pb2_grpc import add_EnrolmentServiceServicer_to_server
from gpumesh.registry.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from gpumesh_registry.certificates import NodeCertificates
from gpumesh_registry.config import RegistrySettings
from gpumesh_registry.directory import DirectoryHub
from gpumesh_registry.directory_servicer import DirectoryServicer
from gpumesh_registry.postgres import PostgresAccounts
from gpumesh_registry.postgres_directory import PostgresCatalogue, PostgresDirectory
from gpumesh_registry.servicer import AccountServicer, EnrolmentServicer, ModelServicer
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.clock import SystemClock
from gpumesh_runtime.database import Database, migrate
from gpumesh_runtime.errors import Unavailable
from gpumesh_runtime.ids import new_id
from gpumesh_runtime.lifecycle import Life, StartError, run
from gpumesh_runtime.rpc.server import Server

SERVICE = "registry"


async def _ready_database(settings: RegistrySettings) -> Database:
    """Any start order works: waits until the database answers, then brings the schema up to date."""
    database = Database(
        settings.database_url.get_secret_value(), SERVICE, max_connections=settings.database_connections
    )
    while True:
        try:
            await database.wait_ready()
            await migrate(database, SERVICE, "gpumesh_registry.migrations")
        except Unavailable:
            continue  # wait_ready takes its time and jitters
        return database


async def serve(life: Life, settings: RegistrySettings) -> None:
    """Composition root."""
    try:
        certificates = NodeCertificates(FileCa(settings.ca_dir))
    except (OSError, ValueError) as err:
        raise StartError(f"cannot use the CA in {settings.ca_dir}: {err}") from err
    tls, clock = settings.tls(), SystemClock()
    database = await _ready_database(settings)
    accounts, catalogue = PostgresAccounts(database), PostgresCatalogue(database)
    hub = DirectoryHub(PostgresDirectory(database), settings.lookup_window_ms / 1000, life.health)
    directory = DirectoryServicer(hub, catalogue, new_id(SERVICE))

    internal = Server(SERVICE, settings.internal_address, tls, development=settings.development)
    internal.add(AccountServicer(accounts, clock), add_AccountServiceServicer_to_server)
    internal.add(ModelServicer(catalogue), add_ModelServiceServicer_to_server)
    internal.add(directory, add_DirectoryServiceServicer_to_server)
    public = Server(SERVICE, settings.public_address, tls, public=True, development=settings.development)
    enrolment = EnrolmentServicer(accounts, certificates, clock, settings.scheduler_addresses)
    public.add(enrolment, add_EnrolmentServiceServicer_to_server)

    listening = life.spawn(hub.run(), "directory")
    await internal.start()
    await public.start()
    life.ready(port=internal.port, public_port=public.port)

    await life.until_stopped()
    directory.links.goodbye()
    await directory.links.close()
    await public.stop(min(2.0, settings.drain_s))
    await internal.stop(min(2.0, settings.drain_s))
    await hub.lookup.close()
    listening.cancel()  # it holds a connection, for which closing the pool would wait
    await asyncio.wait([listening])
    await database.close()


def main() -> None:
    """Entry point `gpumesh-registry`."""
    settings = RegistrySettings.load()
    run(lambda life: serve(life, settings), settings, SERVICE)


if __name__ == "__main__":
    main()
