"""Targets of a mask: a model, or parameters by name. They notice when their parameters are replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from weakref import ref

import torch
from torch import nn

from autoflip_flwr.client.context import sent_array
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.torch.names import Names, Tensors, check, find, modules, parameters, unwrapped

Key = frozenset[int]
Holder = Callable[[], torch.Tensor | None]


class Parameters:
    """Parameters under the server's names. They are not kept alive."""

    def __init__(self, given: Mapping[str, torch.Tensor], gone: Callable[[Key], object]) -> None:
        _check_parameters(given)
        self.key = key = frozenset(map(id, given.values()))
        self._given = {name: ref(tensor, lambda _: gone(key)) for name, tensor in given.items()}

    def find(self, layout: Layout) -> Tensors:
        """Return the parameters that match the server's prunable arrays.

        Raises
        ------
        ValueError
            If a name or shape differs from those of the arrays that the server sent.
        """
        found = {name: tensor for name, given in self._given.items() if (tensor := given()) is not None}
        for name, tensor in found.items():
            check(name, tensor, sent_array(layout, name, tuple(tensor.shape)))
        return {name: tensor for name, tensor in found.items() if layout[name].prunable}

    def hold(self, tensor: torch.Tensor) -> Holder:
        """Return a function that returns the parameter later, if it is still alive."""
        return ref(tensor)

    def watch(self, bound: Collection[torch.Tensor]) -> None:
        """Do nothing: a replacement of a parameter cannot be found."""

    def replaced(self) -> bool:
        """Return whether a parameter has been replaced by another one."""
        return False

    def now(self) -> set[int]:
        """Return the ids of the parameters."""
        return set(self.key)

    def alive(self) -> bool:
        """Return whether all parameters are alive."""
        return all(given() is not None for given in self._given.values())


class Model:
    """A model, without its wrappers. It is not kept alive.

    Parameters
    ----------
    model : Module
        The model, or a wrapper of it.
    names : Mapping[str, str | Tensor]
        The server's names -> the model's names or parameters, where they differ.
    gone : Callable[[Key], object]
        Called with the key when the model is gone.
    """

    def __init__(self, model: nn.Module, names: Names, gone: Callable[[Key], object]) -> None:
        _check_parameters({sent: name for sent, name in names.items() if not isinstance(name, str)})
        self._prefix, inner = unwrapped(model)
        self.key = key = frozenset([id(inner)])  # by identity: a model may define its own __eq__
        self._model = ref(inner, lambda _: gone(key))
        own = {id(parameter): name for name, parameter in parameters(inner, self._prefix).items()}
        self._names = {  # by name, the replacement of a parameter can be found
            sent: own.get(id(name), name) if isinstance(name, torch.Tensor) else name for sent, name in names.items()
        }
        self._children: list[tuple[ref[nn.Module], str, ref[nn.Module]]] = []
        self._places: list[tuple[Mapping[str, torch.Tensor | None], str, torch.Tensor, int]] = []

    def find(self, layout: Layout) -> Tensors:
        """Return the parameters that match the server's prunable arrays (:func:`~autoflip_flwr.torch.names.find`)."""
        for name in self._names:
            if name not in layout:
                raise ValueError(
                    f"names: the server sent no {name!r}; it sent {[spec.name for spec in layout.specs][:5]}"
                )
        model = self._model()
        return {} if model is None else find(model, self._prefix, layout, self._names)

    def hold(self, tensor: torch.Tensor) -> Holder:
        """Return a function that returns the parameter later. A weak reference would keep PyTorch from swapping it."""
        return lambda: tensor

    def watch(self, bound: Collection[torch.Tensor]) -> None:
        """Remember in which modules these parameters are, and under which names."""
        model, ids = self._model(), set(map(id, bound))
        found = [module for _, module in modules(model)] if model is not None and ids else []
        self._children = [
            (ref(module), name, ref(child))
            for module in found
            for name, child in module._modules.items()
            if child is not None
        ]
        self._places = [
            (module._parameters, name, parameter, parameter._cdata)
            for module in found
            for name, parameter in module._parameters.items()
            if id(parameter) in ids and parameter is not None
        ]

    def replaced(self) -> bool:
        """Return whether a watched parameter has been removed, replaced or swapped. Only identities are compared."""
        try:
            for place, name, parameter, data in self._places:
                if place[name] is not parameter or parameter._cdata != data:
                    return True
            for module, name, child in self._children:
                parent = module()
                if parent is None or parent._modules[name] is not child():
                    return self._model() is not None
        except KeyError:  # one was deleted
            return True
        return False

    def now(self) -> set[int]:
        """Return the ids of the parameters that the model has now."""
        model = self._model()
        return set() if model is None else {id(parameter) for parameter in parameters(model).values()}

    def alive(self) -> bool:
        """Return whether the model is alive."""
        return self._model() is not None


def _check_parameters(given: Mapping[str, object]) -> None:
    """Raise ``TypeError`` if one is not a parameter that an optimizer can train. A mask on a copy would do nothing."""
    trained = {name for name, tensor in given.items() if isinstance(tensor, torch.Tensor) and tensor.requires_grad}
    if odd := [name for name in given if name not in trained and not isinstance(given[name], nn.Parameter)]:
        raise TypeError(f"{odd[:3]} are no parameters: pass those of named_parameters(); a state dict holds copies")


def target_of(
    model: nn.Module | Mapping[str, torch.Tensor], names: Names | None, gone: Callable[[Key], object]
) -> Model | Parameters:
    """Return the target for what a user passes as the model."""
    if isinstance(model, nn.Module):
        return Model(model, names or {}, gone)
    if not isinstance(model, Mapping):
        raise TypeError(f"the model is a {type(model).__name__}: pass a torch.nn.Module or {{name: parameter}}")
    if names:
        raise ValueError("names= is for a model: parameters are given under the names that the server sent")
    return Parameters(model, gone)
