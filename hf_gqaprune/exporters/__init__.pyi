from .exporter import export as export
from .verdict import verdicts as verdicts
