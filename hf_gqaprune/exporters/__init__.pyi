from .exporter import export as export
from .verdict import Verdict as Verdict
from .verdict import verdicts as verdicts
