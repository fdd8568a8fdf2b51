"""Activation functions in the operators in which ``torch.onnx`` writes them, which other verifiers know."""

import math
from collections.abc import Callable, Mapping

from attnrobust.errors import UnsupportedModelError
from attnrobust.interchange.program import Program, Value
from attnrobust.layers.graph.activation_functions import CUBIC, QUICK


def write_activation(program: Program, function: str, x: Value) -> Value:
    """Append one.

    Raises:
        UnsupportedModelError: A function that is not translated.
    """
    if function not in ACTIVATIONS:
        raise UnsupportedModelError(f"the activation {function} is not exported to ONNX")
    # sigmoid is in (0, 1); every other one here has |f(t)| <= |t|
    reach = math.sqrt(x.width) if function == "sigmoid" else x.reach
    return Value(ACTIVATIONS[function](program, x.name), x.rows, x.width, reach)


def _gelu(program: Program, x: str) -> str:
    """``x (1 + erf(x / sqrt 2)) / 2``."""
    erf = program.apply("Erf", program.apply("Div", x, math.sqrt(2.0)))
    return program.apply("Mul", program.apply("Mul", x, program.apply("Add", erf, 1.0)), 0.5)


def _gelu_tanh(program: Program, x: str) -> str:
    """``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``."""
    cube = program.apply("Mul", x, program.apply("Mul", x, x))
    inner = program.apply("Add", x, program.apply("Mul", cube, CUBIC))
    tanh = program.apply("Tanh", program.apply("Mul", inner, math.sqrt(2.0 / math.pi)))
    return program.apply("Mul", program.apply("Mul", x, program.apply("Add", tanh, 1.0)), 0.5)


def _quick_gelu(program: Program, x: str) -> str:
    return program.apply("Mul", x, program.apply("Sigmoid", program.apply("Mul", x, QUICK)))


ACTIVATIONS: Mapping[str, Callable[[Program, str], str]] = {
    "relu": lambda program, x: program.apply("Relu", x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": lambda program, x: program.apply("Mul", x, program.apply("Sigmoid", x)),
    "tanh": lambda program, x: program.apply("Tanh", x),
    "sigmoid": lambda program, x: program.apply("Sigmoid", x),
    "identity": lambda _, x: x,
}
