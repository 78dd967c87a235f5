"""Between JAX and ONNX: what jax2onnx (0.17) needs in order to convert a program, and its graph, made faster."""

import contextlib
import re
from collections.abc import Iterator

from jax import export
from jax2onnx.converter.ir_context import IRContext
from jax2onnx.converter.lower_dimexpr import LowerDimExpr
from jax2onnx.converter.typing_support import SymbolicDimOrigin
from onnx_ir import AttrGraph, AttrInt64, Graph, Model, Node, Value, _core, passes
from onnx_ir.passes import common

MATRIX_PRODUCT = re.compile(r"(\w*)(\w),\2(\w)->\1\3")  # Einsum's words for MatMul with a matrix


@contextlib.contextmanager
def symbolic_sizes() -> Iterator[None]:
    """Lets jax2onnx hand JAX's symbolic sizes to ONNX by name, as `pad` does not, and compute 4 * batch from batch."""
    convert, origin = _core._maybe_convert_to_symbolic_dim, IRContext.get_symbolic_dim_origin

    def origin_or_product(self, size):
        found = origin(self, size)
        if found is None and export.is_symbolic_dim(size):
            of_that_size = self.builder.ConstantOfShape(LowerDimExpr(self)([size]))
            found = SymbolicDimOrigin(of_that_size, axis=0)
        return found

    _core._maybe_convert_to_symbolic_dim = lambda size: convert(str(size) if export.is_symbolic_dim(size) else size)
    IRContext.get_symbolic_dim_origin = origin_or_product
    try:
        yield
    finally:
        _core._maybe_convert_to_symbolic_dim, IRContext.get_symbolic_dim_origin = convert, origin


def tidied(model: Model) -> Model:
    """The same model with scans instead of loops, without copies, unused arrays and types of values in between."""
    nodes = list(model.graph.all_nodes())
    for node in nodes:
        if node.op_type == "Cast" and node.inputs[0].dtype == node.attributes["to"].value:
            node.op_type = "Identity"
            node.attributes.clear()
    for node in nodes:
        if node.op_type == "Loop":
            replace_by_scan(node)
        if node.op_type == "Einsum" and MATRIX_PRODUCT.fullmatch(node.attributes["equation"].value):
            node.op_type = "MatMul"  # which ONNX Runtime computes faster
            node.attributes.clear()
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():  # what ONNX infers anyway, while jax2onnx takes some integers for floats
                value.type = value.shape = None
    tidy = passes.Sequential(common.IdentityEliminationPass(), common.RemoveUnusedNodesPass())
    model = tidy(model).model
    for graph in model.graphs():
        part_outputs(graph)
    return model


def part_outputs(graph: Graph) -> None:
    """Copies a value that is an output twice: of a Scan's next state and entry in one, ONNX Runtime makes neither."""
    for i, value in enumerate(graph.outputs):
        if any(value is other for other in graph.outputs[:i]):
            copy = Node("", "Identity", [value], outputs=[_like(value, f"_output_{i}")])
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]


def replace_by_scan(loop: Node) -> None:
    """Puts a Scan in the place of a Loop whose steps read one entry of arrays after the other, as `lax.scan` does.

    jax2onnx writes a Loop that carries these arrays and all that its steps share. ONNX Runtime copies them at every
    step, and the entries too; a Scan hands out entries and shared arrays as they are. Another Loop stays.
    """
    body = loop.attributes["body"].value
    step, _, *carried = body.inputs
    results, stacked = body.outputs[1 : 1 + len(carried)], body.outputs[1 + len(carried) :]
    shared = [i for i, result in enumerate(results) if _source(result) is carried[i]]
    states = [i for i in range(len(carried)) if i not in shared]
    readers = {i: [node for node, _ in carried[i].uses() if node is not results[i].producer()] for i in shared}
    readers = {i: nodes for i, nodes in readers.items() if all(_reads_entry(node, step) for node in nodes) and nodes}
    if not readers or len(step.uses()) != sum(map(len, readers.values())):
        return

    given = loop.inputs[2:]
    entries = [_like(nodes[0].outputs[0], "_entry") for nodes in readers.values()]
    for nodes, entry in zip(readers.values(), entries):
        for node in nodes:
            node.outputs[0].replace_all_uses_with(entry, replace_graph_outputs=True)
            body.remove(node, safe=True)
    copies = [results[i].producer() for i in shared]
    del loop.attributes["body"]
    body.outputs[:] = [results[i] for i in states] + stacked
    for i, copy in zip(shared, copies):
        body.remove(copy, safe=True)
        carried[i].replace_all_uses_with(given[i])
        loop.outputs[i].replace_all_uses_with(given[i], replace_graph_outputs=True)
    body.inputs[:] = [carried[i] for i in states] + entries

    outputs = [loop.outputs[i] for i in states] + list(loop.outputs[len(carried) :])
    scan = Node(
        "",
        "Scan",
        [given[i] for i in [*states, *readers]],
        [AttrGraph("body", body), AttrInt64("num_scan_inputs", len(readers))],
        outputs=[_like(value) for value in outputs],
    )
    loop.append(scan)
    for value, new in zip(outputs, scan.outputs):
        value.replace_all_uses_with(new, replace_graph_outputs=True)
    loop.graph.remove(loop, safe=True)


def _reads_entry(node: Node, step: Value) -> bool:
    """Whether it reads the entry of an array that belongs to a step."""
    return node.op_type == "Gather" and node.inputs[1] is step and node.attributes["axis"].value == 0


def _source(value: Value) -> Value:
    """The value that this one is a copy of."""
    while (producer := value.producer()) and producer.op_type == "Identity":
        value = producer.inputs[0]
    return value


def _like(value: Value, suffix: str = "") -> Value:
    return Value(name=f"{value.name}{suffix}", type=value.type, shape=value.shape)
