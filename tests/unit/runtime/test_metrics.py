"""Metric cells and their exposition, judged by the official parser."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpumesh_runtime.health import Health
from gpumesh_runtime.metrics import Registry
from gpumesh_runtime.monitor import add_process_metrics, rss_bytes


def samples(registry: Registry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(registry.exposition()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_counters_and_gauges_are_exposed_with_their_labels() -> None:
    registry = Registry()
    requests = registry.counter("shop_requests_total", "Requests", ("outcome",))
    ok = requests.labels("ok")
    ok.add()
    ok.value += 2
    requests.labels('quote " back \\ line \n').add(1.5)
    registry.gauge("shop_open", "Open").cell.set(-4)
    found = samples(registry)
    assert found["shop_requests_total", (("outcome", "ok"),)] == 3
    assert found["shop_requests_total", (("outcome", 'quote " back \\ line \n'),)] == 1.5
    assert found["shop_open", ()] == -4


def test_a_histogram_counts_by_bucket_cumulatively() -> None:
    registry = Registry()
    cell = registry.histogram("shop_wait_seconds", "Wait", bounds=(0.1, 1)).cell
    for value in (0.05, 0.1, 0.5, 7):
        cell.observe(value)
    found = samples(registry)
    assert found["shop_wait_seconds_bucket", (("le", "0.1"),)] == 2
    assert found["shop_wait_seconds_bucket", (("le", "1"),)] == 3
    assert found["shop_wait_seconds_bucket", (("le", "+Inf"),)] == 4
    assert found["shop_wait_seconds_count", ()] == 4
    assert found["shop_wait_seconds_sum", ()] == pytest.approx(7.65)


def test_the_same_metric_twice_is_one_and_a_different_one_is_refused() -> None:
    registry = Registry()
    first = registry.counter("a_total", "A", ("x",))
    assert registry.counter("a_total", "A", ("x",)) is first
    assert first.labels("1") is first.labels("1")
    with pytest.raises(ValueError, match="exists"):
        registry.counter("a_total", "A", ("y",))
    with pytest.raises(ValueError, match="exists"):
        registry.gauge("a_total", "A", ("x",))
    with pytest.raises(ValueError, match="_total"):
        registry.counter("a", "A")
    with pytest.raises(ValueError, match="labels"):
        first.labels("1", "2")


def test_label_values_are_bounded() -> None:
    registry = Registry()
    metric = registry.counter("a_total", "A", ("x",))
    for number in range(2000):
        metric.labels(str(number)).add()
    assert len(metric.cells) <= 501
    assert metric.labels("other").value == 1500


def test_the_process_shows_memory_cpu_and_garbage_collections() -> None:
    registry = Registry()
    add_process_metrics(registry)
    found = samples(registry)
    assert found["process_resident_memory_bytes", ()] == pytest.approx(rss_bytes(), rel=0.5)
    assert found["process_cpu_seconds_total", ()] > 0
    assert found["process_open_fds", ()] > 2
    assert found["gpumesh_gc_collections_total", (("generation", "0"),)] >= 0


def test_ready_means_started_not_draining_and_every_condition_true() -> None:
    health = Health()
    assert health.problems() == {"start": "starting"}
    health.started = True
    assert health.ready
    health.set("database", "unreachable")
    assert health.problems() == {"database": "unreachable"}
    health.set("database")
    health.draining = True
    assert health.problems() == {"drain": "draining"}
