"""Errors: one family, a closed list of reasons, and their two ways over the wire."""

import ast
import asyncio
import inspect
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata

from gpumesh.common.v1.link_pb2 import Failure
from gpumesh_runtime import reasons
from gpumesh_runtime.errors import (
    InsufficientBalance,
    Internal,
    InvalidArgument,
    MeshError,
    NotFound,
    PayloadTooLarge,
    Reason,
    ResourceExhausted,
    Unavailable,
    as_mesh_error,
    code_of,
    error_hash,
    from_failure,
    from_grpc,
    safe_traceback,
    to_failure,
    to_grpc,
)


def rpc_error(code: grpc.StatusCode, details: bytes | None) -> AioRpcError:
    trailing: Any = Metadata(*((("grpc-status-details-bin", details),) if details is not None else ()))
    return AioRpcError(code, Metadata(), trailing, details="raw text of gRPC with 10.0.0.1:443 in it")


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_grpc_code_a_class_and_survives_both_wires(reason: Reason) -> None:
    err = MeshError.of(reason, "One sentence.", metadata={"param": "model"}, retry_after_s=1.5, retryable=True)
    assert err.code_name == code_of(reason).name
    status = to_grpc(err)
    for back in (from_failure(to_failure(err)), from_grpc(rpc_error(code_of(reason), status.SerializeToString()))):
        assert type(back) is type(err)
        assert (back.reason, back.message, back.metadata) == (reason, "One sentence.", {"param": "model"})
        assert (back.retry_after_s, back.retryable) == (1.5, True)


def test_every_reason_is_explained_by_the_comment_above_it_and_named_as_its_value() -> None:
    lines = inspect.getsource(reasons).splitlines()
    tree = ast.parse(inspect.getsource(reasons))
    enum = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    members = [node for node in enum.body if isinstance(node, ast.Assign)]
    assert len(members) == len(Reason)
    for member in members:
        assert lines[member.lineno - 2].strip().startswith("# "), lines[member.lineno - 1]
        assert ast.literal_eval(member.value) == member.targets[0].id  # type: ignore[attr-defined]  # enum members are names


def test_each_reason_belongs_to_exactly_one_code() -> None:
    listed = [reason for group in reasons._BY_CODE.values() for reason in group]
    assert sorted(listed) == sorted(Reason)


def test_status_carries_exactly_one_error_info_of_our_domain() -> None:
    status = to_grpc(NotFound(Reason.UNKNOWN_MODEL, "No such model."))
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    info = error_details_pb2.ErrorInfo()
    assert len(infos) == 1
    assert infos[0].Unpack(info)
    assert (info.domain, info.reason) == ("gpumesh", "UNKNOWN_MODEL")
    assert not any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


def test_retry_info_is_there_when_the_time_is_known() -> None:
    status = to_grpc(ResourceExhausted(Reason.QUEUE_FULL, "Busy.", retry_after_s=0.25))
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() == 250


def test_classes_that_have_a_name_of_their_own_are_made_for_their_reasons() -> None:
    assert isinstance(MeshError.of(Reason.PAYLOAD_TOO_LARGE), PayloadTooLarge)
    assert isinstance(MeshError.of(Reason.PAYLOAD_TOO_LARGE), InvalidArgument)
    assert isinstance(MeshError.of(Reason.INSUFFICIENT_BALANCE), InsufficientBalance)
    assert MeshError.of(Reason.NO_CAPACITY).message == "No capacity."


def test_an_unknown_exception_leaves_as_a_neutral_sentence_and_the_hash_that_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        raise ValueError("what the client wrote")
    except ValueError as err:
        failure = to_failure(err)
        digest = error_hash(err)
    assert failure.reason == "INTERNAL"
    assert digest in failure.message
    assert failure.metadata["hash"] == digest
    assert "what the client wrote" not in str(failure)
    logged = capsys.readouterr()
    assert digest in logged.out + logged.err


def test_the_same_bug_has_the_same_hash_and_another_line_another_one() -> None:
    def once(value: str) -> str:
        try:
            int(value)
        except ValueError as err:
            return error_hash(err)
        raise AssertionError

    def elsewhere() -> str:
        try:
            int("c")
        except ValueError as err:
            return error_hash(err)
        raise AssertionError

    assert once("a") == once("b") != elsewhere()
    assert len(once("a")) == 12


def test_cancellation_is_raised_again_never_converted() -> None:
    for convert in (to_failure, to_grpc, as_mesh_error):
        with pytest.raises(asyncio.CancelledError):
            convert(asyncio.CancelledError())


def test_a_reason_of_a_newer_version_becomes_internal_and_is_kept() -> None:
    err = from_failure(Failure(reason="BRAND_NEW", message="m"))
    assert isinstance(err, Internal)
    assert err.metadata["unknown_reason"] == "BRAND_NEW"


def test_a_newer_reason_in_a_status_falls_back_to_the_code() -> None:
    status = status_pb2.Status(code=14, message="m")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="BRAND_NEW", domain="gpumesh"))
    assert isinstance(from_grpc(rpc_error(grpc.StatusCode.UNAVAILABLE, status.SerializeToString())), Unavailable)


def test_a_status_without_our_error_info_is_translated_by_code_and_hides_grpc_texts() -> None:
    err = from_grpc(rpc_error(grpc.StatusCode.UNAVAILABLE, None))
    assert isinstance(err, Unavailable)
    assert err.retryable
    assert "10.0.0.1" not in err.message
    assert from_grpc(rpc_error(grpc.StatusCode.DATA_LOSS, None)).reason is Reason.INTERNAL


def test_a_write_that_met_the_end_of_its_call_is_unavailable_not_a_bug() -> None:
    err = AioRpcError(
        grpc.StatusCode.INTERNAL, Metadata(), Metadata(), "Internal error from Core", 'Failed "execute_batch": (...)'
    )
    assert from_grpc(err).reason is Reason.UNAVAILABLE
    assert from_grpc(rpc_error(grpc.StatusCode.INTERNAL, None)).reason is Reason.INTERNAL


def test_a_foreign_error_info_is_not_taken_for_ours() -> None:
    status = status_pb2.Status(code=5)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="INVALID_API_KEY", domain="googleapis.com"))
    assert from_grpc(rpc_error(grpc.StatusCode.NOT_FOUND, status.SerializeToString())).reason is Reason.NOT_FOUND


def test_a_traceback_names_lines_and_types_but_quotes_only_harmless_texts() -> None:
    def inner() -> None:
        raise KeyError("prompt")

    try:
        try:
            inner()
        except KeyError as err:
            raise OSError(28, "No space left on device") from err
    except OSError as err:
        text = safe_traceback(err)
    assert "OSError: [Errno 28] No space left on device" in text
    assert "KeyError" in text
    assert "inner" in text
    assert "prompt" not in text


def test_timeouts_become_deadline_exceeded() -> None:
    assert as_mesh_error(TimeoutError()).reason is Reason.DEADLINE_EXCEEDED
