"""Where the mesh is, and what is said when the files do not tell."""

import json
from pathlib import Path

import pytest

from gpumesh_client.files import ClientFile, ConfigurationError, OperatorFile

CLIENT = {"base_url": "http://h/v1", "api_key": "gm_live_k", "model": "m", "grpc_target": "h:1", "ca_file": "/ca.crt"}


def test_client_json_is_read_and_more_fields_do_not_hurt(tmp_path: Path) -> None:
    path = tmp_path / "client.json"
    path.write_text(json.dumps({**CLIENT, "later": 1}))
    assert ClientFile.load(path) == ClientFile(**CLIENT)


def test_the_key_is_not_printed(tmp_path: Path) -> None:
    assert "gm_live_k" not in repr(ClientFile(**CLIENT))


def test_scheduler_targets_become_a_tuple(tmp_path: Path) -> None:
    path = tmp_path / "operator.json"
    names = ("registry_target", "enrolment_target", "metering_target", "cert_file", "key_file", "ca_file")
    path.write_text(json.dumps({**dict.fromkeys(names, "x"), "scheduler_targets": ["a:1", "b:2"]}))
    assert OperatorFile.load(path).scheduler_targets == ("a:1", "b:2")


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"api_key": "x"}'])
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, content: str) -> None:
    path = tmp_path / "client.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"client\.json"):
        ClientFile.load(path)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="make up"):
        ClientFile.load(tmp_path / "client.json")
