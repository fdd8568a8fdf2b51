"""ONNX files by the package onnx, the optional extra ``attnrobust[onnx]``."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnrobust import __version__
from attnrobust.errors import InputError
from attnrobust.interchange.box import DTYPES, Precision
from attnrobust.interchange.program import Operation, Program

OPSET, IR_VERSION = 13, 8
"""Old enough for the readers of other verifiers; the first with a softmax along one axis."""
INPUT, OUTPUT = "X", "Y"
LARGEST = 2**31 - 2**20
"""Bytes of one file of protocol buffers, less room for the graph."""
CURE = "onnx is not installed; install the extra: pip install 'attnrobust[onnx]'"


def onnx_version() -> str:
    """The version of the package.

    Raises:
        InputError: It is not installed.
    """
    return str(_onnx().__version__)


def onnx_bytes(program: Program, *, shape: tuple[int, ...], classes: int, precision: Precision) -> bytes:
    """A checked ONNX file: the input X of a shape to the logits Y (1, classes), which the program computes.

    Raises:
        InputError: onnx is not installed, or the file would have more than 2 GiB.
    """
    onnx, size = _onnx(), DTYPES[precision].itemsize
    if program.numbers * size > LARGEST:
        raise InputError(
            f"the network has {program.numbers * size / 2**30:.2f} GiB of weights in {precision}, more than one ONNX "
            "file holds; export it from a later depth on"
        )
    helper = onnx.helper
    kind = onnx.TensorProto.DOUBLE if precision == "float64" else onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [_node(helper, operation) for operation in program.operations],
        "network",
        [helper.make_tensor_value_info(INPUT, kind, shape)],
        [helper.make_tensor_value_info(OUTPUT, kind, (1, classes))],
        [onnx.numpy_helper.from_array(_array(value, precision), name) for name, value in program.constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="attnrobust", producer_version=__version__,
    )  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def run_onnx(content: bytes, x: Tensor, precision: Precision) -> Tensor:
    """The logits of a file at one input, by the reference implementation of onnx, as float64."""
    onnx = _onnx()
    from onnx.reference import ReferenceEvaluator

    model = ReferenceEvaluator(onnx.load_from_string(content), new_ops=[_erf()])
    (found,) = model.run(None, {INPUT: _array(x[None], precision)})
    return torch.from_numpy(np.asarray(found, dtype=np.float64))[0]


def _erf() -> type:
    """The reference rounds this one function to float32, whatever its input."""
    from onnx.reference.op_run import OpRun

    class Erf(OpRun):
        op_domain = ""

        def _run(self, x: Any) -> Any:
            return (torch.from_numpy(x).erf().numpy(),)

    return Erf


def _node(helper: Any, operation: Operation) -> Any:
    attributes = {name: list(value) if isinstance(value, tuple) else value for name, value in operation.attributes}
    return helper.make_node(operation.kind, operation.inputs, [operation.output], **attributes)


def _array(value: Tensor, precision: Precision) -> Any:
    value = value.detach().cpu()
    if value.is_floating_point():
        value = value.to(DTYPES[precision])
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"a weight is beyond the range of {precision}; take the precision float64")
    return np.asarray(value.contiguous().numpy())


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise InputError(CURE) from error
    return onnx
