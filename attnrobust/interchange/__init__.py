"""Problems as files of other programs: a network as ONNX, a question about it as VNN-LIB."""
