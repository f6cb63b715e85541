from .columns import refit_columns as refit_columns
from .least_squares import ChosenRidge as ChosenRidge
from .least_squares import ResidualStreams as ResidualStreams
from .least_squares import refit_on_pruned_prefix as refit_on_pruned_prefix
from .least_squares import ridge_record as ridge_record
from .natural_gradient import natural_gradient_steps as natural_gradient_steps
from .natural_gradient import steps_peak_bytes as steps_peak_bytes
