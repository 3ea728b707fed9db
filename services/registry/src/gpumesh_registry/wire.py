"""Our records to and from the wire. Total and pure."""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from gpumesh.common.v1 import job_pb2
from gpumesh.registry.v1 import account_service_pb2, directory_service_pb2
from gpumesh_registry.domain.catalogue import ModelEntry
from gpumesh_registry.domain.directory import Change
from gpumesh_registry.domain.keys import ApiKey, KeyIdentity
from gpumesh_registry.domain.owners import Account, Provider

# What this version knows; 0 is never valid.
KNOWN_MODALITIES = frozenset(number for number in job_pb2.Modality.values() if number)
KNOWN_FEATURES = frozenset(number for number in job_pb2.Feature.values() if number)


def time_to_wire(moment: datetime) -> Timestamp:
    """A time-zone aware moment, to the microsecond."""
    timestamp = Timestamp()
    timestamp.FromDatetime(moment.astimezone(UTC))
    return timestamp


def time_from_wire(timestamp: Timestamp) -> datetime:
    """UTC."""
    return timestamp.ToDatetime(tzinfo=UTC)


def account_to_wire(account: Account) -> account_service_pb2.Account:
    """A buyer's account."""
    return account_service_pb2.Account(
        account_id=account.account_id,
        name=account.name,
        create_time=time_to_wire(account.create_time),
        suspended=account.suspended,
    )


def key_to_wire(key: ApiKey) -> account_service_pb2.Key:
    """A key, without anything secret."""
    return account_service_pb2.Key(
        key_id=key.key_id,
        account_id=key.account_id,
        name=key.name,
        create_time=time_to_wire(key.create_time),
        revoke_time=time_to_wire(key.revoke_time) if key.revoke_time else None,
    )


def provider_to_wire(provider: Provider) -> account_service_pb2.Provider:
    """A provider."""
    return account_service_pb2.Provider(
        provider_id=provider.provider_id, name=provider.name, create_time=time_to_wire(provider.create_time)
    )


def model_from_wire(model: job_pb2.Model) -> ModelEntry:
    """As sent, not yet validated."""
    return ModelEntry(
        model_id=model.model_id,
        revision=model.revision,
        aliases=tuple(model.aliases),
        context_tokens=model.context_tokens,
        licence=model.licence,
        modalities=tuple(model.modalities),
        features=tuple(model.features),
        quantisation=model.quantisation,
        tokenizer_sha256=model.tokenizer_sha256,
        max_output_tokens=model.max_output_tokens,
        owner=model.owner,
        template_overhead_tokens=model.template_overhead_tokens,
        create_time=time_from_wire(model.create_time) if model.HasField("create_time") else None,
    )


def model_to_wire(entry: ModelEntry) -> job_pb2.Model:
    """An entry of the catalogue."""
    return job_pb2.Model(
        model_id=entry.model_id,
        revision=entry.revision,
        aliases=entry.aliases,
        context_tokens=entry.context_tokens,
        licence=entry.licence,
        # Stored numbers were checked against the enums; a newer registry's value passes through a proto3 enum unharmed.
        modalities=[job_pb2.Modality.ValueType(number) for number in entry.modalities],
        features=[job_pb2.Feature.ValueType(number) for number in entry.features],
        quantisation=entry.quantisation,
        tokenizer_sha256=entry.tokenizer_sha256,
        max_output_tokens=entry.max_output_tokens,
        create_time=time_to_wire(entry.create_time) if entry.create_time else None,
        owner=entry.owner,
        template_overhead_tokens=entry.template_overhead_tokens,
    )


def identity_to_wire(identity: KeyIdentity) -> bytes:
    """Body of the Reply to LookupKey."""
    return directory_service_pb2.KeyIdentity(
        key_id=identity.key_id, account_id=identity.account_id, cache_seconds=identity.cache_seconds
    ).SerializeToString()


def change_to_wire(change: Change) -> bytes:
    """Body of an Update."""
    return directory_service_pb2.Directory(
        revoked_key_ids=change.revoked_keys,
        suspended_account_ids=change.suspended_accounts,
        restored_account_ids=change.restored_accounts,
        revoked_node_ids=change.revoked_nodes,
        models=[model_to_wire(entry) for entry in change.models or ()],
        catalogue_whole=change.models is not None,
    ).SerializeToString()
