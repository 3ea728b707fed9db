"""Settings of the scheduler, from GPUMESH_SCHEDULER_*. Read once, validated at the start."""

import uuid
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from gpumesh_runtime.config import CommaList, Settings, settings_config
from gpumesh_runtime.link import NODE_LINK, LinkOptions
from gpumesh_scheduler.domain.nouns import Limits
from gpumesh_scheduler.domain.reconcile import Waits


class SchedulerSettings(Settings):
    """One scheduler replica. Times are seconds."""

    model_config = settings_config("GPUMESH_SCHEDULER_")

    listen_address: str = Field(
        "127.0.0.1:8086", description="host:port of the mTLS listener for nodes, callers, routers."
    )
    advertised_address: str = Field(
        "", description="host:port at which callers reach it. Empty: listen_address, with the port it got."
    )
    scheduler_id: str = Field(
        "scheduler-0", min_length=1, max_length=63, description="Name of this replica, kept over restarts."
    )
    key_ring: Path = Field(description="File of the key ring that tickets and receipt tokens are sealed with.")
    metering_address: str = Field(description="host:port of metering.")
    registry_address: str = Field(
        "", description="host:port of the registry. Empty: no revocations and no catalogue (tests)."
    )
    scheduler_addresses: CommaList = Field(
        (), description="Other schedulers that nodes may turn to, host:port,host:port."
    )
    drain_s: float = Field(120.0, ge=0.0, le=600.0, description="How long running jobs may take to finish at a drain.")

    accept_s: float = Field(2.0, gt=0, description="A node must accept or reject an offer within this.")
    first_token_s: float = Field(
        120.0, gt=0, description="First content must come within this of Accept; silent prefills take 60 s."
    )
    stall_s: float = Field(
        20.0, gt=0, description="A stream silent for this, and for stall_factor median gaps, has stalled."
    )
    stall_factor: float = Field(20.0, gt=0, description="See stall_s.")
    queue_s: float = Field(30.0, gt=0, description="A job waits for a slot no longer than this.")
    tries: int = Field(3, ge=1, le=10, description="Tries of one job over all attempts.")
    suspect_s: float = Field(15.0, gt=0, description="A node silent for this gets no offers.")
    lost_s: float = Field(25.0, gt=0, description="A node silent for this is lost.")
    heartbeat_s: float = Field(5.0, gt=0, description="How often nodes report.")
    max_queued_per_model: int = Field(10_000, ge=1, description="Jobs that may wait for one model.")
    max_sessions: int = Field(20_000, ge=1, description="Nodes connected at once; each costs 90 KiB.")
    max_sessions_per_s: float = Field(
        200.0, gt=0, description="New sessions let in per second; a handshake costs 2 ms of CPU."
    )
    max_payload_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="Payload of one job.")
    max_payload_total_bytes: int = Field(
        256 * 1024 * 1024, ge=1024, description="Payload kept for further tries, over all jobs."
    )
    max_unsettled: int = Field(100_000, ge=100, description="Jobs kept until metering has answered; a few KiB each.")
    delivered_wait_s: float = Field(2.0, gt=0, description="A caller's record waits this long for the node's count.")
    cancelled_wait_s: float = Field(5.0, gt=0, description="The same for a cancelled job.")
    caller_wait_s: float = Field(
        10.0, gt=0, description="A dead caller's jobs are settled from what was relayed after this."
    )
    receipt_wait_s: float = Field(
        2.0, gt=0, description="A receipt of an unknown job waits this long for its other half."
    )
    resend_s: float = Field(30.0, gt=0, description="Settle items unanswered for this are sent again.")

    def limits(self) -> Limits:
        """For the cores."""
        return Limits(
            accept_s=self.accept_s,
            first_token_s=self.first_token_s,
            stall_s=self.stall_s,
            stall_factor=self.stall_factor,
            queue_s=self.queue_s,
            tries=self.tries,
            suspect_s=self.suspect_s,
            lost_s=self.lost_s,
            digest_grace_s=2 * self.heartbeat_s,
            max_queued_per_model=self.max_queued_per_model,
            max_sessions=self.max_sessions,
            max_payload_bytes=self.max_payload_bytes,
            max_payload_total_bytes=self.max_payload_total_bytes,
        )

    def waits(self) -> Waits:
        """For the reconciler."""
        return Waits(
            delivered_s=self.delivered_wait_s,
            cancelled_s=self.cancelled_wait_s,
            caller_s=self.caller_wait_s,
            receipt_s=self.receipt_wait_s,
            resend_s=self.resend_s,
            most=self.max_unsettled,
        )

    def node_link(self) -> LinkOptions:
        """Links of nodes: as the default, with the times of this configuration."""
        return replace(NODE_LINK, heartbeat_s=self.heartbeat_s, suspect_s=self.suspect_s, lost_s=self.lost_s)


def new_boot_id() -> str:
    """Made anew at each start: a ticket for an earlier boot is refused."""
    return uuid.uuid4().hex
