from .allocation import ALLOCATIONS as ALLOCATIONS
from .allocation import MEASURING as MEASURING
from .budget import Budget as Budget
from .layer_importance import measure_layers as measure_layers
from .planner import check_budget as check_budget
from .planner import make_plan as make_plan
