"""A shared table makes the tests faster. Without its place in torch they only take longer."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx_operators import looked_up_once

from marnet_export.build.tracing import tracing

REGISTRATION = "torch.onnx._internal.exporter._registration"


def exported(module: torch.nn.Module) -> onnx.ModelProto:
    with tracing():
        program = torch.export.export(module, (torch.zeros(2, 3),))
        found = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert found is not None
    return found.model_proto


def test_a_graph_is_the_same_with_a_shared_table():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU())
    operators = [node.op_type for node in exported(module).graph.node]
    with looked_up_once():
        first, second = exported(module), exported(module)
    for found in (first, second):
        assert [node.op_type for node in found.graph.node] == operators


@pytest.mark.parametrize("module", [None, SimpleNamespace(), SimpleNamespace(ONNXRegistry=object)])
def test_where_torch_has_no_such_table_nothing_happens(module, monkeypatch):
    monkeypatch.setitem(sys.modules, REGISTRATION, module)
    with looked_up_once():
        assert sys.modules[REGISTRATION] is module


def test_a_table_of_another_kind_is_made_for_each_graph(monkeypatch):
    class Table:
        from_torchlib = staticmethod(lambda **opset: SimpleNamespace(opset=opset))

    monkeypatch.setitem(sys.modules, REGISTRATION, SimpleNamespace(ONNXRegistry=Table))
    with looked_up_once():
        first, second = Table.from_torchlib(opset_version=18), Table.from_torchlib(opset_version=18)
    assert first is not second
    assert first == second == SimpleNamespace(opset={"opset_version": 18})
