"""The private parts of Flower that we cannot do without, in one place; all but the first are for testing."""

from flwr.supercore.differential_privacy import KEY_NORM_BIT
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["KEY_NORM_BIT", "Run", "TaskIdentity", "get_all_nested_objects", "inflate_object_from_contents"]
