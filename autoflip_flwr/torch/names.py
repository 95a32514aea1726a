"""Find a PyTorch model's parameters by the names of the arrays that the server sent, even if the model is wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

import torch
from torch import nn

from autoflip_flwr.core.layout import ArraySpec, Layout

Tensors = dict[str, torch.Tensor]
Names = Mapping[str, str | torch.Tensor]
"""The server's name of an array -> the model's name of the parameter, or the parameter itself."""

_WRAPPERS = frozenset({"_orig_mod", "module", "_module"})
"""Name parts that torch.compile, (Distributed)DataParallel and Opacus add to the parameters of what they wrap."""


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's modules, each with the prefix of its parameters' names. A shared one comes once per name."""
    yield prefix, model  # unlike named_modules, this hashes nothing: a module may define its own __eq__
    for name, child in list(model._modules.items()):  # a copy, since another thread may change the dict
        if child is not None:
            yield from modules(child, f"{prefix}{name}.")


def parameters(model: nn.Module, prefix: str = "") -> Tensors:
    """Return a model's parameters, each under all of its names."""
    return {
        before + name: parameter
        for before, module in modules(model, prefix)
        for name, parameter in list(module._parameters.items())
        if parameter is not None
    }


def unwrapped(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the prefix that wrappers put in front of a model's names, and the model inside them."""
    prefix = ""
    while len(model._modules) == 1 and not [*model._parameters, *model._buffers]:
        ((name, child),) = model._modules.items()
        if child is None or name not in _WRAPPERS:
            break
        prefix, model = f"{prefix}{name}.", child
    return prefix, model


def find(model: nn.Module, prefix: str, layout: Layout, names: Names) -> Tensors:
    """Return the parameters that match the server's prunable arrays, under the server's names.

    A name is looked up in ``names``, then as it is, then without the parts that wrappers add, then as a name that has
    more parts in the model: PEFT sends ``lora_A.weight`` for ``lora_A.default.weight``. If the server sent a list of
    arrays, its names are positions. Buffers are skipped: no optimizer trains them.

    Parameters
    ----------
    model : Module
        The model, without its wrappers.
    prefix : str
        What the wrappers put in front of its names.
    layout : Layout
        Layout of the arrays that the server sent.
    names : Mapping[str, str | Tensor]
        Names or parameters given by the user.

    Raises
    ------
    ValueError
        If a prunable array is not in the model, matches several of its parameters, or has another shape there.
    """
    trained = parameters(model, prefix)
    buffers = {
        before + name: buffer
        for before, module in modules(model, prefix)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    saved = _saved(model, prefix, {**buffers, **trained})
    own = {**saved, **buffers, **trained}
    places = _positions(layout, saved, trained, buffers)
    bare: dict[str, list[str]] = {}
    for name in own:
        bare.setdefault(_bare(name), []).append(name)

    found: Tensors = {}
    fitting: dict[str, list[str]] = {}
    for spec in layout.prunable:
        wanted = names.get(spec.name, places.get(spec.name, spec.name))
        if isinstance(wanted, torch.Tensor):
            found[spec.name] = wanted
            continue
        fits = [wanted] if wanted in own else bare.get(_bare(wanted), [])
        fitting[spec.name] = fits or ([] if spec.name in names else _longer(spec, layout, trained))
    if lacking := [name for name, fits in fitting.items() if not fits]:
        raise ValueError(_lacking(lacking, layout, trained, names))
    _check_unique(fitting, own)
    ours = {id(parameter) for parameter in trained.values()}
    found |= {name: own[fits[0]] for name, fits in fitting.items() if id(own[fits[0]]) in ours}
    for name, tensor in found.items():
        check(fitting.get(name, [name])[0], tensor, layout[name])
    return found


def check(name: str, tensor: torch.Tensor, sent: ArraySpec) -> None:
    """Raise ``ValueError`` unless the model's tensor is unsharded and has the shape that the server sent."""
    if hasattr(tensor, "placements"):  # a DTensor
        raise ValueError(f"parameter {name!r} is sharded: a mask holds on whole ones, train without fully_shard")
    if tuple(tensor.shape) != sent.shape:
        raise ValueError(f"parameter {name!r} has shape {tuple(tensor.shape)}, the mask {sent.shape}")


def _bare(name: str) -> str:
    """Return a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _saved(model: nn.Module, prefix: str, own: Tensors) -> Tensors:
    """Return the state dict's tensors, in its order; the model's own ones if a hook renames them there."""
    saved = {prefix + name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    if any(name not in own for name in saved):
        by_memory = {(tensor.data_ptr(), tensor.shape): tensor for tensor in own.values()}
        saved = {name: by_memory.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in saved.items()}
    return saved


def _positions(layout: Layout, saved: Tensors, trained: Tensors, buffers: Tensors) -> dict[str, str]:
    """Map the server's names to the model's, if the server's names are positions in a list of arrays."""
    if [spec.name for spec in layout.specs] != [str(position) for position in range(len(layout.specs))]:
        return {}
    shapes = [spec.shape for spec in layout.specs]
    parameters, others = _once(trained), _once(buffers)
    moving = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    for own in (saved, parameters, {**parameters, **others}, moving):
        if [tuple(tensor.shape) for tensor in own.values()] == shapes:
            return {spec.name: name for spec, name in zip(layout.specs, own, strict=True)}
    return {}


def _once(tensors: Tensors) -> Tensors:
    """Return each tensor under the first of its names."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def _extra(longer: str, name: str) -> list[str] | None:
    """Return the parts of ``longer`` that ``name`` lacks; ``None`` if ``longer`` lacks a part of ``name``."""
    parts, extra = name.split("."), []
    for part in longer.split("."):
        if parts and part == parts[0]:
            del parts[0]
        else:
            extra.append(part)
    return None if parts else extra


def _longer(spec: ArraySpec, layout: Layout, trained: Tensors) -> list[str]:
    """Return parameters of the sent shape whose names have more parts than the sent name, after its first part.

    Parts before the first do not count, since a submodule may have the names of another one. Numbers do not count,
    since they distinguish layers. If there are several, the frozen ones are copies (PEFT's ``original_module``).
    """
    sent = _bare(spec.name)
    fits = []
    for name, parameter in trained.items():
        own = _bare(name)
        extra = _extra(own, sent) if own.split(".")[0] == sent.split(".")[0] and own not in layout else None
        if extra is not None and not any(part.isdigit() for part in extra) and tuple(parameter.shape) == spec.shape:
            fits.append(name)
    return [name for name in fits if trained[name].requires_grad] or fits


def _check_unique(fitting: Mapping[str, list[str]], own: Tensors) -> None:
    """Raise ``ValueError`` if a name matches several of the model's tensors, or two names match the same one."""
    taken: dict[str, str] = {}
    for name, fits in fitting.items():
        rival = taken.setdefault(fits[0], name)
        if rival != name or len({id(own[fit]) for fit in fits}) > 1:
            sent = [name] if rival == name else [rival, name]
            raise ValueError(f"{sent} of the server may be {fits} of the model: say which, names={{{name!r}: ...}}")


def _lacking(lacking: list[str], layout: Layout, trained: Tensors, names: Names) -> str:
    """Describe what was sent, what the model has, and which parameters would fit."""
    text = (
        f"the model has no {[names.get(name, name) for name in lacking][:3]}: "
        f"the server sent {[spec.name for spec in layout.specs][:3]}, the model has {list(trained)[:3]}"
    )
    name = lacking[0]
    shaped = {sent: [own for own, p in trained.items() if tuple(p.shape) == layout[sent].shape] for sent in lacking}
    fits = get_close_matches(name, shaped[name], 3, cutoff=0)
    parts = [{own.removesuffix(sent) for own in shaped[sent] if own.endswith(f".{sent}")} for sent in lacking]
    if shared := sorted(set.intersection(*parts)):
        return f"{text}; pass the part that was sent, {shared[0][:-1]!r}, or names={{{name!r}: {shared[0] + name!r}}}"
    if fits:
        return f"{text}; {fits} fit: pass the part that was sent, or names={{{name!r}: {fits[0]!r}}}"
    return f"{text}; pass the model whose state dict is sent"
