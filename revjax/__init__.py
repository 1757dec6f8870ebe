"""revjax: reversible residual networks for JAX."""

from revjax.check import ReversibilityReport as ReversibilityReport
from revjax.check import check_reversible as check_reversible
from revjax.coupling import Coupling as Coupling
from revjax.coupling import additive as additive
from revjax.coupling import affine as affine
from revjax.error_growth import Drift as Drift
from revjax.error_growth import drift as drift
from revjax.grid import check_in_range as check_in_range
from revjax.grid import round_to_grid as round_to_grid
from revjax.grid import stream_bound as stream_bound
from revjax.grid import stream_peak as stream_peak
from revjax.grid import warn_out_of_range as warn_out_of_range
from revjax.memory import MemoryReport as MemoryReport
from revjax.memory import memory_report as memory_report
from revjax.models import create_model as create_model
from revjax.models import list_models as list_models
from revjax.resnet import ResNet as ResNet
from revjax.reversible import rev_block_apply as rev_block_apply
from revjax.reversible import rev_block_inverse as rev_block_inverse
from revjax.reversible import rev_chain_apply as rev_chain_apply
from revjax.reversible import rev_chain_inverse as rev_chain_inverse
from revjax.revnet import RevNet as RevNet
from revjax.revvit import RevViT as RevViT
from revjax.shortcut import Shortcut as Shortcut
from revjax.stage import ReversibleStage as ReversibleStage
from revjax.stage import StreamPeak as StreamPeak
from revjax.stochastic_depth import StochasticDepth as StochasticDepth
from revjax.stochastic_depth import draw_gates as draw_gates
from revjax.stochastic_depth import expected_depth as expected_depth
from revjax.stochastic_depth import survival_probabilities as survival_probabilities

__version__ = "0.1.0"  # which pyproject.toml reads
