from .data import load_data as load_data
from .launch import launch as launch
from .merging import merge as merge
from .recovery import recover as recover
from .request import make_request as make_request
