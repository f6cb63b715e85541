from .exporter import FORMATS as FORMATS
from .exporter import Exported as Exported
from .exporter import export as export
from .gguf_tensors import GGUF_DTYPES as GGUF_DTYPES
