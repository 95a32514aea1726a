"""Allowed values of settings with a fixed choice. Only constants, so that the command line needs no NumPy."""

AUTO_SPARSITY = "auto"
"""The sparsity is found while training."""
MOST_SPARSITY = 0.98
"""The most that is then pruned."""

SCOPES = ("global", "layer", "erk")
"""Where scores are ranked: over the whole model, or per array with equal densities or ERK densities."""

FALL_SCOPES = (*SCOPES, "explored")
"""Where a falling density is ranked: as SCOPES, or by the densities of layers that the exploration finds."""

RANKS = ("deviation", "magnitude", "random")
"""By what the exploration ranks entries; ``random``: inside the densities per layer that it finds."""

# parts of a schedule are joined by "+", and take their turns in this order
SCHEDULES = (
    "static",
    "gradual",
    "regrow",
    "agreement",
    "participants",
    "gradual+regrow",
    "gradual+agreement",
    "gradual+participants",
)
FALLING = tuple(each for each in SCHEDULES if "gradual" in each)
"""Schedules in which the density falls."""
REGROWING_SCHEDULES = tuple(each for each in SCHEDULES if "regrow" in each)
"""Schedules that exchange entries by the clients' gradients."""
ENDING_SCHEDULES = tuple(each for each in SCHEDULES if "regrow" in each or "agreement" in each)
"""Schedules that exchange entries until a share of the rounds."""
EXCHANGING_SCHEDULES = tuple(each for each in SCHEDULES if each not in ("static", "gradual"))
"""Schedules that exchange entries at constant density."""
SAMPLED_SCHEDULES = tuple(each for each in SCHEDULES if "participants" in each)
"""Schedules in which the nodes that a round samples decide its mask."""

DROPS = ("magnitude", "layer-magnitude", "magnitude-agreement", "movement", "deviation", "votes")
"""By what a falling density drops entries."""

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

PLACES = "places"
CODES = (*DELTAS, PLACES)
"""Encodings of a requested statistic; ``places`` says only which entries are the top ones."""

CODED = ("bfloat16", "float16", "int8")
VALUES = ("float32", *CODED)
"""Encodings of values in the rounds; ``float32`` means unquantised, in the model's own dtype (whatever it is)."""

PACKINGS = ("packed", "dense")
COORDINATES = ("auto", *PACKINGS)
"""What the wrapped strategy sees: packed (only kept values) or dense (full arrays)."""

OVER = ("kept", "pruned", "all")
"""Which entries a statistic is requested for."""

GROW_FROM = ("last", "outside")
"""Value at which a grown entry starts: its last one, or that of pruned entries."""

# Used only by the shipped app. What each method does: docs/methods.md.
METHODS = (
    "autoflip",
    "fedavg",
    "fedprox",
    "random",
    "magnitude",
    "erk",
    "snip",
    "ssfl",
    "prunefl",
    "feddst",
    "rigl",
    "gradual",
    "fedlex",
    "sequential-leak",
)
DENSE = ("fedavg", "fedprox", "fedlex")
"""Methods that prune nothing."""
PRUNING = tuple(method for method in METHODS if method not in DENSE)
PLAIN = ("fedavg", "fedprox")
"""Methods that run as Flower's own strategy, unless their values are quantised."""
WRAPPED = tuple(method for method in METHODS if method not in PLAIN)
ASKING = ("autoflip", "snip", "ssfl", "fedlex", "sequential-leak")
"""Methods that request statistics from many clients before training."""
AT_ONCE = tuple(method for method in ASKING if method != "sequential-leak")
"""Those of them that ask the clients at once, or in batches."""
EXPLORING = ("autoflip", "prunefl", "fedlex", "sequential-leak")
"""Methods whose explorers train."""
RANKED = ("autoflip", "snip", "magnitude", "random", "gradual", "sequential-leak")
"""Methods that rank entries in the scope that the user chooses."""
EXCHANGING = ("prunefl", "feddst", "rigl")
"""Methods that exchange entries of the mask for others."""
EVERY = {"rigl": 10, "feddst": 15, "prunefl": 50, "regrow": 10, "agreement": 5, "participants": 1}
"""Rounds between two changes of the mask, as the methods' authors have them."""
FADING = ("feddst", "rigl")
"""Methods that exchange fewer entries from time to time, until a share of the rounds."""
UNTIL = {"rigl": 0.6, "feddst": 0.5, "regrow": 0.6, "agreement": 0.6}
"""That share, as the methods' authors have it."""
MINIBATCH = ("autoflip", "ssfl", "rigl", "feddst")
"""Methods whose clients compute a requested statistic on one minibatch; those of the others use all examples."""
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "femnist", "shakespeare", "har", "own")
AUGMENTS = ("none", "flip", "crop", "crop-flip", "crop-flip-jitter")
SPLITS = ("iid", "dirichlet", "pathological", "shards", "quantity", "natural")
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
    "lstm-128": ("text",),
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
