"""The values that settings of a fixed choice allow: constants alone, which the command line reads without NumPy."""

SCOPES = ("global", "layer", "erk")
"""Where scores are ranked: over the whole model, or per array, of equal density or by ERK."""

NORMALISATIONS = ("none", "layer", "per-client")
"""Of the deviations, before they are ranked."""

INITIALS = ("scratch", "explorers")
"""What round 1 starts from: the initial weights, or the explorers' average."""

OUTSIDE = ("zero", "initial")
"""What stands where the mask prunes."""

WEIGHTINGS = ("uniform", "examples")
"""How explorers count in their average."""

LOG8 = "log8"
"""The coding of deltas with a byte a parameter, or less."""

DELTAS = (LOG8, "float32")
"""How explorers' deltas, and other statistics, travel."""

CODED = ("bfloat16", "float16", "int8")
VALUES = ("float32", *CODED)
"""How values travel in the rounds; ``float32`` is the model's own dtype, whatever it is: nothing is coded."""

PACKINGS = ("packed", "dense")
COORDINATES = ("auto", *PACKINGS)
"""What the wrapped strategy sees: kept values, or full arrays."""

OVER = ("kept", "pruned", "all")
"""Which entries a statistic is asked for."""

# Of the shipped app alone.
METHODS = ("autoflip", "fedavg", "snip", "magnitude", "random")
PRUNING = tuple(method for method in METHODS if method != "fedavg")
ASKING = ("autoflip", "snip")
"""Methods that ask clients before training."""
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")
SPLITS = ("iid", "dirichlet", "pathological")
MODELS = ("cnn", "twocnn", "resnet18", "resnet18-gn")
OPTIMIZERS = ("adam", "sgd")
DEVICES = ("auto", "cpu", "cuda", "mps")
