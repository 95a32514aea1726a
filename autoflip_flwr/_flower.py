"""The private parts of Flower that `testing` cannot do without, in one place: nothing else depends on them."""

from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "Run",
    "TaskIdentity",
    "get_all_nested_objects",
    "inflate_object_from_contents",
    "no_object_id_recompute",
]
