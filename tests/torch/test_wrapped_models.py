"""Models that are wrapped, sent in part, or known under other names: which parameters the server's names mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import autoflip_flwr
from autoflip_flwr import AutoFlip, Layout, Mask
from autoflip_flwr.client.context import LAYOUT
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.torch import apply_mask, autoflip_mod, masked_training
from autoflip_flwr.wire.keys import MASK_RECORD

START = [[1.0, 2.0], [3.0, 4.0]]
DIAGONAL = np.eye(2, dtype=bool)


def linear() -> nn.Linear:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(START))
    return layer


def mask_of(*names: str) -> Mask:
    """A mask of two-by-two weights that keeps their diagonals."""
    layout = Layout.of({name: np.zeros((2, 2), np.float32) for name in names})
    return Mask.from_bool(layout, dict.fromkeys(names, DIAGONAL))


def step(model: nn.Module, weight: torch.Tensor) -> list[list[float]]:
    """The weight after a step in which each kept entry loses a half."""
    optimizer = torch.optim.SGD([weight], lr=0.5)
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return weight.tolist()


class PrivateLinear(nn.Module):
    """Names as Opacus gives them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._module(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "Opacus": PrivateLinear,
    "compiled within": lambda model: nn.Sequential(torch.compile(model, backend="eager")),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


@each_wrapper
def test_a_wrapped_model_trains_under_the_mask_of_the_model_in_it(wrap: Callable[[nn.Module], nn.Module]):
    layer = linear()
    model = wrap(layer)
    name = "0.weight" if isinstance(model, nn.Sequential) else "weight"
    masked_training(model, mask_of(name))
    assert layer.weight.tolist() == [[1, 0], [0, 4]]
    assert step(layer, layer.weight) == [[0.5, 0], [0, 3.5]]


@each_wrapper
def test_a_model_trains_under_the_mask_of_a_wrapped_one_that_was_sent(wrap: Callable[[nn.Module], nn.Module]):
    layer = linear()
    (sent,) = wrap(linear()).state_dict()
    apply_mask(nn.Sequential(layer) if sent.startswith("0.") else layer, mask_of(sent))
    assert layer.weight.tolist() == [[1, 0], [0, 4]]


def test_a_compiled_model_runs_as_such():
    layer = linear()
    model = torch.compile(layer, backend="eager")
    masked_training(model, mask_of("weight"))
    assert step(model, layer.weight) == [[0.5, 0], [0, 3.5]]


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel():
    layer = linear()
    with one_process():
        model = nn.parallel.DistributedDataParallel(layer)
        masked_training(model, mask_of("weight"))
        assert step(model, layer.weight) == [[0.5, 0], [0, 3.5]]


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch shards nothing on a CPU")
def test_a_sharded_model_is_refused_in_words_also_when_it_is_sharded_later():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_process():
        model = linear()
        masked_training(model, mask_of("weight"))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(ValueError, match=r"replaced after masked_training .* 'weight' is sharded"):
            optimizer.step()
        with pytest.raises(ValueError, match="parameter 'weight' is sharded"):
            masked_training(model, mask_of("weight"))


def test_a_mask_of_the_wrapper_and_one_of_the_model_take_each_others_place():
    layer = linear()
    masked_training(nn.DataParallel(layer), mask_of("weight"))
    masked_training(layer, None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(START))
    assert step(layer, layer.weight) == [[0.5, 1.5], [2.5, 3.5]]


def test_exact_names_go_before_those_without_wrappers():
    model = nn.ModuleDict({"weight": linear(), "module": nn.ModuleDict({"weight": linear()})})
    apply_mask(model, mask_of("module.weight.weight"))
    assert model["weight"].weight.tolist() == START
    assert model["module"]["weight"].weight.tolist() == [[1, 0], [0, 4]]
    with pytest.raises(ValueError, match=r"may be \['weight.weight', 'module.weight.weight'\] of the model"):
        apply_mask(model, mask_of("_orig_mod.weight.weight"))


def test_names_that_a_state_dict_gives_of_its_own_are_found():
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"w": self.inner.weight.detach()}

    model = Renamed()
    masked_training(model, mask_of("w"))
    assert step(model.inner, model.inner.weight) == [[0.5, 0], [0, 3.5]]


# Adapters


class Adapted(nn.Module):
    """A frozen layer with an adapter, in PEFT's names."""

    def __init__(self, *adapters: str) -> None:
        super().__init__()
        self.base_layer = linear().requires_grad_(False)
        self.lora_A = nn.ModuleDict({name: linear() for name in adapters})
        self.lora_B = nn.ModuleDict({name: linear() for name in adapters})
        self.magnitude = nn.ParameterDict({name: nn.Parameter(torch.tensor(START)) for name in adapters})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT sends of a model."""
    own = {name: p for name, p in model.named_parameters() if "lora_" in name or "magnitude" in name}
    return {name.replace(".default", ""): parameter for name, parameter in own.items()}


def test_the_adapters_of_peft_need_no_map():
    model = nn.ModuleDict({"layers": nn.ModuleList([Adapted("default"), Adapted("default")])})
    sent = adapters(model)
    assert list(sent)[:3] == ["layers.0.lora_A.weight", "layers.0.lora_B.weight", "layers.0.magnitude"]
    apply_mask(model, mask_of(*sent))
    assert [parameter.tolist() for parameter in sent.values()] == [[[1, 0], [0, 4]]] * 6
    assert [layer.base_layer.weight.tolist() for layer in model["layers"]] == [START, START]


def test_a_list_of_the_adapters_alone_is_one_of_what_is_trained():
    model = nn.Sequential(Adapted("default"))
    apply_mask(model, mask_of("0", "1", "2"))
    assert [parameter.tolist() for parameter in adapters(model).values()] == [[[1, 0], [0, 4]]] * 3
    assert model[0].base_layer.weight.tolist() == START


def test_of_a_copy_that_is_frozen_and_one_that_is_trained_the_latter_is_meant():
    model = nn.ModuleDict({"head": nn.ModuleDict({"original": linear().requires_grad_(False), "saved": linear()})})
    apply_mask(model, mask_of("head.weight"))
    assert model["head"]["original"].weight.tolist() == START
    assert model["head"]["saved"].weight.tolist() == [[1, 0], [0, 4]]


def test_two_adapters_are_told_apart_by_the_user():
    model = nn.Sequential(Adapted("default", "other"))
    mask = mask_of("0.lora_A.weight")
    with pytest.raises(ValueError, match=r"may be \['0.lora_A.default.weight', '0.lora_A.other.weight'\]"):
        masked_training(model, mask)
    apply_mask(model, mask, names={"0.lora_A.weight": "0.lora_A.other.weight"})
    assert model[0].lora_A["default"].weight.tolist() == START
    assert model[0].lora_A["other"].weight.tolist() == [[1, 0], [0, 4]]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Sequential(linear()), nn.Sequential(linear()))], ids=["layers"])
def test_a_number_in_a_name_is_no_adapter(model: nn.Module):
    with pytest.raises(ValueError, match=r"the model has no \['0.weight'\]"):
        apply_mask(model, mask_of("0.weight"))


def test_another_shape_is_no_adapter():
    model = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(3, 2)})})
    with pytest.raises(ValueError, match=r"the model has no \['lora_A.weight'\]"):
        apply_mask(model, mask_of("lora_A.weight"))


# A part of the model, names, parameters


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = linear()
        self.head = nn.Sequential(linear())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


NAMED: dict[str, Callable[[Headed], tuple[nn.Module | Mapping[str, torch.Tensor], dict[str, object]]]] = {
    "the part": lambda model: (model.head, {}),
    "a name": lambda model: (model, {"names": {"0.weight": "head.0.weight"}}),
    "a name of a compiled model": lambda model: (
        torch.compile(model, backend="eager"),
        {"names": {"0.weight": "head.0.weight"}},
    ),
    "a parameter": lambda model: (model, {"names": {"0.weight": model.head[0].weight}}),
    "parameters in place of the model": lambda model: ({"0.weight": model.head[0].weight}, {}),
}


@pytest.mark.parametrize("given", NAMED.values(), ids=NAMED.keys())
def test_a_part_of_the_model_is_named(given: Callable):
    model = Headed()
    part, names = given(model)
    apply_mask(part, mask_of("0.weight"), **names)
    assert model.head[0].weight.tolist() == [[1, 0], [0, 4]]
    assert model.body.weight.tolist() == START
    masked_training(part, mask_of("0.weight"), **names)
    assert step(model, model.head[0].weight) == [[-0.5, 0], [0, 0.5]]  # the body puts out 3 and 7


def test_a_part_that_is_not_named_is_refused_with_what_was_sent_and_what_fits():
    with pytest.raises(ValueError) as error:
        masked_training(Headed(), mask_of("0.weight"))
    assert str(error.value) == (
        "the model has no ['0.weight']: the server sent ['0.weight'], the model has ['body.weight', 'head.0.weight']; "
        "pass the part that was sent, 'head', or names={'0.weight': 'head.0.weight'}"
    )


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (linear(), {"names": {"wieght": "weight"}}, r"names: the server sent no 'wieght'; it sent \['weight'\]"),
        (linear(), {"names": {"weight": "wieght"}}, r"the model has no \['wieght'\].*names=\{'weight': 'weight'\}"),
        (nn.Linear(3, 2), {"names": {"weight": "weight"}}, r"'weight' has shape \(2, 3\), the mask \(2, 2\)"),
        (
            {"wieght": nn.Parameter(torch.zeros(2, 2))},
            {},
            r"the server sent no 'wieght'; it sent \['weight'\], 'weight' fits",
        ),
        ({"weight": torch.zeros(2, 3, requires_grad=True)}, {}, r"'weight' has shape \(2, 3\), the mask \(2, 2\)"),
        (dict(linear().named_parameters()), {"names": {"weight": "x"}}, "names= is for a model"),
    ],
)
def test_names_that_do_not_fit_are_refused(model: object, options: dict, text: str):
    for use in (apply_mask, masked_training):
        with pytest.raises(ValueError, match=text):
            use(model, mask_of("weight"), **options)


@pytest.mark.parametrize(
    "model",
    [linear().parameters(), {"weight": np.zeros((2, 2))}, linear().state_dict()],
    ids=["list", "NumPy", "copies"],
)
def test_what_is_no_model_is_refused_whatever_the_mask(model: object):
    for mask in (None, mask_of("weight")):
        with pytest.raises(TypeError, match="pass"):
            masked_training(model, mask)


def test_a_name_of_a_copy_is_refused():
    model = linear()
    with pytest.raises(TypeError, match=r"\['weight'\] are no parameters: pass those of named_parameters"):
        masked_training(model, None, names={"weight": model.weight.data})


def test_two_names_of_one_parameter_are_refused():
    with pytest.raises(ValueError, match=r"\['weight', '_orig_mod.weight'\] of the server may be \['weight'\]"):
        apply_mask(linear(), mask_of("weight", "_orig_mod.weight"))


# Runs


def app_of(make: Callable[[], nn.Module], send: Callable, mask: Callable) -> ClientApp:
    """Clients that train what ``mask(model, context)`` masks, and send ``send(model)``."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = make()
        with torch.no_grad():
            for name, parameter in send(model).items():
                parameter.copy_(torch.from_numpy(message.content["arrays"][name].numpy()))
        mask(model, context)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for x in (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        zeros.append(sum(int((parameter == 0).sum()) for parameter in send(model).values()))
        arrays = ArrayRecord({name: Array(p.detach().numpy()) for name, p in send(model).items()})
        return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    zeros: list[int] = []
    app.zeros = zeros  # type: ignore[attr-defined]
    return app


def run(app: ClientApp, sent: Mapping[str, torch.Tensor]) -> LocalGrid:
    grid = LocalGrid(app, 2)
    initial = ArrayRecord({name: Array(parameter.detach().numpy()) for name, parameter in sent.items()})
    AutoFlip(FedAvg(fraction_evaluate=0.0), 0.5, output=None, method=LossExploration.static()).start(
        grid, initial, num_rounds=2
    )
    return grid


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in adapters(model).items() if "lora_" in name}


@pytest.mark.parametrize(
    "mask",
    [
        masked_training,
        lambda model, context: masked_training(matrices(model), context),
        lambda model, context: masked_training(model, context, names={"0.lora_A.weight": "0.lora_A.default.weight"}),
    ],
    ids=["five lines", "parameters", "names"],
)
def test_adapters_train_under_the_mask_in_a_run(mask: Callable):
    app = app_of(lambda: nn.Sequential(Adapted("default")), matrices, mask)
    run(app, matrices(nn.Sequential(Adapted("default"))))
    assert app.zeros == [0, 0] + [4] * 4  # half of eight


def test_explorers_refuse_a_model_that_does_not_fit_and_nothing_is_spent():
    app = app_of(Headed, lambda model: model.head.state_dict(keep_vars=True), masked_training)
    with pytest.raises(RuntimeError, match=r"the exploration failed: .*the server sent \['0.weight'\].*head.0.weight"):
        run(app, Headed().head.state_dict())


def test_explorers_refuse_a_numpy_name_that_was_not_sent():
    def mask(_: nn.Module, context: Context) -> None:
        autoflip_flwr.apply_mask({"wait": np.zeros((2, 2))}, context)

    app = app_of(linear, lambda model: dict(model.named_parameters()), mask)
    with pytest.raises(RuntimeError, match=r"the server sent no 'wait'; it sent \['weight'\], 'weight' fits"):
        run(app, dict(linear().named_parameters()))


def test_an_explorer_keeps_the_layout_and_no_mask_and_drops_it_in_round_1():
    seen = []

    def mask(model: nn.Module, context: Context) -> None:
        masked_training(model, context)
        layout = context.state.config_records.get(LAYOUT)
        seen.append((None if layout is None else list(layout), MASK_RECORD in context.state))

    app = app_of(linear, lambda model: dict(model.named_parameters()), mask)
    grid = run(app, dict(linear().named_parameters()))
    assert seen == [(["layout"], False)] * 2 + [(None, True)] * 4
    assert all(LAYOUT not in context.state for context in grid.contexts.values())
