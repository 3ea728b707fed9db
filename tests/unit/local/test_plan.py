"""Which processes run, and with what."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh_local.home import Home
from gpumesh_local.model import Shipped
from gpumesh_local.options import Options
from gpumesh_local.plan import PREFIXES, STOP_ORDER, Plan, Process

OPTIONS = Options(Path("/h"), 8080, {"PATH": "/bin", "GPUMESH_HOME": "/h"}, engine="mock", model="mock-model", slots=8)


def plan(options: Options = OPTIONS) -> Plan:
    return Plan(options, Home(options.home), Shipped(), "postgresql://secret")


def processes(options: Options = OPTIONS) -> dict[str, Process]:
    made = plan(options)
    return {process.name: process for process in [*made.services(), made.node(0, "token")]}


def test_ports_follow_from_the_http_port() -> None:
    ports = plan().ports()
    assert [ports[8080 + offset] for offset in range(8)] == [
        "HTTP API",
        "gRPC API",
        "router",
        "registry",
        "node enrolment",
        "metering",
        "scheduler",
        "PostgreSQL",
    ]


@pytest.mark.parametrize(("nodes", "schedulers"), [(1, 1), (32, 4), (3, 2)])
def test_no_port_is_given_twice(nodes: int, schedulers: int) -> None:
    made = plan(replace(OPTIONS, nodes=nodes, schedulers=schedulers))
    everyone = [*made.services(), *(made.node(number, "") for number in range(nodes))]
    metrics = [process.environment[f"{PREFIXES[process.kind]}METRICS_ADDRESS"] for process in everyone]
    used = [int(address.rpartition(":")[2]) for address in [*metrics, *made.schedulers]]
    assert len(set(used)) == len(used)
    assert set(used) <= set(made.ports())
    assert len(made.ports()) == 7 + schedulers + len(everyone)


def test_every_process_gets_its_own_settings_and_nobody_elses() -> None:
    for process in processes().values():
        ours = [name for name in process.environment if name.startswith("GPUMESH_")]
        assert ours
        assert all(name.startswith(PREFIXES[process.kind]) for name in ours)
        assert process.environment["PATH"] == "/bin"


def test_settings_of_the_person_win_over_ours() -> None:
    given = {**OPTIONS.environment, "GPUMESH_SCHEDULER_STALL_S": "1", "GPUMESH_ROUTER_DRAIN_S": "7"}
    made = processes(replace(OPTIONS, environment=given))
    assert made["scheduler"].environment["GPUMESH_SCHEDULER_STALL_S"] == "1"
    assert made["router"].environment["GPUMESH_ROUTER_DRAIN_S"] == "7"


def test_log_and_trace_settings_can_be_given_to_every_process_at_once() -> None:
    given = {**OPTIONS.environment, "GPUMESH_LOG_LEVEL": "debug", "GPUMESH_NODE_LOG_LEVEL": "error"}
    made = processes(replace(OPTIONS, environment=given))
    levels = {name: made[name].environment[f"{PREFIXES[made[name].kind]}LOG_LEVEL"] for name in made}
    assert levels.pop("node") == "error"
    assert set(levels.values()) == {"debug"}


def test_the_databases_password_is_not_printed_with_a_process() -> None:
    assert "secret" not in repr(processes())


def test_only_the_registry_and_metering_know_the_database() -> None:
    knowing = {name for name, process in processes().items() if "postgresql://secret" in process.environment.values()}
    assert knowing == {"registry", "metering"}


def test_nodes_are_spread_over_the_schedulers_and_know_all_of_them() -> None:
    made = plan(replace(OPTIONS, nodes=2, schedulers=2))
    first, second = (made.node(number, "").environment["GPUMESH_NODE_SCHEDULER_ADDRESSES"] for number in (0, 1))
    assert first == "127.0.0.1:8086,127.0.0.1:8096"
    assert second == "127.0.0.1:8096,127.0.0.1:8086"


def test_the_catalogue_and_the_engine_agree_on_the_revision() -> None:
    for engine in ("tiny", "mock"):
        made = plan(replace(OPTIONS, engine=engine))
        (spec,) = json.loads(made.node(0, "").environment["GPUMESH_NODE_ENGINES"])
        assert spec["revision"] == made.model_revision


def test_what_takes_work_in_stops_first_and_the_books_last() -> None:
    assert set(STOP_ORDER) == {*PREFIXES, "postgres"}
    assert STOP_ORDER[0] == "edge-http"
    assert STOP_ORDER[-3:] == ("metering", "registry", "postgres")
