"""Attention as a graph of oneDNN, whose CPU engine takes it as one partition: MatMul, scale, mask, SoftMax, MatMul.

    pip install onednn           # the library alone; what it offers is its C interface

Heads are [batch, heads_kv, group, length, dim], as oneDNN's documentation of grouped-query attention has them. The causal
mask is an array that is added: made of the graph's own indices instead, which its documentation has too, 512 x 512 took
four times as long.
"""

import ctypes
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path

import numpy as np

# Of oneapi/dnnl/dnnl_graph_types.h and dnnl_common_types.h.
CPU, F32, BF16, STRIDED, VARIABLE, IN_ORDER, FUSION = 1, 3, 2, 2, 1, 1, 1
ADD, DIVIDE, MATMUL, SOFTMAX = 2, 20, 39, 64
AXIS, TRANSPOSE_B, MODE = 0x30, 0x66, 0x84
MOST_DIMS = 12


class LogicalTensor(ctypes.Structure):
    _fields_ = [("id", c_size_t), ("ndims", c_int), ("dims", c_int64 * MOST_DIMS), ("data_type", c_int),
                ("property", c_int), ("layout_type", c_int), ("strides", c_int64 * MOST_DIMS)]


class Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p)]


class Library:
    """The C functions, which answer a status, as methods that raise."""

    def __init__(self):
        # The wheel leaves its libraries where no loader looks, and its CPU engine is a device of OpenCL's.
        folder = Path(sys.prefix) / "lib"
        os.environ.setdefault("OCL_ICD_FILENAMES", str(folder / "libintelocl.so"))
        for name in ("libintlc.so.5", "libimf.so", "libsvml.so", "libtbb.so.12", "libsycl.so.9"):
            ctypes.CDLL(folder / name, ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(folder / "libdnnl.so.3")

    def __getattr__(self, name):
        function = getattr(self._library, f"dnnl_{name}")

        def call(*arguments):
            status = function(*arguments)
            if status != 0:
                raise RuntimeError(f"dnnl_{name} answered {status}")

        return call

    def version(self):
        self._library.dnnl_version.restype = POINTER(Version)
        found = self._library.dnnl_version().contents
        return f"oneDNN {found.major}.{found.minor}.{found.patch}"


class Graph:
    def __init__(self, library):
        self.library = library
        self.handle = c_void_p()
        self.tensors = {}  # by id
        library.graph_graph_create(byref(self.handle), CPU)
        self._ops = 0

    def tensor(self, shape, dtype):
        made = LogicalTensor()
        dims = (c_int64 * MOST_DIMS)(*shape)
        self.library.graph_logical_tensor_init_with_dims(
            byref(made), c_size_t(len(self.tensors)), c_int(dtype), c_int32(len(shape)), dims, STRIDED, VARIABLE)
        self.tensors[made.id] = made
        return made

    def op(self, kind, inputs, shape, dtype=F32, **attributes):
        """An operation's output."""
        out, op = self.tensor(shape, dtype), c_void_p()
        self.library.graph_op_create(byref(op), c_size_t(self._ops), kind, b"%d" % self._ops)
        self._ops += 1
        for each in inputs:
            self.library.graph_op_add_input(op, byref(each))
        self.library.graph_op_add_output(op, byref(out))
        if "axis" in attributes:
            self.library.graph_op_set_attr_s64(op, AXIS, byref(c_int64(attributes["axis"])), c_size_t(1))
        if "transpose_b" in attributes:
            self.library.graph_op_set_attr_bool(op, TRANSPOSE_B, byref(c_uint8(1)), c_size_t(1))
        if "mode" in attributes:
            self.library.graph_op_set_attr_str(op, MODE, attributes["mode"], c_size_t(len(attributes["mode"])))
        self.library.graph_add_op(self.handle, op)
        return out

    def partition(self):
        """The one that holds the whole graph."""
        count, one = c_size_t(), c_void_p()
        self.library.graph_graph_finalize(self.handle)
        self.library.graph_graph_filter(self.handle, FUSION)
        self.library.graph_graph_get_partition_num(self.handle, byref(count))
        if count.value != 1:
            raise RuntimeError(f"oneDNN cuts the graph into {count.value} partitions")
        self.library.graph_graph_get_partitions(self.handle, c_size_t(1), byref(one))
        return one


def stored(values, dtype):
    """As f32 or as the bits of bf16, cut off."""
    array = np.asarray(values, np.float32)
    return array if dtype == F32 else (array.view(np.uint32) >> 16).astype(np.uint16)


class Attention:
    """run() computes `out`, [batch, heads_kv, group, len_q, dim_v]."""

    def __init__(self, q, k, v, dtype, is_causal):
        library = self._library = Library()
        self.version = library.version()
        batch, heads_kv, group, len_q, dim_qk = q.shape
        len_k, dim_v = v.shape[-2:]
        graph = Graph(library)
        scores_shape, out_shape = (batch, heads_kv, group, len_q, len_k), (batch, heads_kv, group, len_q, dim_v)
        tensor_q, tensor_k, tensor_v = (graph.tensor(x.shape, dtype) for x in (q, k, v))
        scale = graph.tensor((1,), dtype)
        inputs = [(tensor_q, q), (tensor_k, k), (tensor_v, v),
                  (scale, stored([dim_qk**0.5], dtype))]
        scores = graph.op(MATMUL, [tensor_q, tensor_k], scores_shape, transpose_b=True)
        scores = graph.op(DIVIDE, [scores, scale], scores_shape)
        if is_causal:
            mask = graph.tensor((1, 1, 1, len_q, len_k), dtype)
            visible = np.tri(len_q, len_k, len_k - len_q, dtype=bool)
            inputs.append((mask, stored(np.where(visible, 0, -np.inf), dtype)))
            scores = graph.op(ADD, [scores, mask], scores_shape)
        weights = graph.op(SOFTMAX, [scores], scores_shape, dtype, axis=-1, mode=b"inf_as_zero")
        out = graph.op(MATMUL, [weights, tensor_v], out_shape, dtype)
        self._compile(graph, inputs, out, dtype)

    def _compile(self, graph, inputs, out, dtype):
        library, partition = self._library, graph.partition()
        self.out = np.zeros(tuple(out.dims[: out.ndims]), np.float32 if dtype == F32 else np.uint16)
        engine, self._stream, self._compiled = c_void_p(), c_void_p(), c_void_p()
        library.engine_create(byref(engine), CPU, c_size_t(0))
        library.stream_create(byref(self._stream), engine, IN_ORDER)
        count = c_size_t()
        library.graph_partition_get_input_ports_num(partition, byref(count))
        ports = (LogicalTensor * count.value)()
        library.graph_partition_get_input_ports(partition, count, ports)
        arrays = {tensor.id: array for tensor, array in inputs}
        library.graph_compiled_partition_create(byref(self._compiled), partition)
        taken = [graph.tensors[port.id] for port in ports]
        library.graph_partition_compile(
            partition, self._compiled, count, (POINTER(LogicalTensor) * len(taken))(*map(ctypes.pointer, taken)),
            c_size_t(1), (POINTER(LogicalTensor) * 1)(ctypes.pointer(out)), engine)

        def bound(tensor, array):
            made = c_void_p()
            library.graph_tensor_create(byref(made), byref(tensor), engine, c_void_p(array.ctypes.data))
            return made.value

        self._kept = [arrays[tensor.id] for tensor in taken]
        self._inputs = (c_void_p * len(taken))(*map(bound, taken, self._kept))
        self._outputs = (c_void_p * 1)(bound(out, self.out))

    def run(self):
        self._library.graph_compiled_partition_execute(
            self._compiled, self._stream, c_size_t(len(self._inputs)), self._inputs, c_size_t(1), self._outputs)
        self._library.stream_wait(self._stream)
