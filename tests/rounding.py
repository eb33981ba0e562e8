"""Rounding noise: results as another processor might round them. See `pytest --rounding-noise`.

Results of matrix products, reductions and elementary functions move by at most one unit in the last
place. The move is a function of the result's bits and the seed, so equal results stay equal, in
every thread and process. Integers, zeros, subnormal numbers, infinities and NaN stay.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

VARIABLE = "ROUNDING_NOISE"
"""Environment variable with the seed; sitecustomize.py reads it in processes that tests start."""

TORCH = """
    mm bmm addmm baddbmm addbmm mv addmv dot vdot matmul linear einsum tensordot inner
    convolution _convolution conv1d conv2d convolution_backward
    sum nansum mean var std var_mean std_mean prod cumsum cumprod logsumexp logcumsumexp norm
    linalg_vector_norm linalg_matrix_norm trace cdist
    exp exp2 expm1 log log2 log10 log1p tanh sqrt rsqrt pow div true_divide reciprocal
    sin cos tan sinh cosh asin acos atan atan2 asinh acosh atanh hypot erf erfc erfinv lgamma
    sigmoid log_sigmoid_forward softplus silu gelu mish elu _softmax _log_softmax softmax
    log_softmax logaddexp xlogy addcdiv addcmul lerp
    tanh_backward sigmoid_backward softplus_backward log_sigmoid_backward silu_backward
    gelu_backward mish_backward elu_backward _softmax_backward_data _log_softmax_backward_data
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm native_batch_norm_backward avg_pool2d avg_pool2d_backward
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
    cholesky cholesky_solve cholesky_inverse triangular_solve linalg_cholesky linalg_cholesky_ex
    linalg_solve_triangular linalg_solve linalg_inv linalg_inv_ex linalg_lstsq linalg_pinv
    linalg_qr linalg_svd linalg_eigh linalg_det linalg_slogdet _linalg_solve_ex _linalg_svd
    _linalg_eigh _linalg_slogdet _linalg_det
"""

NUMPY = """
    exp exp2 expm1 log log2 log10 log1p tanh sqrt power float_power sin cos tan sinh cosh arcsin
    arccos arctan arctan2 hypot logaddexp sum cumsum dot vdot inner matmul einsum tensordot
    interp linalg.norm linalg.solve linalg.inv linalg.pinv linalg.cholesky linalg.det
"""


@functools.cache  # once in a process: sitecustomize.py may come before conftest.py
def install(seed: int) -> None:
    """Switch the noise on for good: in this process, its threads, and processes that it starts."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = str(Path(__file__).parent)
    os.environ[VARIABLE] = str(seed)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *(p for p in paths if p and p != here)])
    for name, begin in (("numpy", _in_numpy), ("torch", _in_torch)):
        then = functools.partial(begin, seed)
        if name in sys.modules:
            then()
        else:
            sys.meta_path.insert(0, _AfterImport(name, then))


class _AfterImport(MetaPathFinder):
    """Calls a function when a module has been imported: the noise itself imports nothing early."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module = module
        self.then = then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = functools.partial(self._run, spec.loader.exec_module)
                return spec
        return None

    def _run(self, execute: Callable[[Any], None], module: Any) -> None:
        execute(module)
        self.then()


def mover(seed: int) -> Callable[[Any], None]:
    """Return a function that moves an array of floats in place, each by one unit up or down."""
    import numpy as np

    def kind(word: type, key: int, mantissa: int) -> tuple[Any, ...]:
        bits = 8 * np.dtype(word).itemsize
        normal, magnitude = 1 << mantissa, (1 << (bits - 1)) - 1
        salt = (seed + 1) * 0x9E3779B97F4A7C15 % (1 << (bits - 1))
        numbers = magnitude, normal, magnitude - 3 * normal, salt, key, bits - 1, 1
        return word, *map(word, numbers)

    kinds = {
        np.dtype(np.float32): kind(np.uint32, 0x9E3779B1, 23),
        np.dtype(np.float64): kind(np.uint64, 0x9E3779B97F4A7C15, 52),
    }

    def move(array: Any) -> None:
        if array.dtype not in kinds or not array.size:
            return
        word, magnitude, normal, span, salt, key, last, one = kinds[array.dtype]
        bits = array.view(word)  # larger by 1 is one unit away from zero
        size = np.bitwise_and(bits, magnitude, out=np.empty_like(bits))
        code = np.bitwise_xor(size, salt, out=np.empty_like(bits))
        np.multiply(code, key, out=code)  # its first bit depends on all bits of the value
        np.right_shift(code, last, out=code)
        np.left_shift(code, one, out=code)
        np.subtract(code, one, out=code)
        np.subtract(size, normal, out=size)
        code[size > span] = 0  # zero, subnormal, infinite, NaN, or the largest that there are
        np.add(bits, code, out=bits)

    return move


def _in_numpy(seed: int) -> None:
    """Wrap functions of NumPy's namespace, and the sum in methods such as `x.mean()`."""
    import numpy as np

    try:
        from numpy._core import _methods
    except ImportError:  # NumPy 1
        from numpy.core import _methods

    move = mover(seed)

    class Noisy:
        def __init__(self, function: Any) -> None:
            functools.update_wrapper(self, function)
            self._function = function

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = self._function(*args, **kwargs)
            if isinstance(result, np.floating):
                result = np.asarray(result)
                move(result)
                return result[()]
            if type(result) is np.ndarray:
                if result.base is not None and kwargs.get("out") is None:
                    result = result.copy()  # einsum may give a view of its operand
                move(result)
            return result

        def __getattr__(self, name: str) -> Any:
            return getattr(self._function, name)

        def __reduce__(self) -> str:
            return self._function.__name__

    for name in NUMPY.split():
        *place, last = name.split(".")
        holder = getattr(np, place[0]) if place else np
        setattr(holder, last, Noisy(getattr(holder, last)))
    _methods.umr_sum = Noisy(_methods.umr_sum)


def _in_torch(seed: int) -> None:
    """Enter a dispatch mode in this thread and in each that starts from now on."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    move = mover(seed)
    noisy = {getattr(torch.ops.aten, name) for base in TORCH.split() for name in (base, f"{base}_")
             if hasattr(torch.ops.aten, name)}  # fmt: skip

    def moved(result: Any) -> None:
        if isinstance(result, tuple | list):
            for one in result:
                moved(one)
        elif type(result) in (torch.Tensor, torch.nn.Parameter) and result.device.type == "cpu":
            move(result.detach().numpy())

    class Noise(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # or every process imports the compiler, for seconds

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in noisy:
                moved(result)
            return result

    start = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def start_with_noise(thread: threading.Thread) -> None:
        with Noise():
            start(thread)

    threading.Thread._bootstrap_inner = start_with_noise  # type: ignore[attr-defined]
    Noise().__enter__()

    def without_noise(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

    # Files are written of a graph, which a dispatch mode would not leave as it is.
    for holder, names in ((torch.jit, ("trace", "save", "load")), (torch.onnx, ("export",))):
        for name in names:
            setattr(holder, name, without_noise(getattr(holder, name)))
