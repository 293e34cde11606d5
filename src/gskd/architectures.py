"""Networks by name (views -> models -> taps).

==============================  =================================================================================
``smp:Architecture``            segmentation-models-pytorch, with any of its and timm's encoders
``torchvision:function``        torchvision.models.segmentation
``transformers:model_type``     transformers, from a configuration: segformer, upernet, dpt, ...
``hf:name`` or ``hf:folder``    transformers, with weights: a model of the Hugging Face hub, or one in a folder
``package.module:callable``     anything that returns an ``nn.Module``; code is run, see `require_trusted`
==============================  =================================================================================
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from gskd.errors import GSKDError, count, described, few, near_names

IMPORTS_ALLOWED = "GSKD_ALLOW_IMPORTS"
"""The environment variable that lets recipes name code; the command line's --allow-imports sets it."""


def require_trusted(name: str, where: str) -> None:
    """Refuses an import path that a recipe names, unless whoever runs it has allowed that.

    Args:
        name: of the model, see `build_model`.
        where: its place in the recipe, for the error.

    Raises:
        GSKDError: it is an import path, and ``GSKD_ALLOW_IMPORTS`` is not set.
    """
    source, colon, _ = name.partition(":")
    if colon and source not in _SOURCES and os.environ.get(IMPORTS_ALLOWED, "") in ("", "0"):
        raise GSKDError(
            f"{where}.name: {name} is Python code that would be run; if you trust it say --allow-imports, or set"
            f" {IMPORTS_ALLOWED}=1"
        )


def build_model(
    name: str,
    args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    trained: bool = False,
) -> nn.Module:
    """Makes a network.

    Args:
        name: its source and its name there, see the top of this module.
        args: arguments of the architecture, function, configuration or callable, for example ``{"encoder_name":
            "resnet34"}``. The defaults of each library hold: smp downloads ImageNet weights unless ``encoder_weights``
            is ``None``, torchvision unless ``weights_backbone`` is. For ``hf:`` they are those of ``from_pretrained``,
            and ``pretrained: False`` leaves out the weights.
        num_classes: K. The head is built with it; that of ``hf:`` is as its weights have it, unless ``args`` say
            ``num_labels`` and ``ignore_mismatched_sizes``; an import path gets it only where ``args`` does not fix
            the number of classes and the callable has a parameter called ``num_classes``.
        trained: it is a teacher, whose weights have to be whole: that of ``hf:`` must not begin with a part at random.

    Raises:
        GSKDError: unknown source, architecture, encoder, module or callable, or arguments that it refuses; ``trained``,
            and weights are missing.
    """
    arguments = dict(args or {})
    source, colon, target = name.partition(":")
    if not colon or not source or not target:
        sources = ", ".join(f"{known}:..." for known in _SOURCES)
        raise GSKDError(f"model {name!r}: expected smp:Architecture or package.module:callable; known: {sources}")
    build = _BUILDERS.get(source)
    if source == "hf":
        model = _build_hf(target, arguments, trained)
    elif build is not None:
        model = build(target, arguments, num_classes)
    else:
        model = _build_import(source, target, arguments, num_classes)
    if not isinstance(model, nn.Module):
        raise GSKDError(f"model {name!r}: expected an nn.Module, {target} returned {type(model).__name__}")
    return model


def without_pretraining(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the same network whose weights are about to be loaded: nobody must download others first."""
    none: dict[str, dict[str, Any]] = {
        "smp": {"encoder_weights": None},
        "torchvision": {"weights": None, "weights_backbone": None},
        "hf": {"pretrained": False},
    }
    source, _, target = name.partition(":")
    # With ``weights`` torchvision adds an auxiliary head on its own where the function has one.
    implied = {"aux_loss": True} if source == "torchvision" and args.get("weights") and _has_aux(target) else {}
    return {**implied, **args, **none.get(source, {})}


def has_own_weights(name: str, args: Mapping[str, Any]) -> bool:
    """Whether a model comes trained as a whole, or from code that may load what it wants; else it is random."""
    source = name.partition(":")[0]
    if source == "torchvision":
        return bool(args.get("weights"))
    if source == "hf":  # a head of another size starts at random
        return bool(args.get("pretrained", True)) and not args.get("ignore_mismatched_sizes")
    return source not in ("smp", "transformers")


def _build_import(source: str, target: str, arguments: dict[str, Any], num_classes: int | None) -> Any:
    import gskd._torchvision  # noqa: F401 (the module may import torchvision)

    name = f"{source}:{target}"
    try:
        module = importlib.import_module(source)
    except Exception as error:  # a foreign module may raise anything while it is imported
        raise GSKDError(f"model {name!r}: cannot import {source}: {described(error)}") from error
    if not hasattr(module, target):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise GSKDError(f"model {name!r}: {source} has no {target}{near_names(target, known)}")
    factory = getattr(module, target)
    if num_classes is not None and "num_classes" not in arguments and _takes(factory, "num_classes"):
        arguments["num_classes"] = num_classes
    return _call(name, factory, arguments)


def _build_smp(architecture: str, arguments: dict[str, Any], num_classes: int | None) -> Any:
    import gskd._torchvision  # noqa: F401 (must come before smp, which imports torchvision)

    # smp is imported here since it takes seconds, which the command line's help should not.
    import segmentation_models_pytorch as smp  # isort: skip

    architectures = {model.__name__: model for model in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if architecture not in architectures:
        raise GSKDError(f"model 'smp:{architecture}': unknown architecture{near_names(architecture, architectures)}")
    encoder = arguments.get("encoder_name", "resnet34")
    encoders = _smp_encoders()
    # timm names may end in the tag of their weights (tu-resnet18.a1_in1k), and hf-hub names are not listed anywhere.
    if isinstance(encoder, str) and encoder.partition(".")[0] not in encoders and not encoder.startswith("tu-hf"):
        raise GSKDError(f"model 'smp:{architecture}': unknown encoder {encoder!r}{near_names(encoder, encoders)}")
    known = inspect.signature(architectures[architecture]).parameters
    for argument in arguments:
        # smp hands what it does not know to timm's encoders, and without a word drops it for its own.
        if argument not in known and not str(encoder).startswith("tu-"):
            raise GSKDError(f"model 'smp:{architecture}': unknown argument {argument!r}{near_names(argument, known)}")
    _set_classes(f"smp:{architecture}", arguments, "classes", num_classes)
    return _call(f"smp:{architecture}", architectures[architecture], arguments)


def _smp_encoders() -> list[str]:
    import segmentation_models_pytorch as smp
    import timm

    return [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]


def _build_torchvision(function: str, arguments: dict[str, Any], num_classes: int | None) -> Any:
    import gskd._torchvision  # noqa: F401 (lets torchvision be imported)

    from torchvision.models import get_model, list_models, segmentation  # isort: skip

    known = list_models(module=segmentation)
    if function not in known:
        raise GSKDError(f"model 'torchvision:{function}': unknown function{near_names(function, known)}")
    _set_classes(f"torchvision:{function}", arguments, "num_classes", num_classes)
    return _call(f"torchvision:{function}", lambda **rest: get_model(function, **rest), arguments)


def _has_aux(function: str) -> bool:
    import gskd._torchvision  # noqa: F401 (lets torchvision be imported)

    from torchvision.models import get_model_builder, list_models, segmentation  # isort: skip

    return function in list_models(module=segmentation) and _takes(get_model_builder(function), "aux_loss")


def _build_transformers(model_type: str, arguments: dict[str, Any], num_classes: int | None) -> Any:
    transformers = _transformers(f"transformers:{model_type}")
    kind = _segmenter(transformers, model_type, f"transformers:{model_type}")
    _set_classes(f"transformers:{model_type}", arguments, "num_labels", num_classes)

    def build(**rest: Any) -> Any:
        return kind.from_config(transformers.AutoConfig.for_model(model_type, **rest))

    return _call(f"transformers:{model_type}", build, arguments)


def _build_hf(name: str, arguments: dict[str, Any], trained: bool) -> Any:
    """With safetensors only, and no code of the hub's: both are what could run somebody else's program here."""
    transformers = _transformers(f"hf:{name}")
    if forbidden := {"trust_remote_code", "use_safetensors", "weights_only"} & arguments.keys():
        raise GSKDError(f"model 'hf:{name}': args {few(sorted(forbidden))}: code and pickles of the hub are not loaded")
    place = os.path.expanduser(name)
    without: list[str] = []

    def build(pretrained: bool = True, **rest: Any) -> Any:
        # What is no part of the configuration says how to load, and nothing of how to build.
        config, _ = transformers.AutoConfig.from_pretrained(
            place, trust_remote_code=False, return_unused_kwargs=True, **rest
        )
        kind = _segmenter(transformers, config.model_type, f"hf:{name}")
        if not pretrained:
            return kind.from_config(config)
        model, loaded = kind.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **rest
        )
        # Buffers may be computed; mismatched keys come with their two shapes.
        fresh = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
        without.extend(key for key, _ in model.named_parameters() if key in fresh)
        return model

    model = _call(f"hf:{name}", build, arguments)
    if trained and without:
        raise GSKDError(
            f"model 'hf:{name}': {count(len(without), 'tensor')} not among its weights, and random in a teacher:"
            f" {few(sorted(without))}"
        )
    return model


def _segmenter(transformers: Any, model_type: str, name: str) -> Any:
    """transformers' maker of a kind of model: one that gives logits, or masks of queries."""
    names = transformers.models.auto.modeling_auto
    if model_type in names.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        return transformers.AutoModelForSemanticSegmentation
    universal = names.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
    if model_type in universal:
        return transformers.AutoModelForUniversalSegmentation
    known = [*names.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, *universal]
    raise GSKDError(f"model {name!r}: {model_type!r} is no model_type that segments{near_names(model_type, known)}")


_BUILDERS = {
    "smp": _build_smp,
    "torchvision": _build_torchvision,
    "transformers": _build_transformers,
}
_SOURCES = (*_BUILDERS, "hf")


def _transformers(name: str) -> Any:
    import gskd._torchvision  # noqa: F401 (transformers imports torchvision where there is one)

    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise GSKDError(f"model {name!r}: needs transformers, pip install 'gskd[transformers]': {error}") from None


def _set_classes(name: str, arguments: dict[str, Any], key: str, num_classes: int | None) -> None:
    if num_classes is None:
        return
    if arguments.get(key, num_classes) != num_classes:
        raise GSKDError(f"model {name!r}: args.{key} is {arguments[key]}, the data has {num_classes}")
    arguments[key] = num_classes


def _takes(factory: Any, parameter: str) -> bool:
    try:
        return parameter in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def _call(name: str, factory: Any, arguments: dict[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except Exception as error:  # whatever a foreign constructor raises, the cause is what the recipe asked of it
        raise GSKDError(f"model {name!r}: cannot be built with {arguments}: {described(error)}") from error
