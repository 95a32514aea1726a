"""Models as they are: each kind of layer, buffer and dtype through whole runs of AutoFlip, with PyTorch clients."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from apps import NO_FAILURES, arrays_of, same_bytes
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from autoflip_flwr import AutoFlip, Mask, autoflip_mod, current_mask
from autoflip_flwr.core.choices import LOG8, PACKINGS
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.torch import masked_training
from autoflip_flwr.wire.keys import EXPLORE, HEADER, HELLO, PHASE_KEY

NODES, ROUNDS, STEPS = 3, 2, 3


# --- the models ------------------------------------------------------------------------------------------------------


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 6, 6)


def tokens(count: int) -> torch.Tensor:
    return torch.randint(12, (count, 5))


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[int], torch.Tensor]:
    return lambda count: torch.randn(count, *shape).to(dtype)


def convolution(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


class Reader(nn.Module):
    """An LSTM over embedded tokens, two layers in both directions; its mean state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 4)
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(x))[0].mean(1))


class Tied(nn.Module):
    """The embedding is the output layer as well: the state dict lists one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.body = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 12)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.body(self.embedding(x).mean(1))))


class Alike(nn.Module):
    """Two layers that start from the same values and are trained apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x.flip(1))


class Table(nn.Module):
    """A positional table beside an embedding: a two-dimensional float buffer, which nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.position = nn.Module()
        self.position.register_buffer("table", torch.randn(5, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(x) + self.position.table).mean(1))


class Mixed(nn.Module):
    """Three float dtypes, integers and bools in one model, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 6, dtype=torch.float16)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("used", torch.tensor([True, False, True]))
        self.register_buffer("order", torch.arange(6, dtype=torch.int32).reshape(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x.half()).float()).double()) * self.scale


class Single(nn.Module):
    """One tensor and nothing else."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class Wide(nn.Module):
    """500 layers side by side: 1,000 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(500))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x) for layer in self.layers) / 500**0.5


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it and its data are made, AutoFlip's options, and the names that must be pruned."""

    build: Callable[[], nn.Module]
    data: Callable[[int], torch.Tensor]
    pruned: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    aliases: int = 0  # entries that the state dict lists under a second name


LSTM = [f"lstm.weight_{kind}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for kind in ("ih", "hh")]
CONVOLUTION = ["0.weight", "4.weight"]
TABLE = {"exclude": "*.table"}

KINDS = {
    "BatchNorm": Kind(lambda: convolution(nn.BatchNorm2d(4)), images, CONVOLUTION),
    "BatchNorm that averages all batches": Kind(
        lambda: convolution(nn.BatchNorm2d(4, momentum=None, affine=False)), images, CONVOLUTION
    ),
    "GroupNorm": Kind(lambda: convolution(nn.GroupNorm(2, 4)), images, CONVOLUTION),
    "embedding and LSTM": Kind(Reader, tokens, ["embedding.weight", *LSTM, "head.weight"]),
    "tied weights": Kind(Tied, tokens, ["embedding.weight", "body.weight", "decoder.weight"], aliases=72),
    "tied weights, by layer": Kind(
        Tied,
        tokens,
        ["embedding.weight", "body.weight", "decoder.weight"],
        {"method": LossExploration.static(scope="layer")},
        aliases=72,
    ),
    "equal at the start, not tied": Kind(Alike, vectors(8), ["one.weight", "two.weight"]),
    "float16": Kind(lambda: perceptron(torch.float16), vectors(8, dtype=torch.float16), ["0.weight", "3.weight"]),
    "float64": Kind(lambda: perceptron(torch.float64), vectors(8, dtype=torch.float64), ["0.weight", "3.weight"]),
    "many dtypes": Kind(Mixed, vectors(8), ["body.weight", "head.weight"]),
    "one matrix": Kind(lambda: Single(8, 3), vectors(8), ["w"]),
    "one vector": Kind(lambda: Single(9), vectors(9), ["w"], {"prunable": "*"}),
    "one vector, by a function": Kind(
        lambda: Single(9), vectors(9), ["w"], {"prunable": lambda name, shape: (name, shape) == ("w", (9,))}
    ),
    "1,000 tensors": Kind(Wide, vectors(4), [f"layers.{i}.weight" for i in range(500)]),
    "a table excluded by a pattern": Kind(Table, tokens, ["embedding.weight", "head.weight"], TABLE),
    "layers excluded by patterns": Kind(
        Reader,
        tokens,
        LSTM,
        {"exclude": ["embedding.*", "head.*"], "output": None, "method": LossExploration.static(scope="layer")},
    ),
    "layers excluded by name and shape": Kind(
        Reader,
        tokens,
        [*LSTM, "head.weight"],
        {"exclude": lambda name, shape: name.startswith("embedding") and len(shape) == 2},
    ),
    "layers chosen by a pattern": Kind(Reader, tokens, LSTM[1::2], {"prunable": "lstm.weight_hh_*"}),
}


# --- the runs --------------------------------------------------------------------------------------------------------


def made(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    model = kind.build()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and not parameter.any():  # of a norm: zero for ever where nobody reads its unit
            nn.init.constant_(parameter, 0.5)
    return model


def data_of(kind: Kind, node: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1 + node)
    x = kind.data(8)
    with torch.no_grad():
        y = kind.build()(x)
    return x, torch.randn_like(y)


def client(kind: Kind) -> ClientApp:
    """An ordinary PyTorch client with one line of AutoFLIP in it."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        part = int(context.node_config["partition-id"])
        x, y = data_of(kind, part)
        model = made(kind)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        masked_training(model, context)
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        mask, state = current_mask(context), model.state_dict()
        assert (mask is None) == (PHASE_KEY in message.content["config"])
        for name, keep in {} if mask is None else mask.keep.items():
            assert not state[name].numpy()[~keep].any(), name
        metrics = MetricRecord({"num-examples": 8 + part, "loss": loss.item()})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    return app


@dataclass(frozen=True)
class Run:
    kind: Kind
    strategy: AutoFlip
    initial: Arrays
    record: ArrayRecord
    result: Arrays
    mask: Mask
    travelled: list[RecordDict]


def run(kind: Kind, strategy: FedAvg | None = None, **options: Any) -> Run:
    replies: list[RecordDict] = []

    def look(reply: Message) -> Message:
        replies.append(reply.content)
        return reply

    def travels(content: RecordDict) -> bool:
        return content[HEADER]["phase"] != HELLO  # the roll call has no model

    grid = LocalGrid(client(kind), NODES, tamper=look)
    settings = {"sparsity": 0.5, "method": LossExploration.static(), **kind.options, **options}
    wrapped = AutoFlip(strategy or FedAvg(fraction_evaluate=0.0), **settings)
    state = made(kind).state_dict()
    initial = {name: value.numpy().copy() for name, value in state.items()}
    random.seed(7)
    result = wrapped.start(grid, ArrayRecord(state), num_rounds=ROUNDS)
    travelled = list(filter(travels, [*(message.content for message in grid.sent), *replies]))
    assert wrapped.mask is not None
    return Run(kind, wrapped, initial, result.arrays, arrays_of(result.arrays), wrapped.mask, travelled)


@functools.cache
def run_of(name: str) -> Run:
    return run(KINDS[name])


each_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.runs] if name == "1,000 tensors" else []) for name in KINDS]
)


# --- what holds for every kind ---------------------------------------------------------------------------------------


@each_kind
def test_the_run_ends_and_every_reply_counts(name: str):
    done = run_of(name)
    assert done.strategy.ledger.failure_counts() == NO_FAILURES
    assert done.strategy.exploration.explorers == NODES
    assert len(done.travelled) == 2 * NODES * (1 + ROUNDS)


@each_kind
def test_exactly_half_of_the_weights_is_pruned_those_of_two_names_counted_once(name: str):
    done = run_of(name)
    kind, keep = done.kind, done.mask.keep
    assert list(keep) == kind.pruned
    once = {key: value for key, value in keep.items() if not (kind.aliases and key == "decoder.weight")}
    sizes = {key: value.size for key, value in once.items()}
    assert sum(done.initial[key].size for key in keep) == sum(sizes.values()) + kind.aliases
    dropped = {key: np.count_nonzero(~value) for key, value in once.items()}
    if kind.options.get("scope") == "layer":
        assert dropped == {key: size // 2 for key, size in sizes.items()}
    assert sum(dropped.values()) == math.floor(0.5 * sum(sizes.values()))
    assert all(value.any() for value in keep.values())


@each_kind
def test_outside_the_mask_all_is_zero_and_inside_it_has_been_trained(name: str):
    done = run_of(name)
    for key, keep in done.mask.keep.items():
        assert not done.result[key][~keep].any(), key
        moved = (done.result[key] != done.initial[key])[keep]
        # a token that occurs nowhere trains nothing, and float16 swallows small steps
        assert moved.mean() > (0.5 if "embedding" in key or keep.dtype == np.float16 else 0.9), key


@each_kind
def test_what_is_never_pruned_stays_dense(name: str):
    done = run_of(name)
    others = [key for key in done.initial if key not in done.kind.pruned]
    for key in others:
        if done.initial[key].dtype.kind == "f":
            assert done.result[key].all(), key
    assert not any(done.mask.layout[key].prunable for key in others)


@each_kind
def test_names_order_shapes_and_dtypes_are_those_of_the_initial_model_and_all_values_finite(name: str):
    done = run_of(name)
    shapes = {key: (value.shape, value.dtype) for key, value in done.initial.items()}
    assert list(done.result) == list(done.initial)
    assert {key: (value.shape, value.dtype) for key, value in done.result.items()} == shapes
    assert all(np.isfinite(value).all() for value in done.result.values())


@each_kind
def test_integer_and_bool_buffers_come_from_a_client_as_they_are(name: str):
    done = run_of(name)
    for key, value in done.initial.items():
        if key.endswith("num_batches_tracked"):
            expected = np.array(ROUNDS * STEPS, np.int64)  # the exploration leaves no trace
            np.testing.assert_array_equal(done.result[key], expected, strict=True)
        elif value.dtype.kind != "f":
            np.testing.assert_array_equal(done.result[key], value, strict=True)


@each_kind
def test_the_result_loads_strictly_and_the_model_evaluates(name: str):
    done = run_of(name)
    model = made(done.kind)
    model.load_state_dict(done.record.to_torch_state_dict(), strict=True)
    model.eval()
    x, y = data_of(done.kind, 0)
    with torch.no_grad():
        assert torch.isfinite(nn.functional.mse_loss(model(x), y))
    same_bytes({key: value.numpy() for key, value in model.state_dict().items()}, done.result)


@each_kind
def test_both_ways_one_flat_array_of_each_dtype_travels(name: str):
    done = run_of(name)
    dense: dict[str, int] = {}
    kept: dict[str, int] = {}
    for spec in done.mask.layout.specs:
        dense[spec.dtype] = dense.get(spec.dtype, 0) + spec.size
        kept[spec.dtype] = kept.get(spec.dtype, 0) + math.prod(done.mask.packed_shape(spec.name))
    for content in done.travelled:
        sizes = dense if content[HEADER]["phase"] == EXPLORE else kept
        (record,) = content.array_records.values()
        found = {key: (array.dtype, array.shape) for key, array in record.items()}
        if content[HEADER].get("values") == LOG8:  # an explorer's deltas: bytes, coded by Huffman
            assert {dtype: kind for dtype, (kind, _) in found.items()} == dict.fromkeys(sizes, "uint8")
            continue
        assert found == {dtype: (dtype, (size,)) for dtype, size in sizes.items()}


# --- BatchNorm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", PACKINGS)
def test_batch_norm_gives_the_same_in_both_coordinates(coordinates: str):
    same_bytes(run(KINDS["BatchNorm"], coordinates=coordinates).result, run_of("BatchNorm").result)


class Loading(FedAvg):
    """A strategy of the user's own that loads what it aggregates, and what it aggregates from, into its model."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.model = made(KINDS["BatchNorm"])
        self.counts: list[list[int]] = []

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            self.model.load_state_dict(reply.content["arrays"].to_torch_state_dict())
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.model.load_state_dict(arrays.to_torch_state_dict())
        self.counts.append(self.model[1].num_batches_tracked.item())
        self.model.eval()(images(2))
        return arrays, metrics


def test_a_strategy_of_the_users_own_may_load_the_whole_model_with_its_integers():
    strategy = Loading()
    done = run(KINDS["BatchNorm"], strategy)
    assert strategy.counts == [STEPS, 2 * STEPS]
    assert done.strategy.ledger.failure_counts() == NO_FAILURES
    same_bytes(done.result, run_of("BatchNorm").result)


# --- tied weights ----------------------------------------------------------------------------------------------------

both_scopes = pytest.mark.parametrize("name", ["tied weights", "tied weights, by layer"])


@both_scopes
def test_tied_weights_have_one_mask_and_one_value_under_both_names(name: str):
    done = run_of(name)
    first, second = "embedding.weight", "decoder.weight"
    np.testing.assert_array_equal(done.mask.keep[first], done.mask.keep[second])
    np.testing.assert_array_equal(done.result[first], done.result[second])
    assert done.mask.keep[first].any(axis=1).all()  # of the output layer each unit keeps a weight


@both_scopes
def test_the_servers_model_stays_tied(name: str):
    done = run_of(name)
    model = made(done.kind)
    model.load_state_dict(done.record.to_torch_state_dict())
    assert model.decoder.weight is model.embedding.weight
    kept = done.mask.kept_by_name["embedding.weight"]
    assert np.count_nonzero(model.decoder.weight.detach().numpy()) == kept


def test_weights_that_only_start_alike_get_masks_of_their_own():
    done = run_of("equal at the start, not tied")
    np.testing.assert_array_equal(done.initial["one.weight"], done.initial["two.weight"])
    assert (done.mask.keep["one.weight"] != done.mask.keep["two.weight"]).any()


def test_what_tied_weights_make_impossible_is_refused_before_any_client_works():
    # 13 must stay: one of each of 12 output units, one of the body; 0.89 of 108 entries, counted once, is 96 and leaves
    # 12, while of the state dict's 180 it would leave 20
    kind = KINDS["tied weights"]
    grid = LocalGrid(client(kind), NODES)
    with pytest.raises(ValueError, match="must stay"):
        AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=0.89).start(grid, ArrayRecord(made(kind).state_dict()))
    assert grid.sent == []


# --- what must not be pruned -----------------------------------------------------------------------------------------


def test_an_excluded_table_keeps_its_values():
    done = run_of("a table excluded by a pattern")
    np.testing.assert_allclose(done.result["position.table"], done.initial["position.table"], rtol=1e-6)


def test_a_vector_alone_is_refused_with_the_way_out_before_any_client_works():
    kind = KINDS["one vector"]
    grid = LocalGrid(client(kind), NODES)
    with pytest.raises(ValueError, match=r"no array of the model is prunable: .* give `prunable`"):
        AutoFlip(FedAvg(), sparsity=0.5).start(grid, ArrayRecord(made(kind).state_dict()))
    assert grid.sent == []


@pytest.mark.parametrize("parameter", ["prunable", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_before_any_client_works(parameter: str):
    kind = KINDS["a table excluded by a pattern"]
    grid = LocalGrid(client(kind), NODES)
    with pytest.raises(ValueError, match=rf"{parameter}: 'tabel\.\*' matches none of the model's arrays"):
        AutoFlip(FedAvg(), **{parameter: ["head.*", "tabel.*"]}).start(grid, ArrayRecord(made(kind).state_dict()))
    assert grid.sent == []
