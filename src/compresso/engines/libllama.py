"""A GGUF file rounded by llama.cpp's library, in a process of its own: it ends the process when it does not like a
file.

`llama-quantize` is a command around the same function, `llama_model_quantize` in llama.h. Run as a script, this wants
the library, input, output and the number of the file type.
"""

import ctypes
import sys
from pathlib import Path


class Parameters(ctypes.Structure):
    """The first fields of `llama_model_quantize_params`, and room for those that come after them in any version."""

    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("others", ctypes.c_byte * 1016))


def quantize(library: Path, whole: Path, output: Path, file_type: int) -> int:
    """Write `output` from `whole`; the library's answer, 0 if it is pleased.

    Args:
        library: the shared object.
        file_type: as in `gguf.LlamaFileType`.
    """
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    llama.llama_model_quantize.restype = ctypes.c_uint32
    parameters = llama.llama_model_quantize_default_params()
    parameters.file_type = file_type
    return int(llama.llama_model_quantize(str(whole).encode(), str(output).encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(quantize(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
