"""Engines from their settings: the one place that knows all adapters."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Final

from gpumesh_node.config import LlamaCppSpec, MockSpec, ModelSpec, OpenAiSpec
from gpumesh_node.domain.mock_script import ScriptError, make_script
from gpumesh_node.domain.models import Feature, ServedModel
from gpumesh_node.engines.base import Engine
from gpumesh_node.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from gpumesh_node.engines.mock import MockEngine
from gpumesh_node.engines.openai_http import HttpEngineSettings, OpenAiHttpEngine
from gpumesh_runtime.config import ConfigError

_FEATURES: Final = {feature.name.lower(): feature for feature in Feature}


def make_engines(specs: Sequence[OpenAiSpec | LlamaCppSpec | MockSpec]) -> list[Engine]:
    """One engine per entry, in order. Raises ConfigError."""
    return [_make(spec, spec.name or f"{spec.kind}-{place}") for place, spec in enumerate(specs, start=1)]


def _make(spec: OpenAiSpec | LlamaCppSpec | MockSpec, name: str) -> Engine:
    if isinstance(spec, OpenAiSpec):
        return _openai(spec, name)
    if isinstance(spec, LlamaCppSpec):
        return _llamacpp(spec, name)
    return _mock(spec, name)


def _openai(spec: OpenAiSpec, name: str) -> Engine:
    models = {}
    for engine_name, given in spec.models.items():
        model = ModelSpec(model_id=given) if isinstance(given, str) else given
        models[engine_name] = ServedModel(
            model.model_id,
            spec.slots,
            revision=model.revision,
            quantisation=model.quantisation,
            engine_name=spec.engine_name,
            engine_version=spec.engine_version,
            context_tokens=model.context_tokens,
            features=_features(model.features),
        )
    return OpenAiHttpEngine(
        HttpEngineSettings(
            name=name,
            base_url=spec.base_url,
            models=models,
            api_key=spec.api_key.get_secret_value(),
            always_stream=spec.always_stream,
            split_choices=spec.split_choices,
        )
    )


def _llamacpp(spec: LlamaCppSpec, name: str) -> Engine:
    model = ServedModel(
        spec.model_id,
        spec.slots,
        revision=spec.revision,
        quantisation=spec.quantisation,
        engine_name="llama.cpp",
        engine_version=_llamacpp_version(),
        context_tokens=spec.context_tokens,
        features=_features(spec.features),
        kv_tokens=spec.slots * spec.context_tokens,
    )
    return LlamaCppEngine(LlamaCppSettings(name, str(spec.path), model, spec.threads, spec.gpu_layers))


def _mock(spec: MockSpec, name: str) -> Engine:
    try:
        script = make_script(spec.script)
    except ScriptError as err:
        raise ConfigError([f"GPUMESH_NODE_ENGINES: {err}"]) from None
    model = ServedModel(
        spec.model_id,
        spec.slots,
        revision=spec.revision,
        engine_name="mock-model",
        engine_version="1",
        context_tokens=spec.context_tokens,
        features=(Feature.TOOLS, Feature.MULTIPLE_CHOICES),
    )
    return MockEngine(name, model, script)


def _features(names: Iterable[str]) -> tuple[Feature, ...]:
    return tuple(_FEATURES[name] for name in names)


def _llamacpp_version() -> str:
    """The llama.cpp build in the wheel: xllamacpp's last version number, as llama.cpp writes it ("b11549")."""
    try:
        return "b" + importlib.metadata.version("xllamacpp").rpartition(".")[2]
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            ["GPUMESH_NODE_ENGINES: the llamacpp engine needs xllamacpp: pip install 'gpumesh[node]'"]
        ) from None
