"""The graph of an engine, checked before a library opens it, and the operators that it may have.

These are operators of ONNX's own domain that the ONNX emitter can write: what torch.onnx writes for PyTorch's
operators, and what our own translations and simplifications write. Each computes a tensor from tensors, the same one
each time. Not among them: control flow, sequences, texts, random numbers, and all other domains, some of whose
operators open files (`com.microsoft::EPContext`).
"""

from __future__ import annotations

from flashu_compile.arguments import shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec
from flashu_compile.errors import BundleError
from flashu_compile.runtime.onnx_file import LARGEST_FILE, OnnxFile, read_onnx

_NAMES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BitShift
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Col2Im Compress Concat Constant
    ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Det Div DynamicQuantizeLinear
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf
    IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul MatMulInteger Max MaxPool Min Mish Mod
    Mul Neg NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize RotaryEmbedding Round
    ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus SpaceToDepth Split Sqrt
    Squeeze Sub Sum Tan Tanh TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_NAMES.split())


def read_graph(files: BundleFiles, spec: EngineSpec, *, trust: bool = False) -> OnnxFile:
    """Read and check the graph of an engine.

    Raises `BundleError` if its file is not what was built, if it is not sound (see `read_onnx`), if it reads bytes from
    anywhere but the bundle's weight store, or if it has an operator that is not in the list and `trust` is not given.
    """
    path = files.path(spec.file)
    if path.stat().st_size > LARGEST_FILE:
        raise BundleError(f"{path} is too large for an ONNX model; build the bundle again.")
    found = read_onnx(path.read_bytes(), str(path))
    stored = files.path(WEIGHTS).stat().st_size if found.weights else 0
    for weight in found.weights:
        if weight.location != WEIGHTS or weight.offset + weight.length > stored:
            raise BundleError(
                f"{path} has no place in {files.directory / WEIGHTS} for {shown(weight.name)}; build the bundle again."
            )
    if not trust:
        _check_operators(found, spec.name)
    return found


def _check_operators(found: OnnxFile, engine: str) -> None:
    foreign = sorted(
        f"{domain}::{name}" if domain else name
        for domain, name in found.operators
        if domain or name not in OPERATORS
    )
    if foreign:
        others = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise BundleError(
            f"Engine {engine!r} has operator {shown(foreign[0])}{others}, which no graph of a bundle needs; if you "
            "know who built it, load it with trust=True (--trust)."
        )
