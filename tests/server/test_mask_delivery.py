"""Which earlier masks the server keeps, and what it sends to the nodes that have them."""

from __future__ import annotations

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.server.mask_delivery import KEPT_MASKS, MaskDelivery
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.keys import MASK_RECORD

LAYOUT = Layout.of({"w": np.zeros((100, 100), np.float32)}, output=None)
DRAW = np.random.default_rng(0).random((100, 100))


def shrunk(steps: int) -> Mask:
    return Mask.from_bool(LAYOUT, {"w": (steps / 200 <= DRAW) & (DRAW < 0.5)})


def sent(delivery: MaskDelivery, node: int) -> ConfigRecord | None:
    content = RecordDict()
    delivery.put(content, node)
    found = content.get(MASK_RECORD)
    assert found is None or isinstance(found, ConfigRecord)
    return found


def base_sent(delivery: MaskDelivery, node: int) -> str:
    found = sent(delivery, node)
    assert found is not None
    return mask_record.base_of(found)


def test_each_node_gets_the_change_from_its_own_mask_up_to_the_masks_that_are_kept():
    masks = [shrunk(step) for step in range(KEPT_MASKS + 2)]
    delivery = MaskDelivery(masks[0])
    for node, mask in enumerate(masks[:-1]):
        delivery.mask = mask
        delivery.confirm([node])
    delivery.mask = masks[-1]
    assert base_sent(delivery, 0) == ""  # one mask too many is held
    for node, mask in enumerate(masks[1:-1], 1):
        found = sent(delivery, node)
        assert found is not None
        assert found["base"] == mask.digest
        assert mask_record.decode_mask(found, mask) == masks[-1]


def test_a_mask_that_no_node_has_any_more_is_not_kept_so_that_one_that_is_held_stays():
    delivery = MaskDelivery(shrunk(0))
    delivery.confirm([1, 2])
    for step in range(1, KEPT_MASKS + 10):
        delivery.mask = shrunk(step)
        delivery.confirm([2])
    delivery.mask = shrunk(KEPT_MASKS + 10)
    assert base_sent(delivery, 1) == shrunk(0).digest
    assert len(delivery._older) == 2
    delivery.confirm([1, 2])
    assert sent(delivery, 1) is sent(delivery, 2) is None
    delivery.mask = shrunk(KEPT_MASKS + 11)
    assert len(delivery._older) == 1


def test_a_change_is_encoded_once_for_all_nodes_that_have_the_same_mask_and_only_where_it_is_sent():
    delivery = MaskDelivery(shrunk(0))
    delivery.confirm([1, 2, 3])
    delivery.mask = shrunk(1)
    delivery.confirm([3])
    delivery.mask = shrunk(2)
    assert sent(delivery, 1) is sent(delivery, 2)
    assert delivery._encoded.keys() == {"", shrunk(0).digest}
