"""account, key, credit, provider, model: what an operator does, with the certificate of operator.json."""

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from gpumesh.common.v1 import job_pb2
from gpumesh_client.cli.common import AsJson, command, show, show_rows, time_text, usd
from gpumesh_client.money import format_usd
from gpumesh_client.operator import Operator, new_owner_id

account_app: Final = typer.Typer(no_args_is_help=True, help="Buyers' accounts.")
key_app: Final = typer.Typer(no_args_is_help=True, help="API keys.")
provider_app: Final = typer.Typer(no_args_is_help=True, help="Providers, who own nodes.")
model_app: Final = typer.Typer(no_args_is_help=True, help="The model catalogue.")
_MODALITIES: Final = {"chat": job_pb2.MODALITY_CHAT, "completion": job_pb2.MODALITY_COMPLETION}
_FEATURES: Final = {
    "tools": job_pb2.FEATURE_TOOLS,
    "structured": job_pb2.FEATURE_STRUCTURED,
    "logprobs": job_pb2.FEATURE_LOGPROBS,
    "vision": job_pb2.FEATURE_VISION,
    "multiple_choices": job_pb2.FEATURE_MULTIPLE_CHOICES,
}
Value = TypeVar("Value")
IdOption = Annotated[str, typer.Option("--id", help="Id of your choice, for repeatable scripts. Default: a new one.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.add_typer(account_app, name="account")
    app.add_typer(key_app, name="key")
    app.add_typer(provider_app, name="provider")
    app.add_typer(model_app, name="model")
    app.command("credit")(credit)
    app.command("balance")(balance)


@account_app.command("create")
@command
def account_create(name: str, account_id: IdOption = "", as_json: AsJson = False) -> None:
    """Create an account for a buyer."""
    with Operator.from_file() as operator:
        account = operator.create_account(account_id or new_owner_id("acct"), name)
    content = {"account_id": account.account_id, "name": account.name, "create_time": time_text(account.create_time)}
    show(
        as_json,
        content,
        f"{account.account_id}\nNext: gpumesh credit {account.account_id} 10; gpumesh key create {account.account_id}",
    )


@account_app.command("list")
@command
def account_list(as_json: AsJson = False) -> None:
    """List accounts, newest first."""
    with Operator.from_file() as operator:
        rows = [
            {
                "account_id": account.account_id,
                "name": account.name,
                "suspended": account.suspended,
                "create_time": time_text(account.create_time),
            }
            for account in operator.list_accounts()
        ]
    show_rows(as_json, rows, ("account_id", "name", "create_time"), "No accounts yet.")


@key_app.command("create")
@command
def key_create(
    account: str,
    name: Annotated[str, typer.Option(help="For people.")] = "",
    key_id: IdOption = "",
    as_json: AsJson = False,
) -> None:
    """Create an API key. It is shown this once."""
    with Operator.from_file() as operator:
        made = operator.create_key(account, key_id or secrets.token_hex(8), name)
    content = {"key_id": made.key.key_id, "account_id": made.key.account_id, "api_key": made.api_key}
    show(as_json, content, made.api_key)


@key_app.command("list")
@command
def key_list(account: str, as_json: AsJson = False) -> None:
    """List an account's keys, without secrets."""
    with Operator.from_file() as operator:
        rows = [
            {
                "key_id": key.key_id,
                "name": key.name,
                "create_time": time_text(key.create_time),
                "revoke_time": time_text(key.revoke_time) if key.HasField("revoke_time") else None,
            }
            for key in operator.list_keys(account)
        ]
    show_rows(as_json, rows, ("key_id", "name", "create_time", "revoke_time"), "No keys yet.")


@key_app.command("revoke")
@command
def key_revoke(key_id: str, as_json: AsJson = False) -> None:
    """Revoke a key (its id, or the whole key). Every router refuses it within 5 s."""
    if key_id.startswith("gm_live_"):
        key_id = key_id.split("_")[2]
    with Operator.from_file() as operator:
        key = operator.revoke_key(key_id)
    revoked = time_text(key.revoke_time)
    show(as_json, {"key_id": key.key_id, "revoke_time": revoked}, f"{key.key_id} revoked {revoked}")


@command
def credit(
    account: str,
    amount: Annotated[int, typer.Argument(parser=usd, metavar="USD", help="For example 10 or 0.25.")],
    credit_id: IdOption = "",
    memo: Annotated[str, typer.Option(help="For the statement.")] = "",
    as_json: AsJson = False,
) -> None:
    """Give an account credit. The same --id again credits nothing more."""
    with Operator.from_file() as operator:
        available = operator.credit(account, amount, credit_id or f"cli-{secrets.token_hex(8)}", memo)
    content = {"account_id": account, "amount_nano_usd": amount, "available_nano_usd": available}
    show(as_json, content, f"{account} can spend {format_usd(available)}")


@command
def balance(owner: str, as_json: AsJson = False) -> None:
    """Show the balances of an account or provider."""
    with Operator.from_file() as operator:
        balances = operator.balances(owner)
    rows = [
        {"ledger_account": name, "balance": format_usd(nano), "balance_nano_usd": nano}
        for name, nano in sorted(balances.items())
    ]
    show_rows(as_json, rows, ("ledger_account", "balance"), f"{owner} has no balances yet.")


@provider_app.command("create")
@command
def provider_create(name: str, provider_id: IdOption = "", as_json: AsJson = False) -> None:
    """Create a provider."""
    with Operator.from_file() as operator:
        provider = operator.create_provider(provider_id or new_owner_id("prov"), name)
    content = {"provider_id": provider.provider_id, "name": provider.name}
    show(as_json, content, f"{provider.provider_id}\nNext: gpumesh node token {provider.provider_id}")


@model_app.command("add")
@command
def model_add(
    model: Annotated[str, typer.Argument(help="Id that requests name, for example qwen3-8b.")],
    context: Annotated[int, typer.Option(min=1, help="Context window, tokens.")],
    revision: Annotated[str, typer.Option(help="Nodes must serve the same one.")] = "1",
    alias: Annotated[list[str] | None, typer.Option(help="Another name; may be repeated.")] = None,
    licence: Annotated[str, typer.Option(help="SPDX id of the weights' licence.")] = "",
    quantisation: Annotated[str, typer.Option(help="For example Q4_K_M.")] = "",
    owner: Annotated[str, typer.Option(help="Who published the weights.")] = "",
    modality: Annotated[list[str] | None, typer.Option(help=f"{', '.join(_MODALITIES)}; default: all.")] = None,
    feature: Annotated[list[str] | None, typer.Option(help=f"{', '.join(_FEATURES)}; default: all but vision.")] = None,
    max_output: Annotated[
        int, typer.Option(min=0, help="Most output tokens of a request. 0: what the context leaves.")
    ] = 0,
    template_overhead: Annotated[int, typer.Option(min=0, help="Tokens that the chat template adds per message.")] = 8,
    tokenizer: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Its tokenizer.json, to count prompts.")
    ] = None,
    input_price: Annotated[
        int | None, typer.Option(parser=usd, metavar="USD", help="Per 1,000,000 prompt tokens.")
    ] = None,
    output_price: Annotated[
        int | None, typer.Option(parser=usd, metavar="USD", help="Per 1,000,000 output tokens.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a model into the catalogue, or replace its entry. Without a price nobody can be charged, so give both."""
    if (input_price is None) != (output_price is None):
        raise typer.BadParameter("--input-price and --output-price belong together")
    entry = job_pb2.Model(
        model_id=model,
        revision=revision,
        aliases=alias or [],
        context_tokens=context,
        licence=licence,
        modalities=[_named(_MODALITIES, name, "--modality") for name in modality or _MODALITIES],
        features=[_named(_FEATURES, name, "--feature") for name in feature or _FEATURES if feature or name != "vision"],
        quantisation=quantisation,
        max_output_tokens=max_output,
        owner=owner,
        template_overhead_tokens=template_overhead,
    )
    with Operator.from_file() as operator:
        if tokenizer is not None:
            content = tokenizer.read_bytes()
            entry.tokenizer_sha256 = hashlib.sha256(content).hexdigest()
            operator.put_tokenizer(content)
        stored = operator.put_model(entry)
        if input_price is not None and output_price is not None:
            operator.set_price(model, input_price, output_price)
    result = {"model_id": stored.model_id, "revision": stored.revision, "tokenizer_sha256": stored.tokenizer_sha256}
    show(as_json, result, f"{stored.model_id} is in the catalogue, revision {stored.revision}")


def _named(table: Mapping[str, Value], name: str, option: str) -> Value:
    if name not in table:
        raise typer.BadParameter(f"{name}: give one of {', '.join(table)}", param_hint=option)
    return table[name]


@model_app.command("list")
@command
def model_list(as_json: AsJson = False) -> None:
    """List the catalogue as the registry has it."""
    with Operator.from_file() as operator:
        rows = [
            {
                "model": model.model_id,
                "revision": model.revision,
                "aliases": list(model.aliases),
                "context_tokens": model.context_tokens,
                "quantisation": model.quantisation,
                "licence": model.licence,
                "tokenizer_sha256": model.tokenizer_sha256,
                "create_time": time_text(model.create_time),
            }
            for model in operator.list_models()
        ]
    columns = ("model", "revision", "aliases", "context_tokens", "quantisation", "licence", "create_time")
    show_rows(as_json, rows, columns, "No models yet.")


@model_app.command("remove")
@command
def model_remove(model: str, as_json: AsJson = False) -> None:
    """Take a model out of the catalogue; requests that run finish."""
    with Operator.from_file() as operator:
        operator.remove_model(model)
    show(as_json, {"model_id": model, "removed": True}, f"{model} removed")
