"""Allowed values of settings with a fixed choice. Only constants, so that the command line needs no NumPy."""

SCOPES = ("global", "layer", "erk")
"""Where scores are ranked: over the whole model, or per array with equal densities or ERK densities."""

NORMALISATIONS = ("none", "layer", "per-client")
"""How deviations are normalised before they are ranked."""

INITIALS = ("scratch", "explorers")
"""Model at the start of round 1: the initial weights, or the explorers' average."""

OUTSIDE = ("zero", "initial")
"""Value of pruned entries: zero, or their initial value."""

WEIGHTINGS = ("uniform", "examples")
"""How explorers are weighted in their average."""

LOG8 = "log8"
"""Logarithmic encoding of deltas: at most one byte per parameter."""

DELTAS = (LOG8, "float32")
"""Encodings of explorers' deltas and of other statistics."""

CODED = ("bfloat16", "float16", "int8")
VALUES = ("float32", *CODED)
"""Encodings of values in the rounds; ``float32`` means unquantised, in the model's own dtype (whatever it is)."""

PACKINGS = ("packed", "dense")
COORDINATES = ("auto", *PACKINGS)
"""What the wrapped strategy sees: packed (only kept values) or dense (full arrays)."""

OVER = ("kept", "pruned", "all")
"""Which entries a statistic is requested for."""

# Used only by the shipped app.
METHODS = ("autoflip", "fedavg", "snip", "magnitude", "random")
PRUNING = tuple(method for method in METHODS if method != "fedavg")
ASKING = ("autoflip", "snip")
"""Methods that request statistics from clients before training."""
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")
SPLITS = ("iid", "dirichlet", "pathological")
DATASET_INPUTS = {
    "digits": "image",
    "mnist": "image",
    "fashion_mnist": "image",
    "cifar10": "image",
    "cifar100": "image",
    "femnist": "image",
    "shakespeare": "text",
    "har": "signal",
}
"""Kind of input of each data set where it is known beforehand."""
MODEL_INPUTS: dict[str, tuple[str, ...]] = {
    "cnn": ("image",),
    "twocnn": ("image",),
    "twocnn-128": ("image",),
    "femnistcnn": ("image",),
    "resnet8-gn": ("image",),
    "resnet18": ("image",),
    "resnet18-gn": ("image",),
    "mobilenetv2": ("image",),
    "efficientnet-b3": ("image",),
    "lstm": ("text",),
    "har-cnn": ("signal",),
    "mlp": ("image", "signal", "text"),
}
"""Kinds of input that each of the app's models takes."""
MODELS = tuple(MODEL_INPUTS)
PRECISIONS = ("float32", "bfloat16")
"""Number formats in which clients compute forward and backward passes."""
OPTIMIZERS = ("adam", "sgd")
DEVICES = ("auto", "cpu", "cuda", "mps")
TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Where runs can be followed. Each has the name of its package, and of the extra that installs it."""
