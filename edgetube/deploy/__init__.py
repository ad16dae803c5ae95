"""Folders that inference servers load a bundle from, one module a server.

`triton` writes a model repository of NVIDIA's Triton Inference Server. Its own backends run the artifacts that they
know; any other bundle runs in Triton's Python backend, in the program `model.py`. `deepstream` writes the configuration
of a DeepStream pipeline, and an ONNX graph that takes what DeepStream prepares.
"""
