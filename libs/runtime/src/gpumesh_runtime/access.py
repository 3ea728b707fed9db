"""The authorisation matrix, generated from the `access` option of every RPC: nothing is allowed by hand."""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Final

from google.protobuf import descriptor, descriptor_pool

import gpumesh
from gpumesh.common.v1 import access_pb2
from gpumesh_runtime.identity import Role

# The same numbers by construction; a role added to the proto must be added to identity.Role (a test compares).
_ROLES: Final = {int(role): role for role in Role}


class MissingAccessError(Exception):
    """An RPC carries no access option, or an empty one. A mistake in a proto: it stops the server from starting and
    fails CI.
    """


def method_path(method: descriptor.MethodDescriptor) -> str:
    """ "/package.Service/Method", as in gRPC."""
    return f"/{method.containing_service.full_name}/{method.name}"


def roles_of(method: descriptor.MethodDescriptor) -> frozenset[Role]:
    """Who may call a method. Raises MissingAccessError."""
    options = method.GetOptions()
    if not options.HasExtension(access_pb2.access):
        raise MissingAccessError(f"{method.full_name} has no (gpumesh.common.v1.access) option")
    numbers = options.Extensions[access_pb2.access].roles
    if not numbers or any(number not in _ROLES for number in numbers):
        raise MissingAccessError(f"{method.full_name} names no valid role in its access option")
    return frozenset(_ROLES[number] for number in numbers)


def matrix(services: Iterable[descriptor.ServiceDescriptor] | None = None) -> Mapping[str, frozenset[Role]]:
    """Method path -> roles that may call it, for the given services or all. Raises MissingAccessError."""
    chosen = all_services() if services is None else services
    return {method_path(method): roles_of(method) for service in chosen for method in service.methods}


def all_services() -> list[descriptor.ServiceDescriptor]:
    """Every service under `gpumesh`, by name. Imports all of it: for tests and
    tools, not for services.
    """
    found: dict[str, descriptor.ServiceDescriptor] = {}
    for module in pkgutil.walk_packages(gpumesh.__path__, "gpumesh."):
        if module.name.endswith("_pb2"):
            services = importlib.import_module(module.name).DESCRIPTOR.services_by_name
            found.update({service.full_name: service for service in services.values()})
    return [found[name] for name in sorted(found)]


def service_named(full_name: str) -> descriptor.ServiceDescriptor:
    """A service whose generated module is already imported. Raises KeyError."""
    return descriptor_pool.Default().FindServiceByName(full_name)
