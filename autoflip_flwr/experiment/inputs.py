"""Which models take which data. Without PyTorch, so that settings that do not fit are refused at once."""

from autoflip_flwr.core.choices import MODEL_INPUTS

WORDS = {"image": "images (C, H, W)", "signal": "signals (channels, length)", "text": "text (length,)"}
"""The kinds of input in words, with the shape of one example."""

_OF_ANY_SHAPE = "mlp"
_DIMENSIONS = {"image": 3, "signal": 2, "text": 1}


def kind_of(input_shape: tuple[int, ...], kind: str | None = None) -> str:
    """Return what a model takes an input for: `image`, `signal` or `text`.

    Parameters
    ----------
    input_shape : tuple of int
        Shape of one example.
    kind : str | None (None)
        What its data set says that it is. Integers are text in any shape. Floats are an image if they have three
        dimensions, and else a signal. Where it is None, one dimension is a text.
    """
    if kind == "text" or (kind is None and len(input_shape) == 1):
        return "text"
    return "image" if len(input_shape) == 3 else "signal"


def misfit(model: str, kind: str, found: str, input_shape: tuple[int, ...] | None = None) -> str:
    """Say why one of the app's models cannot take some data.

    Parameters
    ----------
    model : str
        Name of the model.
    kind : str
        `image`, `signal` or `text`.
    found : str
        The data in words.
    input_shape : tuple of int | None (None)
        Shape of one example, if it is known. All models but `mlp` take only the dimensions of their kind.

    Returns
    -------
    str
        What it takes, and which models would take the data; "" if it takes them.
    """
    usual = input_shape is None or len(input_shape) == _DIMENSIONS[kind]
    fit = [name for name, kinds in MODEL_INPUTS.items() if kind in kinds and (usual or name == _OF_ANY_SHAPE)]
    if model in fit:
        return ""
    takes = " or ".join(WORDS[each] for each in MODEL_INPUTS[model])
    return f"takes {takes}, not {found}; models that do: {', '.join(fit)}"
