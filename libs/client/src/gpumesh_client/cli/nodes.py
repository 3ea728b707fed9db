"""node: what a provider does: enrol and run nodes, look at them."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gpumesh.node.v1 import session_pb2
from gpumesh_client.cli.common import AsJson, command, show, show_rows, time_text
from gpumesh_client.files import ConfigurationError, OperatorFile, home
from gpumesh_client.operator import Operator

app: Final = typer.Typer(no_args_is_help=True, help="Nodes: machines that answer requests.")


def register(parent: typer.Typer) -> None:
    """Adds the commands."""
    parent.add_typer(app, name="node")


@app.command("token")
@command
def token(
    provider: Annotated[str, typer.Argument(help="Whose node, prov_...")],
    lifetime: Annotated[int, typer.Option(min=60, max=86_400, help="Seconds that it works.")] = 600,
    as_json: AsJson = False,
) -> None:
    """Make a one-time token with which one node can enrol."""
    with Operator.from_file() as operator:
        made = operator.create_enrolment_token(provider, lifetime)
    content = {"enrolment_token": made.enrolment_token, "expire_time": time_text(made.expire_time)}
    show(as_json, content, made.enrolment_token)


@app.command("revoke")
@command
def revoke(node_id: str, as_json: AsJson = False) -> None:
    """End a node's session and its certificate for good."""
    with Operator.from_file() as operator:
        answer = operator.revoke_node(node_id)
    revoked = time_text(answer.revoke_time)
    show(as_json, {"node_id": node_id, "revoke_time": revoked}, f"{node_id} revoked {revoked}")


@app.command("status")
@command
def status(
    provider: Annotated[str, typer.Option(help="Only this provider's nodes.")] = "", as_json: AsJson = False
) -> None:
    """List the nodes that are connected now."""
    with Operator.from_file() as operator:
        nodes = operator.list_nodes(provider)
    rows: list[dict[str, Any]] = []
    for node in nodes:
        models = [
            f"{model.build.model_id} ({_state(model.state)}, {model.slots} slots)" for model in node.status.models
        ]
        rows.append(
            {
                "node_id": node.node_id,
                "provider_id": node.provider_id,
                "state": node.state,
                "models": models,
                "running_jobs": node.running_jobs,
                "silent_ms": node.silent_ms,
                "session_s": node.session_ms // 1000,
                "rtt_ms": node.rtt_us / 1000 if node.rtt_us else None,
                "version": node.software_version,
            }
        )
    columns = ("node_id", "provider_id", "state", "models", "running_jobs", "session_s", "rtt_ms")
    show_rows(as_json, rows, columns, "No node is connected.")


def _state(state: "session_pb2.ModelState.ValueType") -> str:
    return session_pb2.ModelState.Name(state).removeprefix("MODEL_STATE_").lower()


@app.command("run")
@command
def run(
    engine: Annotated[
        str,
        typer.Option(
            help="openai:URL (vLLM, Ollama, llama.cpp server, ...), gguf:FILE, or mock for trying things out."
        ),
    ],
    model: Annotated[str, typer.Option(help="Catalogue id of the model that it serves.")],
    engine_model: Annotated[str, typer.Option(help="The engine's own name for it. Default: the same.")] = "",
    revision: Annotated[str, typer.Option(help="Revision in the catalogue.")] = "1",
    slots: Annotated[int, typer.Option(min=1, help="Jobs at once.")] = 4,
    token: Annotated[
        str,
        typer.Option(
            envvar="GPUMESH_ENROLMENT_TOKEN",
            help="From `gpumesh node token`. On the operator's machine: made if needed.",
        ),
    ] = "",
    provider: Annotated[str, typer.Option(help="With the operator's certificate: whose node this is.")] = "prov_local",
    registry: Annotated[str, typer.Option(help="host:port of enrolment. Default: operator.json's.")] = "",
    ca: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="CA of the mesh, PEM. Default: operator.json's.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Folder for key, certificate and journal.")] = None,
) -> None:
    """Run a node in the foreground until Ctrl-C. It connects outward; no port needs to be open."""
    folder = state or home() / "nodes" / f"cli-{model.replace('/', '_')}"
    environment = {
        "GPUMESH_NODE_STATE_DIR": str(folder.absolute()),
        "GPUMESH_NODE_ENGINES": json.dumps([_engine(engine, model, engine_model, revision, slots)]),
    }
    local = None if registry and ca else OperatorFile.load()
    environment["GPUMESH_NODE_REGISTRY_ADDRESS"] = registry or (local.enrolment_target if local else "")
    environment["GPUMESH_NODE_CA_FILE"] = str(ca or (local.ca_file if local else ""))
    if not token and not (folder / "node.crt").exists():
        if local is None:
            raise ConfigurationError("A new node needs --token; the operator makes one with `gpumesh node token`.")
        with Operator(local) as operator:
            token = operator.create_enrolment_token(provider).enrolment_token
    if token:
        environment["GPUMESH_NODE_ENROLMENT_TOKEN"] = token
    _become_node(environment)


def _become_node(environment: dict[str, str]) -> None:
    """Becomes the node: signals and exit code are its own. GPUMESH_NODE_* of the person's environment win."""
    try:
        import gpumesh_node  # noqa: F401, PLC0415 -- only asks whether it is there; the client works without it
    except ImportError:
        raise ConfigurationError("The node is not installed here: pip install 'gpumesh[node]'") from None
    command_line = [sys.executable, "-m", "gpumesh_node"]
    os.execve(sys.executable, command_line, {**environment, **os.environ})  # noqa: S606 -- our own module


def _engine(engine: str, model: str, engine_model: str, revision: str, slots: int) -> dict[str, Any]:
    """One entry of GPUMESH_NODE_ENGINES."""
    kind, _, rest = engine.partition(":")
    if kind == "openai" and rest:
        served = {"model_id": model, "revision": revision}
        return {"kind": "openai", "base_url": rest, "models": {engine_model or model: served}, "slots": slots}
    if kind == "gguf" and rest:
        path = str(Path(rest).expanduser().absolute())
        return {"kind": "llamacpp", "path": path, "model_id": model, "revision": revision, "slots": slots}
    if engine == "mock":
        return {"kind": "mock", "model_id": model, "revision": revision, "slots": slots}
    raise typer.BadParameter(f"{engine}: give openai:http://host:port, gguf:FILE or mock", param_hint="--engine")
