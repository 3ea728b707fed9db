"""The scheduler as a process."""

from gpumesh_runtime.lifecycle import Life, run
from gpumesh_scheduler.config import SchedulerSettings
from gpumesh_scheduler.service import Service


async def serve(life: Life, settings: SchedulerSettings) -> None:
    """From start to drained."""
    service = Service(settings, lambda: life.stop("operator"))
    await service.start()
    for client in service.clients:
        life.spawn(client.run(), f"link to {client.address}")
    life.spawn(service.run_timers(), "timers")
    life.ready(port=service.port)
    await life.until_stopped()
    await service.drain()


def main() -> None:
    """Entry point gpumesh-scheduler."""
    settings = SchedulerSettings.load()
    run(lambda life: serve(life, settings), settings, "scheduler")


if __name__ == "__main__":
    main()
