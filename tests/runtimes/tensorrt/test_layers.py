"""The summary of an engine's layers."""

from __future__ import annotations

from edgetube.runtimes.tensorrt.layers import summarize_engine_layers


class TestLayerTruth:
    TEXT = """Layers:
Name: __myl_Cast_0, LayerType: kgen, Inputs: [ { Name: frames, Dimensions: [1,2], Datatype: UInt8 }], Outputs: []
Name: s_1, LayerType: signal, Inputs: [], Outputs: []
Name: q_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1], Datatype: Int8 }], Metadata: [ONNX Layer: q.matmul]
Name: __myl_FcAdd_3, LayerType: runtime_fusion, Inputs: [ { Name: y, Datatype: Half }], Metadata: [ONNX Layer: fc1]\
[ONNX Layer: fc1.matmul]
Name: __myl_CastMulFc_6, LayerType: runtime_fusion, Inputs: [ { Name: y, Datatype: Int8 }, { Name: w, Datatype: Half }]
Name: CaskGemm, LayerType: CaskGemmMatrixMultiply, Inputs: [ { Name: z, Format/Datatype: Row major linear FP32 }]
Name: _gemm_mha_v2_4, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half }]
Name: __myl_AddReshTranReshMove_5, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half }]
Name: Reformatting CopyNode for Input, LayerType: Reformat, Inputs: [ { Name: q, Datatype: Half }]
Bindings: frames
"""

    def test_counts(self) -> None:
        assert summarize_engine_layers(self.TEXT) == {
            "kernels": 8,
            "gemms": {"int8": 1, "fp16": 2, "fp32": 1},
            "attention": {"fp16": 1},
            "reformats": 2,
            "float_gemms": ["fc1.matmul", "__myl_CastMulFc_6", "CaskGemm"],
        }

    def test_nothing_was_told(self) -> None:
        assert summarize_engine_layers("")["kernels"] == 0
