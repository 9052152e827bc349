"""torch + onnx + its runtimes: the deployed network as a file that other programs run, and in int8."""
