from .prune import plan_model as plan_model
from .prune import prune_model as prune_model
from .runner import RunResult as RunResult
from .runner import run as run
