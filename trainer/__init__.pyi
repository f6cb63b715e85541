from .data import load_data as load_data
from .launch import launch as launch
from .merging import ADAPTER as ADAPTER
from .merging import merge as merge
from .merging import record_base as record_base
from .recovery import recover as recover
from .request import make_request as make_request
