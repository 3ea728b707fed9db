"""What can be asked of the launcher."""

from pathlib import Path

import pytest

from gpumesh_local.errors import EXIT_USAGE, LocalError
from gpumesh_local.options import Options, parse

HOME = {"GPUMESH_HOME": "/somewhere"}


def up(*arguments: str, **environment: str) -> Options:
    command, options = parse(["up", *arguments], {**HOME, **environment})
    assert command == "up"
    return options


def test_the_defaults_are_the_shipped_model_on_one_node_at_port_8080() -> None:
    options = up()
    assert (options.engine, options.model, options.nodes, options.http_port) == ("tiny", "gpumesh-tiny", 1, 8080)
    assert options.home == Path("/somewhere")
    assert options.credit_nano_usd == 10 * 10**9


def test_prices_are_taken_exactly() -> None:
    options = up("--input-price", "0.000000001", "--output-price", "1.23")
    assert (options.input_nano_usd, options.output_nano_usd) == (1, 1_230_000_000)


def test_the_http_port_comes_from_the_environment() -> None:
    assert up(GPUMESH_HTTP_PORT="9000").port(3) == 9003


def test_an_engine_elsewhere_is_named_by_url_and_model() -> None:
    options = up("--engine", "openai:http://127.0.0.1:11434", "--model", "llama3")
    assert (options.engine, options.engine_url, options.model) == ("openai", "http://127.0.0.1:11434", "llama3")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "gpt"],
        ["--engine", "openai"],
        ["--engine", "openai:http://x"],
        ["--engine", "mock:x"],
        ["--nodes", "0"],
        ["--nodes", "33"],
        ["--schedulers", "5"],
        ["--credit", "1e3"],
        ["--input-price", "-1"],
        ["--output-price", "0.1234567891"],
    ],
)
def test_what_cannot_be_done_is_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(LocalError) as caught:
        up(*arguments)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("port", ["0", "65500", "http", "-1", "8080.0", "٨٠"])
def test_a_port_that_is_none_is_wrong_usage(port: str) -> None:
    with pytest.raises(LocalError, match="GPUMESH_HTTP_PORT"):
        up(GPUMESH_HTTP_PORT=port)
